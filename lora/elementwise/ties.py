"""TIES: trim, elect a sign, average what agrees (arXiv 2306.01708, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from .rule import Rule, consensus, largest


def ties(changes: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """The mean of the largest values that agree in sign. The generator is not used."""
    return consensus(largest(changes, density))


TIES = Rule(
    "ties", "arXiv 2306.01708",
    "the mean of each vector's largest values, where they agree in sign", ties,
)  # fmt: skip
