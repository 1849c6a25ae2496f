"""DARE: drop at random and rescale (arXiv 2311.03099, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .rule import Rule, drawn


def dare(changes: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """The sum of the changes, of each of which a random `density` is kept and divided by it, so
    that the sum is what it was on average."""
    kept = drawn(changes.shape, generator, changes.device) < density
    return torch.where(kept, changes / density, 0).sum(0)


DARE = Rule(
    "dare", "arXiv 2311.03099",
    "the sum of a random selection of each vector's values, scaled up to make up for the dropped "
    "ones",
    dare,
)  # fmt: skip
