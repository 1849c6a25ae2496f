"""What vectors must have in common, and each by itself, before one is worked into another."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .delta import Vector, as_matrix
from .family import family_of


def require_sum(vector: Vector) -> None:
    """Raises ValueError where the vector holds what is more than a sum (DoRA, OFT, GLoRA)."""
    if vector.opaque:
        raise ValueError(
            f"{vector.source} holds {vector.opaque_kinds} weights. What they do depends on the "
            "weights they are added to, so that no sum of vectors is their sum. Apply it alone, "
            "with Apply LoRA Vector, and add the others after it."
        )


def require_one_shape(name: str, changes: Sequence[tuple[Vector, Sequence[int]]]) -> None:
    """Raises ValueError where the changes of one weight, each of a vector, have different shapes.

    Compared as matrices, as some tools keep 1x1 convolutions as [out, in].
    """
    if len({as_matrix(shape) for _, shape in changes}) > 1:
        found = ", ".join(
            f"{list(shape)} in {vector.source}"
            + (f" (made for {kind})" if (kind := family_of(vector.shapes)) else "")
            for vector, shape in changes
        )
        raise ValueError(
            f"The module {name} has different shapes: {found}. These LoRAs were made for different "
            "base models and cannot be added."
        )


def require_finite(name: str, vectors: Sequence[Vector]) -> None:
    """Raises ValueError where a vector's delta of the module holds numbers that are not finite."""
    for vector in vectors:
        delta = vector.deltas[name]
        # The inner product is cheap; of large numbers it can be infinite where they are not.
        if not math.isfinite(delta.inner(delta)) and not delta.matrix().isfinite().all():
            raise ValueError(
                f"{vector.source} has numbers in {name} that are not finite, so that no sum of it "
                "is: the file is broken or its training was. Leave it out."
            )
