"""Keeps a style LoRA from disturbing an acceleration.

Few-step pictures break where a style acts on the main directions of the acceleration. The
null-space projection of NP-LoRA (arXiv 2511.11051, section 4) removes that part of the style, or a
share of it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .agree import require_finite, require_one_shape, require_sum
from .architecture import require_one_architecture
from .delta import Delta, Vector
from .formats.metadata import recipe
from .formats.spelling import in_one_spelling
from .reduce import decomposed

ENERGY = 0.9  # the main directions are the fewest that hold this share of a layer's squared norm


def protected(style: Vector, acceleration: Vector, share: float) -> tuple[Vector, str]:
    """The style without `share` of its effect on the acceleration's main directions, and a report.

    A layer D of the style becomes `D (I - share V' V)`. The rows of V are the right singular
    vectors of the acceleration's delta in that layer. This changes only the down factors, so the
    ranks stay. Layers that only the style has stay as they are. Layers that either vector changes
    without factors stay too; the report counts these.

    Raises:
        ValueError: share is not within 0 to 1, the style cannot be added (DoRA, OFT, GLoRA), the
            two were made for different architectures, or a value is not finite.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, found {share:g}.")
    require_sum(style)
    style, acceleration = both = in_one_spelling([style, acceleration])
    require_one_architecture((vector.source, vector.shapes) for vector in both)
    deltas, removed_energy, energy, shared = {}, 0.0, 0.0, 0
    for name, delta in style.deltas.items():
        delta = delta.plain()
        before = delta.inner(delta)
        energy += before
        if name in acceleration.deltas:
            shared += 1
            require_one_shape(name, [(vector, vector.deltas[name].shape) for vector in both])
            require_finite(name, both)
            removed = _removed(delta, acceleration.deltas[name], share)
            delta = replace(delta, down=delta.down.float() - removed)
            removed_energy += before - delta.inner(delta)
        deltas[name] = delta
    percent = 100 * removed_energy / energy if energy else 0.0
    method = f"protected from {acceleration.source}, share {share:g}"
    # The weight 0 records the acceleration's hash without adding the acceleration.
    metadata = {**style.metadata, **recipe([(style, 1.0), (acceleration, 0.0)], method)}
    source = f"{style.source}, protected"
    result = replace(style, deltas=deltas, metadata=metadata, source=source, sha256="")
    report = (
        f"{percent:.2f} % of the energy of {style.source} removed, in {shared} of "
        f"{len(style.deltas)} modules that {acceleration.source} changes too."
    )
    return result, "\n".join([report, *_not_protected(style, acceleration)])


def _not_protected(style: Vector, acceleration: Vector) -> list[str]:
    """Sentences about the layers that both vectors change, but at least one without factors."""
    without_factors = _full_differences(acceleration) | acceleration.opaque.keys()
    lines = []
    if count := len(without_factors & style.deltas.keys()):
        kinds = ["full differences"] if _full_differences(acceleration) else []
        kinds += [acceleration.opaque_kinds] if acceleration.opaque else []
        lines.append(
            f"In {count} modules, {acceleration.source} holds {' and '.join(kinds)} instead of "
            "factors, so nothing was removed there."
        )
    if count := len(_full_differences(style) & (without_factors | acceleration.deltas.keys())):
        lines.append(
            f"In {count} modules, {style.source} holds full differences instead of factors, which "
            "stay as they are."
        )
    return lines


def _full_differences(vector: Vector) -> set[str]:
    """The modules whose full matrix has a difference in the vector."""
    return {
        key.removesuffix(".diff")
        for key, diff in vector.diffs.items()
        if key.endswith(".diff") and diff.dim() > 1
    }


def _removed(plain: Delta, other: Delta, share: float) -> Tensor:
    """The part of the down factor in the main directions of the other delta, times the share."""
    parts = decomposed(other)
    energy = parts.values.double().square().cumsum(0)
    # An acceleration of zeros has no main directions.
    count = int(torch.searchsorted(energy, ENERGY * energy[-1])) + 1 if energy[-1] else 0
    main = parts.right[:count]
    rows = plain.down.float().flatten(1)
    return (share * (rows @ main.T) @ main).reshape(plain.down.shape)
