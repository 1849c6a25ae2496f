"""The angles between the vectors of a sum, and how much each of them changes in each block."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from .blocks import block_of, place_of
from .delta import Delta


class Grams:
    """The inner products of the terms of a sum, by places and blocks of the model.

    They follow from the sum's stacked factors U = [U_1 U_2 ...] and D: the elementwise product of
    U'U and DD', added up over the rows of term i and the columns of term j, is <U_i D_i, U_j D_j>.
    """

    def __init__(self, terms: int):
        self.terms = terms
        self.by_block: dict[tuple[str, str], Tensor] = {}

    def add(
        self, module: str, stacked: Delta, holders: Sequence[int], ranks: Sequence[int]
    ) -> Tensor:
        """Adds a module. -> the inner products of the terms in this module, [terms, terms].

        module: its name, as `slices.own_paths` gives it. holders, ranks: the indices of the terms
        that have the module, and their ranks there.
        """
        up, down = stacked.up.flatten(1), stacked.down.flatten(1)
        products = (up.T @ up).double() * (down @ down.T).double()
        # owners[row, term] is 1 if this row of the factors belongs to the term.
        owners = products.new_zeros(len(products), self.terms)
        begin = 0
        for term, rank in zip(holders, ranks, strict=True):
            owners[begin : begin + rank, term] = 1
            begin += rank
        sums = owners.T @ products @ owners
        part = place_of(module), block_of(module)
        self.by_block[part] = self.by_block.get(part, torch.zeros_like(sums)) + sums
        return sums

    @property
    def by_place(self) -> dict[str, Tensor]:
        places: dict[str, Tensor] = {}
        for (place, _), gram in self.by_block.items():
            places[place] = places[place] + gram if place in places else gram
        return places

    def __str__(self) -> str:
        """A line for each pair of terms with the cosine of the angle between them."""
        places = self.by_place
        if not places:
            return ""
        total = reduce(torch.add, places.values())
        lines = []
        for i in range(self.terms):
            for j in range(i + 1, self.terms):
                parts = ", ".join(
                    f"{place} {cosine(gram, i, j):+.3f}" for place, gram in places.items()
                )
                lines.append(f"Cosine of {i + 1} and {j + 1}: {cosine(total, i, j):+.3f} ({parts})")
        return "\n".join(lines)


def cosine(gram: Tensor, i: int, j: int) -> float:
    """The cosine of the angle between terms i and j; 0 if one of them is 0."""
    norms = float(gram[i, i] * gram[j, j]) ** 0.5
    return float(gram[i, j]) / norms if norms else 0.0
