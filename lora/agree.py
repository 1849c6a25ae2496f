"""Checks of vectors before they are merged."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .architecture import architecture_of
from .delta import Vector, as_matrix


def require_sum(vector: Vector) -> None:
    """Raises ValueError if the vector has modules that cannot be added (DoRA, OFT, GLoRA)."""
    if vector.opaque:
        raise ValueError(
            f"{vector.source} holds {vector.opaque_kinds} weights. Their change depends on the "
            "weights of the model, so they cannot be added to other vectors. Apply this file alone "
            "with Apply LoRA Vector, and apply the others after it."
        )


def require_one_shape(name: str, changes: Sequence[tuple[Vector, Sequence[int]]]) -> None:
    """Raises ValueError if the changes of one weight have different shapes.

    Shapes are compared as matrices, because some tools save 1x1 convolutions as [out, in].
    """
    if len({as_matrix(shape) for _, shape in changes}) > 1:
        listed = ", ".join(
            f"{list(shape)} in {vector.source}"
            + (f" (made for {kind})" if (kind := architecture_of(vector.shapes)) else "")
            for vector, shape in changes
        )
        raise ValueError(
            f"The module {name} has different shapes: {listed}. These LoRAs were made for "
            "different base models and cannot be added."
        )


def require_finite(name: str, vectors: Sequence[Vector]) -> None:
    """Raises ValueError if a vector's delta of the module contains NaN or infinity."""
    for vector in vectors:
        delta = vector.deltas[name]
        # The inner product is cheap, but it can overflow although every value is finite.
        if not math.isfinite(delta.inner(delta)) and not delta.matrix().isfinite().all():
            raise ValueError(
                f"{vector.source} contains NaN or infinity in {name}: the file is damaged, or its "
                "training diverged. Leave this LoRA out, or download it again."
            )
