"""Kinds of acceleration LoRA and how each wants to be sampled. The family rides on the MODEL."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """How one kind of few-step model was distilled.

    origin_steps: points of the distillation grid, of which a few-step schedule takes some.
    eta: share of fresh noise between steps, 1 is all of it (see samplers/lcm.py).
    """

    name: str
    origin_steps: int
    eta: float


FAMILIES = {
    family.name: family
    for family in (
        Family("lcm", origin_steps=50, eta=1.0),  # arXiv 2311.05556
    )
}
