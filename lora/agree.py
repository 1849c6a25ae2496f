"""Checks of vectors before they are merged or applied."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

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


def require_numbers(vector: Vector) -> None:
    """Raises ValueError if a tensor of the vector contains NaN or infinity. A model with it draws
    black pictures (bmaltais/kohya_ss #1986)."""
    damaged = sorted(
        name for name, tensors in _tensors(vector).items() if not all(map(_finite, tensors))
    )
    if damaged:
        raise ValueError(
            f"{vector.source} contains NaN or infinity in {len(damaged)} of its "
            f"{len(vector.modules())} modules, such as {damaged[0]}: the file is damaged, or its "
            "training diverged. Use another file, or an earlier one of the same training."
        )


def _tensors(vector: Vector) -> dict[str, list[Tensor]]:
    """The tensors of each module."""
    tensors = {name: delta.factors() for name, delta in vector.deltas.items()}
    for name, parts in vector.opaque.items():
        tensors.setdefault(name, []).extend(parts.values())
    for key, diff in vector.diffs.items():
        tensors.setdefault(key.rpartition(".")[0], []).append(diff)
    return tensors


def _finite(tensor: Tensor) -> bool:
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
        return True
    numbers = tensor.half() if tensor.itemsize == 1 else tensor  # fp8 has no order
    # The quickest: both are NaN if any number is.
    return all(math.isfinite(float(end)) for end in numbers.aminmax())
