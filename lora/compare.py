"""How the vectors of a sum lie to each other: along, at right angles, or against each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .delta import Delta


class Grams:
    """Inner products of the terms of a sum, by parts of the model.

    They come out of the stacked factors of the sum itself: of `U D` with U = [U_1 U_2 ...], the
    product of U'U and DD', number by number, adds up to <U_i D_i, U_j D_j> over the blocks i, j.
    """

    def __init__(self, terms: int):
        self.terms = terms
        self.of: dict[str, torch.Tensor] = {}

    def add(
        self, place: str, stacked: Delta, holders: Sequence[int], ranks: Sequence[int]
    ) -> Tensor:  # fmt: skip
        """Counts a module in, which the terms `holders` have, with these ranks; -> its terms' inner
        products [terms, terms]."""
        up, down = stacked.up.flatten(1), stacked.down.flatten(1)
        products = (up.T @ up).double() * (down @ down.T).double()
        # Of which term each row of the factors is, as ones and zeros.
        owners = products.new_zeros(len(products), self.terms)
        begin = 0
        for term, rank in zip(holders, ranks, strict=True):
            owners[begin : begin + rank, term] = 1
            begin += rank
        sums = owners.T @ products @ owners
        self.of[place] = self.of[place] + sums if place in self.of else sums
        return sums

    def __str__(self) -> str:
        """A line for each pair of terms: the cosine of the angle between them, as weighted."""
        if not self.of:
            return ""
        whole = sum(self.of.values())
        lines = []
        for i in range(self.terms):
            for j in range(i + 1, self.terms):
                parts = ", ".join(
                    f"{place} {_cosine(gram, i, j):+.3f}" for place, gram in self.of.items()
                )
                lines.append(
                    f"Cosine of {i + 1} and {j + 1}: {_cosine(whole, i, j):+.3f} ({parts})"
                )
        return "\n".join(lines)


def _cosine(gram: torch.Tensor, i: int, j: int) -> float:
    norms = float(gram[i, i] * gram[j, j]) ** 0.5
    return float(gram[i, j]) / norms if norms else 0.0
