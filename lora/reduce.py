"""Fewer ranks: the best approximation of every delta, by a decomposition that stays small.

A delta of rank r is `up @ down`. QR of both factors leaves a core of r x r, whose singular values
are the delta's own: the cost is O((out + in) r^2), and no matrix of the layer's size is formed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .delta import Delta, Vector
from .formats.metadata import METHOD
from .truncation import Truncation


def truncated(vector: Vector, rank: int = 0, keep_energy: float = 1.0) -> tuple[Vector, Truncation]:
    """The vector with the smallest singular values of its deltas left out, and what that loses.

    By Eckart and Young (1936) no other deltas of these ranks are nearer. Works in float32; what is
    no delta (`diffs`) stays as it is.

    Args:
        rank: the most a module may have; 0 for no such limit.
        keep_energy: share of all modules' energy together to keep, above 0 to 1. It is reached with
            the fewest ranks, for one threshold holds for the singular values of every module. At 1
            only ranks that carry nothing are left out.

    Raises:
        ValueError: rank is negative, keep_energy out of range, or there is no delta.
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
        enough = (part.values.double() >= threshold) & (part.values > part.noise)
        needed = max(1, int(enough.sum()))
        kept = min(needed, rank or needed)
        deltas[name] = part.cut(kept)
        ranks[name] = vector.deltas[name].rank, kept
        energy = part.values.double().square()
        energies[name] = float(energy[kept:].sum()), float(energy.sum())
    loss = Truncation(energies, ranks)
    asked = f"svd, rank {rank}, keep_energy {keep_energy:.12g}"
    metadata = {**vector.metadata, METHOD: f"{asked}, relative error {loss.error:.2e}"}
    return replace(vector, deltas=deltas, metadata=metadata), loss


@dataclass(frozen=True)
class Decomposed:
    """`left @ diag(values) @ right` is the delta as a matrix, scale included."""

    left: Tensor
    values: Tensor
    right: Tensor
    shape: tuple[int, ...]

    @property
    def noise(self) -> float:
        """Singular values below this are rounding: QR leaves up to 2 eps of the largest one where
        there is nothing, whatever the layer's size (measured up to 2560 x 23040)."""
        return 8 * torch.finfo(torch.float32).eps * float(self.values[0])

    def cut(self, rank: int) -> Delta:
        """The first `rank` of them, shared evenly between the factors, which fp16 likes best."""
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
    """The singular value down to which all modules' are kept, for that share of the energy."""
    if keep_energy == 1:
        return 0.0
    ordered = torch.cat(values).double().sort(descending=True).values
    energy = ordered.square().cumsum(0)
    # The last one that is needed; where several modules have the same, all of them stay.
    return float(ordered[int(torch.searchsorted(energy, keep_energy * energy[-1]))])
