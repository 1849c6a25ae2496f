"""The methods of combining vectors, by name, and the settings that each of them accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from .combine import elementwise, summed
from .compare import Grams
from .delta import Vector
from .elementwise.table import RULES
from .reduce import truncated

METHODS = ("exact", "svd", *RULES)


@dataclass(frozen=True)
class Settings:
    """How to combine vectors.

    Attributes:
        method: one of METHODS.
        rank: the highest rank of a module. 0 means no limit for svd, and the sum of the ranks for
            the rules.
        keep_energy: for svd, the share of the energy to keep, above 0 to 1.
        max_error: for svd, the relative error to allow, below 1; 0 sets no limit.
        density: for the rules, the share of each vector's values to keep, above 0 to 1.
        seed: for the rules that drop values at random.

    Raises:
        ValueError: the method does not support a setting.
    """

    method: str
    rank: int = 0
    keep_energy: float = 1.0
    max_error: float = 0.0
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        limits = f"keep_energy {self.keep_energy:g} and max_error {self.max_error:g}"
        is_limited = self.keep_energy != 1 or self.max_error != 0
        if self.method == "exact" and (self.rank != 0 or is_limited):
            raise ValueError(
                f"The method exact keeps every rank, but the settings are rank {self.rank}, "
                f"{limits}; choose svd, or set rank to 0, keep_energy to 1 and max_error to 0."
            )
        if self.method in RULES and is_limited:
            raise ValueError(
                f"The method {self.method} reduces only to a rank, but the settings are {limits}; "
                "set them to 1 and 0."
            )


def combine(
    vectors: Sequence[Vector],
    weights: Sequence[float],
    settings: Settings,
    device: torch.device,
    watch: Callable[[list[str]], Iterable[str]] = iter,
) -> tuple[Vector, str, Grams]:
    """The vectors combined, a report for users, and the inner products of those whose weight is not
    0. device, watch: see `elementwise`.

    Raises:
        ValueError: the vectors cannot be added, or a setting is out of range.
    """
    rank, density, seed = settings.rank, settings.density, settings.seed
    if rule := RULES.get(settings.method):
        grams = summed(vectors, weights)[2]  # drop the sum, which would only take memory
        merged = elementwise(vectors, weights, rule, density, rank, seed, device, watch)
        return *merged, grams
    total, report, grams = summed(vectors, weights)
    if settings.method == "exact":
        return total, report, grams
    # The kept energy and the squared error add up to the energy of the sum.
    shares = {settings.keep_energy, 1 - settings.max_error**2} - {1.0}
    reduced, truncation = truncated(total, rank, max(shares, default=1.0))
    return reduced, f"{report}\n{truncation}", grams
