"""DARE: drop at random and rescale (arXiv 2311.03099, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from .rule import Rule, drawn


def dare(changes: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """The sum of the changes after random values are dropped. The kept share is `density`, and the
    kept values are divided by it, so the mean of the sum stays the same."""
    kept = drawn(changes.shape, generator, changes.device) < density
    return torch.where(kept, changes / density, 0).sum(0)


DARE = Rule(
    "dare", "arXiv 2311.03099",
    "the sum of a random selection of each vector's values, scaled up to make up for the dropped "
    "ones",
    dare,
)  # fmt: skip
