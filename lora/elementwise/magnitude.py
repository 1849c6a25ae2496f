"""Magnitude pruning: keep only the largest values (arXiv 1506.02626, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from .rule import Rule, largest


def magnitude(changes: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """The sum of the largest values of each change. The generator is not used."""
    return largest(changes, density).sum(0)


MAGNITUDE = Rule(
    "magnitude", "arXiv 1506.02626",
    "the sum of each vector's largest values", magnitude,
)  # fmt: skip
