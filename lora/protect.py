"""Keeping a style out of the way of the acceleration it is added to.

Where a style changes what a layer does to the very directions that the acceleration works on, the
sum is no longer the acceleration, and pictures of few steps break. The null-space projection of
NP-LoRA (arXiv 2511.11051, section 4) takes that part of the style away, as far as one wants.
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
    require_sum(style)
    style, acceleration = in_one_spelling([style, acceleration])
    require_one_architecture((vector.source, vector.shapes) for vector in (style, acceleration))
    deltas, taken, whole, shared = {}, 0.0, 0.0, 0
    for name, delta in style.deltas.items():
        delta = delta.plain()
        before = delta.inner(delta)
        whole += before
        if name in acceleration.deltas:
            shared += 1
            both = style, acceleration
            require_one_shape(name, [(vector, vector.deltas[name].shape) for vector in both])
            require_finite(name, both)
            removed = _removed(delta, acceleration.deltas[name], share)
            delta = replace(delta, down=delta.down.float() - removed)
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


def _removed(plain: Delta, other: Delta, share: float) -> Tensor:
    """The part of the down factor that lies in the main directions, times the share."""
    parts = decomposed(other)
    energy = parts.values.double().square().cumsum(0)
    # An acceleration of zeros has no directions.
    count = int(torch.searchsorted(energy, ENERGY * energy[-1])) + 1 if energy[-1] else 0
    main = parts.right[:count]
    rows = plain.down.float().flatten(1)
    return (share * (rows @ main.T) @ main).reshape(plain.down.shape)
