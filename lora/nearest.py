"""The nearest delta of a given rank to a full weight change, by a randomised decomposition.

Halko, Martinsson and Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1. The error is measured, not
estimated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .delta import Delta
from .reduce import Decomposed

OVERSAMPLING, POWERS = 16, 2


def nearest(weight: Tensor, rank: int, seed: int) -> tuple[Delta, float]:
    """(the delta of this rank nearest to `weight`, the squared Frobenius norm of what it loses).

    weight: [out, in, ...]. Works in float32 on the device of the weight; the delta is on the CPU.
    The error is within some percent of the smallest possible one.
    """
    matrix = weight.float().flatten(1)
    small = min(matrix.shape)
    rank = min(rank, small)
    if 2 * (rank + OVERSAMPLING) >= small:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        basis = _basis(matrix, rank + OVERSAMPLING, seed)
        left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        left = basis @ left
    rest = matrix - (left[:, :rank] * values[:rank]) @ right[:rank]
    decomposition = Decomposed(left.cpu(), values.cpu(), right.cpu(), tuple(weight.shape))
    return decomposition.cut(rank), float(rest.square().sum())


def _basis(matrix: Tensor, columns: int, seed: int) -> Tensor:
    """Orthonormal columns that span most of the range of the matrix."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], columns, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(POWERS):
        basis = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    return basis
