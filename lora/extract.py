"""The difference of two models as a LoRA, theta_distilled - theta_base (2311.05556, section 4).

It is computed layer by layer, so that memory never holds another copy of a model.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .delta import Delta, Vector
from .formats.metadata import recipe
from .nearest import nearest
from .truncation import Truncation

CPU = torch.device("cpu")
Layer = tuple[str, Tensor | None, Tensor | None]
"""(canonical name, difference of the weights, difference of the biases); None if they are equal"""


def extract(
    layers: Iterable[Layer],
    rank: int,
    seed: int,
    source: str,
    device: torch.device = CPU,
) -> tuple[Vector, str]:
    """The differences of the layers as a vector, and a report of what this rank loses.

    Matrices and convolutions become deltas of this rank. Norms and biases have no rank, so they
    stay full differences (`.diff` and `.diff_b`). Equal layers are left out.

    device: where the layers are decomposed; the deltas come back to the CPU.

    Raises:
        ValueError: rank is below 1, a difference is not finite, or nothing differs.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, found {rank}.")
    deltas: dict[str, Delta] = {}
    diffs: dict[str, Tensor] = {}
    energies, ranks = {}, {}
    for name, weight, bias in layers:
        for change in (weight, bias):
            if change is not None and not change.isfinite().all():
                raise ValueError(
                    f"The difference of {name} is not finite (NaN or infinity): one of the models "
                    "is damaged. Download its file again."
                )
        if weight is not None and weight.any():
            if weight.dim() < 2:
                diffs[f"{name}.diff"] = weight.float().cpu()
            else:
                deltas[name], lost = nearest(weight.to(device), rank, seed)
                energies[name] = lost, float(weight.double().square().sum())
                ranks[name] = min(weight.flatten(1).shape), deltas[name].rank
        if bias is not None and bias.any():
            diffs[f"{name}.diff_b"] = bias.float().cpu()
    if not deltas and not diffs:
        raise ValueError("The two models do not differ, so there is nothing to extract.")
    report = f"{len(deltas)} layers with rank {rank} or less, {len(diffs)} norms and biases."
    method = f"extracted, rank {rank}, seed {seed}"
    if deltas:
        truncation = Truncation(energies, ranks)
        report += f"\n{truncation}"
        method += f", relative error {truncation.error:.2e}"
    terms = [(Vector({}, source="distilled"), 1.0), (Vector({}, source="base"), -1.0)]
    return Vector(deltas, diffs, recipe(terms, method), source), report
