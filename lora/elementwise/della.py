"""DELLA: drop small values more often, rescale, elect a sign (arXiv 2406.11617, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from .rule import Rule, consensus, drawn

SPREAD = 0.3  # the paper's epsilon: between the drop rates of a row's largest and smallest value


def della(changes: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """The mean of the values that agree in sign, after MAGPRUNE has dropped and rescaled values.

    In each row (one output of the layer), the rate at which values are kept rises evenly with their
    magnitude. It is `density` on average and rises by SPREAD, or less if it would leave 0 to 1.
    """
    rows = changes.reshape(changes.shape[0], changes.shape[1], -1)
    columns = rows.shape[2]
    places = rows.abs().argsort(dim=2).argsort(dim=2)  # 0 is the row's smallest
    spread = min(SPREAD, 2 * density, 2 * (1 - density))
    rates = density + spread * ((places + 0.5) / columns - 0.5)
    kept = drawn(rows.shape, generator, rows.device) < rates
    return consensus(torch.where(kept, rows / rates, 0)).view(changes.shape[1:])


DELLA = Rule(
    "della", "arXiv 2406.11617",
    "like dare, but large values stay more often; then the mean of those that agree in sign",
    della,
)  # fmt: skip
