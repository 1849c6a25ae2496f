"""Keeping a style out of the way of the acceleration it is added to.

Where a style changes what a layer does to the very directions that the acceleration works on, the
sum is no longer the acceleration, and pictures of few steps break. The null-space projection of
NP-LoRA (arXiv 2511.11051, section 4) takes that part of the style away, as far as one wants.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .delta import Delta, Vector
from .family import family_of, require_one_family
from .metadata import recipe
from .reduce import decomposed

ENERGY = 0.9  # main directions are the fewest that hold this share of a layer's squared norm


def protected(style: Vector, acceleration: Vector, share: float) -> tuple[Vector, str]:
    """The style with `share` of what it does to the acceleration's main directions taken away.

    A layer of the style becomes `D (I - share V' V)`, where the rows of V are the right singular
    vectors of the acceleration's delta there. Works on the factors, so the ranks stay; layers that
    only the style has stay as they are, and so do those that one of the two holds without factors,
    which the report counts.

    Raises:
        ValueError: share is not within 0 to 1, the style is no sum (DoRA, OFT, GLoRA), the two were
            made for different base models, or a number of them is not finite.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, found {share:g}.")
    if style.opaque:
        raise ValueError(
            f"{style.source} holds {style.opaque_kinds} weights. What they do depends on the "
            "weights they are added to, so that no part of it can be taken away. Apply it alone, "
            "with Apply LoRA Vector, and add the acceleration after it."
        )
    require_one_family((vector.source, vector.shapes) for vector in (style, acceleration))
    deltas, taken, whole, shared = {}, 0.0, 0.0, 0
    for name, delta in style.deltas.items():
        whole += delta.inner(delta)
        if name in acceleration.deltas:
            shared += 1
            _require_one_shape(name, style, acceleration)
            _require_finite(name, style, acceleration)
            plain = delta.plain()
            removed = _removed(plain, acceleration.deltas[name], share)
            before = delta.inner(delta)
            delta = replace(plain, down=plain.down.float() - removed)
            taken += before - delta.inner(delta)
        deltas[name] = delta
    percent = 100 * taken / whole if whole else 0.0
    method = f"protected from {acceleration.source}, share {share:g}"
    # The acceleration is there for its hash; nothing of it is added.
    metadata = {**style.metadata, **recipe([(style, 1.0), (acceleration, 0.0)], method)}
    source = f"{style.source}, protected"
    made = replace(style, deltas=deltas, metadata=metadata, source=source, sha256="")
    report = (
        f"{percent:.2f} % of the energy of {style.source} taken away, in {shared} of "
        f"{len(style.deltas)} modules that {acceleration.source} changes too."
    )
    return made, "\n".join([report, *_passed_over(style, acceleration)])


def _passed_over(style: Vector, acceleration: Vector) -> list[str]:
    """Where both change a layer and nothing was taken away, for lack of factors, in words."""
    without = _whole(acceleration) | acceleration.opaque.keys()
    told = []
    if count := len(without & style.deltas.keys()):
        kinds = ["whole differences"] if _whole(acceleration) else []
        kinds += [acceleration.opaque_kinds] if acceleration.opaque else []
        told.append(
            f"In {count} modules {acceleration.source} holds {' and '.join(kinds)}, not factors, "
            "and nothing was taken away for these."
        )
    if count := len(_whole(style) & (without | acceleration.deltas.keys())):
        told.append(
            f"In {count} modules {style.source} holds whole differences, not factors, which stay "
            "as they are."
        )
    return told


def _whole(vector: Vector) -> set[str]:
    """The modules of which the vector holds the change of a whole matrix."""
    return {k.removesuffix(".diff") for k, diff in vector.diffs.items()
            if k.endswith(".diff") and diff.dim() > 1}  # fmt: skip


def _require_one_shape(name: str, style: Vector, acceleration: Vector) -> None:
    # Compared as matrices: 1x1 convolutions are kept as [out, in] by some tools.
    shapes = [vector.deltas[name].shape for vector in (style, acceleration)]
    if len({(shape[0], math.prod(shape[1:])) for shape in shapes}) > 1:
        found = " and ".join(
            f"{list(shape)} in {vector.source} (made for "
            f"{family_of(vector.shapes) or 'an unknown base model'})"
            for shape, vector in zip(shapes, (style, acceleration), strict=True)
        )
        raise ValueError(f"{name} is {found}; they were made for different base models.")


def _require_finite(name: str, *vectors: Vector) -> None:
    for vector in vectors:
        if not math.isfinite(vector.deltas[name].inner(vector.deltas[name])):
            raise ValueError(
                f"{vector.source} has numbers in {name} that are not finite: the file is broken or "
                "its training was."
            )


def _removed(plain: Delta, other: Delta, share: float) -> Tensor:
    """The part of the down factor that lies in the main directions, times the share."""
    parts = decomposed(other)
    energy = parts.values.double().square().cumsum(0)
    # An acceleration of zeros has no directions.
    count = int(torch.searchsorted(energy, ENERGY * energy[-1])) + 1 if energy[-1] else 0
    main = parts.right[:count]
    rows = plain.down.float().flatten(1)
    return (share * (rows @ main.T) @ main).reshape(plain.down.shape)
