"""The type of a rule, and the steps that several rules share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """A way to merge several changes of a weight into one.

    Attributes:
        name: as users see it.
        reference: the paper.
        says: what the rule does, for the tooltip.
        merge: (changes, density, generator) -> the merged change, in the shape of the weight. The
            changes [vectors, *shape of the weight] are weighted and in float32; density is above 0
            to 1; the generator is on the CPU.
    """

    name: str
    reference: str
    says: str
    merge: Callable[[Tensor, float, torch.Generator], Tensor]


def largest(changes: Tensor, density: float) -> Tensor:
    """The changes with only their largest values, a share of `density`. Equal values all stay."""
    magnitudes = changes.flatten(1).abs()
    count = max(1, round(density * magnitudes.shape[1]))
    least = magnitudes.kthvalue(magnitudes.shape[1] - count + 1, dim=1).values
    return changes.where(changes.abs() >= least.view(-1, *[1] * (changes.dim() - 1)), 0)


def drawn(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    """Uniform random numbers from 0 to 1, the same on every device."""
    return torch.rand(shape, generator=generator).to(device)


def consensus(changes: Tensor) -> Tensor:
    """The mean of the values that agree with the sign of their sum, position by position. Zeros do
    not count (TIES, arXiv 2306.01708, section 4, steps 2 and 3)."""
    agreeing = torch.where(changes.sign() == changes.sum(0).sign(), changes, 0)
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)
