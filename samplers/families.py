"""The families of few-step models, and how each is sampled. A MODEL carries its family along."""

from __future__ import annotations

from dataclasses import dataclass

from . import timesteps as ts

ORIGIN_STEPS = 50  # points of the grid that LCMs and their descendants are distilled on


@dataclass(frozen=True)
class Family:
    """How one kind of few-step model was distilled, and therefore how it is sampled.

    Attributes:
        eta: share of fresh noise between steps; 1 means that all noise is fresh (see lcm.py).
        boundary: whether its own scheduler applies the consistency function to x0.
        origin_steps: the number of points in the distillation grid, from which a run takes some.
            None if a run takes trailing timesteps from all of them.
        single: the timestep of a run of one step, if the family has a separate model for that.
    """

    name: str
    eta: float
    boundary: bool = False
    origin_steps: int | None = None
    single: int | None = None

    def timesteps(self, steps: int, strength: float = 1.0, T: int = 1000) -> list[int]:  # noqa: N803
        """The `steps` timesteps of a run, descending.

        strength in (0, 1]: the first timestep is the last point of the grid below strength * T. The
        others divide the range below it in the same way as at strength 1.

        Raises:
            ValueError: there are fewer timesteps than `steps`.
        """
        return ts.of_family(steps, strength, self.origin_steps, self.single, T)

    def grid(self, T: int = 1000) -> list[int]:  # noqa: N803
        """All timesteps that a run can take, ascending."""
        return ts.grid(T if self.origin_steps is None else self.origin_steps, T=T)


DEFAULT = "lcm"  # the family of a LoRA or a MODEL that names none
# The settings of the authors' own examples, with one difference. TCD's scheduler, and DDIM as SDXL
# configures it, end at timestep 0 and leave its noise (a sigma of 0.03) in the picture. We end at
# the clean x0.
FAMILIES = {
    family.name: family
    for family in (
        # arXiv 2311.05556: LCMScheduler.
        Family("lcm", eta=1.0, boundary=True, origin_steps=ORIGIN_STEPS),
        # arXiv 2405.14867: LCMScheduler at 999, 749, 499, 249; the one-step model starts at 399.
        Family("dmd2", eta=1.0, boundary=True, single=399),
        # arXiv 2402.19159: TCDScheduler, whose gamma is 0.3.
        Family("tcd", eta=0.3, origin_steps=ORIGIN_STEPS),
        # arXiv 2404.13686: DDIM, trailing, for the LoRAs of 2 to 12 steps.
        Family("hyper-sd", eta=0.0),
        # Its one-step LoRA works for 1 to 8 steps of TCDScheduler with gamma 1.
        Family("hyper-sd-1step", eta=1.0, origin_steps=ORIGIN_STEPS),
        # arXiv 2405.18407: DDIM, trailing. Its "LCM-like" LoRA is sampled as an LCM.
        Family("pcm", eta=0.0),
        # arXiv 2402.13929: Euler, trailing, which equals DDIM.
        Family("lightning", eta=0.0),
        # Trained by this pack (arXiv 2405.18407): from edge to edge of its phases.
        Family("phased", eta=0.0, origin_steps=ORIGIN_STEPS),
    )
}
