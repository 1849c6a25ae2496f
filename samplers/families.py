"""Kinds of acceleration LoRA and how each wants to be sampled. The family rides on the MODEL."""

from __future__ import annotations

from dataclasses import dataclass

from . import timesteps as ts

ORIGIN_STEPS = 50  # points of the grid that LCMs and their descendants are distilled on


@dataclass(frozen=True)
class Family:
    """How one kind of few-step model was distilled, and so how it is sampled.

    eta: share of fresh noise between steps, 1 is all of it (see samplers/lcm.py).
    boundary: whether its own scheduler has the consistency function around x0.
    origin_steps: points of the distillation grid, of which a run takes some; None where it takes
        trailing ones of all timesteps.
    single: where a run of one step is, for a family that has a model of its own for it.
    """

    name: str
    eta: float
    boundary: bool = False
    origin_steps: int | None = None
    single: int | None = None

    def timesteps(self, steps: int, strength: float = 1.0, T: int = 1000) -> list[int]:  # noqa: N803
        """The timesteps of a run, descending and always `steps` many, at every number of them.

        strength in (0, 1]: the first is the last point of the grid below strength * T, and the
        others divide what is below it as they do at 1. Raises ValueError when they do not fit.
        """
        if steps == 1 and self.single is not None:
            return [min(self.single, ts.trailing(1, strength, T)[0])]
        if self.origin_steps is not None:
            return ts.timesteps(steps, strength, self.origin_steps, T)
        return ts.trailing(steps, strength, T)

    def grid(self, T: int = 1000) -> list[int]:  # noqa: N803
        """All timesteps that a run may be taken from, ascending."""
        return ts.grid(T if self.origin_steps is None else self.origin_steps, T=T)


# What the authors' own examples set. Where these end at timestep 0 and leave its noise, a sigma of
# 0.03, in the picture (TCD's scheduler, and DDIM as SDXL configures it), we end at the clean x0.
FAMILIES = {
    family.name: family
    for family in (
        # arXiv 2311.05556: LCMScheduler.
        Family("lcm", eta=1.0, boundary=True, origin_steps=ORIGIN_STEPS),
        # arXiv 2405.14867: LCMScheduler at 999, 749, 499, 249; the model for one step at 399.
        Family("dmd2", eta=1.0, boundary=True, single=399),
        # arXiv 2402.19159: TCDScheduler, whose gamma is 0.3.
        Family("tcd", eta=0.3, origin_steps=ORIGIN_STEPS),
        # arXiv 2404.13686: DDIM, trailing, for the LoRAs of 2 to 12 steps.
        Family("hyper-sd", eta=0.0),
        # Its LoRA of one step serves 1 to 8 steps of TCDScheduler with gamma 1.
        Family("hyper-sd-1step", eta=1.0, origin_steps=ORIGIN_STEPS),
        # arXiv 2405.18407: DDIM, trailing. Its "LCM-like" LoRA is sampled as an LCM.
        Family("pcm", eta=0.0),
        # arXiv 2402.13929: Euler, trailing, which is DDIM in another scale.
        Family("lightning", eta=0.0),
        # Ours, training/objectives/phased.py: from edge to edge of its phases.
        Family("phased", eta=0.0, origin_steps=ORIGIN_STEPS),
    )
}
