"""The difference of two models as a LoRA, theta_distilled - theta_base (2311.05556, section 4).

Layer by layer, so that no second copy of a model is in memory, by a randomised decomposition with
a fixed seed (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1), whose error is
measured and not estimated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .delta import Delta, Vector

OVERSAMPLING, POWERS = 16, 2

Layer = tuple[str, Tensor | None, Tensor | None]
"""canonical name, difference of the weights, difference of the biases; None where there is none"""


def extract(layers: Iterable[Layer], rank: int, seed: int, source: str) -> tuple[Vector, str]:
    """The layers' differences as a vector, and a report of what a rank like this leaves out.

    Matrices and convolutions become deltas of this rank; norms and biases, which have no rank, stay
    whole (`.diff` and `.diff_b`). What does not differ is left out.

    Raises:
        ValueError: rank is below 1, a difference is not finite, or nothing differs.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, found {rank}.")
    deltas: dict[str, Delta] = {}
    diffs: dict[str, Tensor] = {}
    lost = whole = worst = 0.0
    worst_name = ""
    for name, weight, bias in layers:
        for change in (weight, bias):
            if change is not None and not change.isfinite().all():
                raise ValueError(f"The difference of {name} is not finite; one model is broken.")
        if weight is not None and weight.any():
            if weight.dim() < 2:
                diffs[f"{name}.diff"] = weight.float().cpu()
            else:
                deltas[name], left_out = nearest(weight, rank, seed)
                energy = float(weight.double().square().sum())
                lost, whole = lost + left_out, whole + energy
                if left_out / energy > worst:
                    worst, worst_name = left_out / energy, name
        if bias is not None and bias.any():
            diffs[f"{name}.diff_b"] = bias.float().cpu()
    if not deltas and not diffs:
        raise ValueError("The two models do not differ, so there is nothing to extract.")
    report = [f"{len(deltas)} layers of rank {rank} or less, {len(diffs)} norms and biases whole."]
    if whole:
        report.append(
            f"Relative error {math.sqrt(lost / whole):.3f} over all layers, at worst "
            f"{math.sqrt(worst):.3f} ({worst_name or 'none'})."
        )
    return Vector(deltas, diffs, {}, source), "\n".join(report)


def nearest(weight: Tensor, rank: int, seed: int) -> tuple[Delta, float]:
    """A delta of this rank that is as near to `weight` [out, in, ...] as can be, to some percent of
    the error; -> (it, the squared Frobenius norm of what it leaves out). Float32, on its device."""
    matrix = weight.float().flatten(1)
    small = min(matrix.shape)
    rank = min(rank, small)
    if 2 * (rank + OVERSAMPLING) >= small:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        basis = _basis(matrix, rank + OVERSAMPLING, seed)
        left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ left
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, right[:rank] * root[:, None]
    left_out = float((matrix - up @ down).double().square().sum())
    up, down = up.cpu(), down.cpu()
    kernel = [1] * (weight.dim() - 2)
    delta = Delta(
        up.reshape(*up.shape, *kernel), down.reshape(rank, *weight.shape[1:]), None, float(rank)
    )
    return delta, left_out


def _basis(matrix: Tensor, columns: int, seed: int) -> Tensor:
    """Orthonormal columns that hold most of what the matrix does."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], columns, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(POWERS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    return basis
