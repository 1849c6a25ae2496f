"""What a rule is, and what several of them do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """A way to make one change of a weight out of several.

    Attributes:
        name: as users choose it.
        reference: the paper.
        says: one sentence for people.
        merge: (changes [vectors, *weight's shape], each times its weight already; density above 0
            to 1; a CPU generator) -> the merged change, of the weight's shape. Float32.
    """

    name: str
    reference: str
    says: str
    merge: Callable[[Tensor, float, torch.Generator], Tensor]


def largest(changes: Tensor, density: float) -> Tensor:
    """Each change with all but its `density` largest numbers set to 0; of equal ones all stay."""
    magnitudes = changes.flatten(1).abs()
    count = max(1, round(density * magnitudes.shape[1]))
    least = magnitudes.kthvalue(magnitudes.shape[1] - count + 1, dim=1).values
    return changes.where(changes.abs() >= least.view(-1, *[1] * (changes.dim() - 1)), 0)


def drawn(shape: torch.Size, generator: torch.Generator, device: torch.device) -> Tensor:
    """Uniform numbers in 0 to 1, the same on every device."""
    return torch.rand(shape, generator=generator).to(device)


def consensus(changes: Tensor) -> Tensor:
    """The mean of those that agree with the sign of the sum, number by number; zeros do not count
    (TIES, arXiv 2306.01708, section 4, steps 2 and 3)."""
    agreeing = torch.where(changes.sign() == changes.sum(0).sign(), changes, 0)
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)
