"""Keeping a style out of the way of the acceleration it is added to.

Where a style changes what a layer does to the very directions that the acceleration works on, the
sum is no longer the acceleration, and pictures of few steps break. The null-space projection of
NP-LoRA (arXiv 2511.11051, section 4) takes that part of the style away, as far as one wants.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .delta import Delta, Vector
from .metadata import recipe
from .reduce import decomposed

ENERGY = 0.9  # main directions are the fewest that hold this share of a layer's squared norm


def protected(style: Vector, acceleration: Vector, share: float) -> tuple[Vector, str]:
    """The style with `share` of what it does to the acceleration's main directions taken away.

    A layer of the style becomes `D (I - share V' V)`, where the rows of V are the right singular
    vectors of the acceleration's delta there. Works on the factors, so the ranks stay; layers that
    only the style has stay as they are.

    Raises:
        ValueError: share is not within 0 to 1, or a layer has different shapes in the two.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, found {share:g}.")
    deltas, taken, whole, shared = {}, 0.0, 0.0, 0
    for name, delta in style.deltas.items():
        whole += delta.inner(delta)
        if name in acceleration.deltas:
            shared += 1
            plain = delta.plain()
            removed = _removed(name, plain, acceleration.deltas[name], share)
            before = delta.inner(delta)
            delta = replace(plain, down=plain.down.float() - removed)
            taken += before - delta.inner(delta)
        deltas[name] = delta
    percent = 100 * taken / whole if whole else 0.0
    method = f"protected from {acceleration.source}, share {share:g}"
    metadata = {**style.metadata, **recipe([(style, 1.0)], method)}
    made = replace(style, deltas=deltas, metadata=metadata, source=f"{style.source}, protected")
    return made, (
        f"{percent:.2f} % of the energy of {style.source} taken away, in {shared} of "
        f"{len(style.deltas)} modules that {acceleration.source} changes too."
    )


def _removed(name: str, plain: Delta, other: Delta, share: float) -> Tensor:
    """The part of the down factor that lies in the main directions, times the share."""
    parts = decomposed(other)
    rows = plain.down.float().flatten(1)
    if rows.shape[1] != parts.right.shape[1]:
        raise ValueError(
            f"{name} has {rows.shape[1]} inputs in the style and {parts.right.shape[1]} in the "
            "acceleration; they were made for different base models."
        )
    energy = parts.values.double().square().cumsum(0)
    count = int(torch.searchsorted(energy, ENERGY * energy[-1])) + 1
    main = parts.right[:count]
    return (share * (rows @ main.T) @ main).reshape(plain.down.shape)
