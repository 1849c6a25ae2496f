"""Lowers the ranks of a vector with the smallest possible error.

A delta of rank r is `up @ down`. QR of both factors leaves a core of r x r with the singular values
of the delta. This costs O((out + in) r^2), and no matrix of the layer's size is formed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .delta import Delta, Vector
from .formats.metadata import METHOD
from .truncation import Truncation


def truncated(vector: Vector, rank: int = 0, keep_energy: float = 1.0) -> tuple[Vector, Truncation]:
    """The vector without the smallest singular values of its deltas, and what it loses.

    No other deltas of these ranks are nearer (Eckart and Young, 1936). Works in float32. Full
    differences (`diffs`) stay as they are.

    Args:
        rank: the highest rank of a module; 0 means no limit.
        keep_energy: the share of the energy of all modules together to keep, above 0 to 1. One
            threshold for the singular values of all modules reaches it with the fewest ranks. At 1,
            only ranks without any energy are left out.

    Raises:
        ValueError: rank is negative, keep_energy is out of range, or the vector has no deltas.
    """
    if rank < 0 or not 0 < keep_energy <= 1:
        raise ValueError(
            f"rank must be 0 or more and keep_energy above 0 and at most 1, found {rank} and "
            f"{keep_energy:g}."
        )
    if not vector.deltas:
        raise ValueError(f"{vector.source} holds no factors, so its ranks cannot be reduced.")
    parts = {name: decomposed(delta) for name, delta in vector.deltas.items()}
    threshold = _threshold([part.values for part in parts.values()], keep_energy)
    deltas, ranks, energies = {}, {}, {}
    for name, part in parts.items():
        is_needed = (part.values.double() >= threshold) & (part.values > part.noise)
        needed = max(1, int(is_needed.sum()))
        kept = min(needed, rank or needed)
        deltas[name] = part.cut(kept)
        ranks[name] = vector.deltas[name].rank, kept
        energy = part.values.double().square()
        energies[name] = float(energy[kept:].sum()), float(energy.sum())
    truncation = Truncation(energies, ranks)
    method = f"svd, rank {rank}, keep_energy {keep_energy:.12g}"
    metadata = {**vector.metadata, METHOD: f"{method}, relative error {truncation.error:.2e}"}
    return replace(vector, deltas=deltas, metadata=metadata), truncation


@dataclass(frozen=True)
class Decomposed:
    """`left @ diag(values) @ right` is the delta as a matrix, scale included."""

    left: Tensor
    values: Tensor
    right: Tensor
    shape: tuple[int, ...]

    @property
    def noise(self) -> float:
        """Singular values below this are rounding errors. QR leaves up to 2 eps of the largest one
        in place of zeros, at any layer size (measured up to 2560 x 23040)."""
        return 8 * torch.finfo(torch.float32).eps * float(self.values[0])

    def cut(self, rank: int) -> Delta:
        """The delta of the first `rank` values, split evenly between the factors."""
        root = self.values[:rank].sqrt()
        up, down = self.left[:, :rank] * root, self.right[:rank] * root[:, None]
        kernel = [1] * (len(self.shape) - 2)
        return Delta(
            up.reshape(*up.shape, *kernel), down.reshape(rank, *self.shape[1:]), None, float(rank)
        )


def decomposed(delta: Delta) -> Decomposed:
    """The singular value decomposition of a delta, float32."""
    plain = delta.plain()
    q_up, r_up = torch.linalg.qr(plain.up.float().flatten(1) * plain.scale)
    q_down, r_down = torch.linalg.qr(plain.down.float().flatten(1).T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return Decomposed(q_up @ left, values, right @ q_down.T, delta.shape)


def _threshold(values: list[Tensor], keep_energy: float) -> float:
    """The smallest singular value that must stay to keep this share of all modules' energy."""
    if keep_energy == 1:
        return 0.0
    ordered = torch.cat(values).double().sort(descending=True).values
    energy = ordered.square().cumsum(0)
    # The last needed value. If several modules have the same value, all of them keep it.
    return float(ordered[int(torch.searchsorted(energy, keep_energy * energy[-1]))])
