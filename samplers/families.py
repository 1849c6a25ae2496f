"""The families of few-step models, and how each is sampled. A MODEL keeps its family."""

from __future__ import annotations

from dataclasses import dataclass
from math import atan, cos, sin
from typing import Any

from . import timesteps as ts

ORIGIN_STEPS = 50  # points of the grid that LCMs and their descendants are distilled on


@dataclass(frozen=True)
class Family:
    """How one kind of few-step model was distilled, and therefore how it is sampled.

    Attributes:
        eta: share of fresh noise between steps; 1 means that all noise is fresh (see lcm.py).
        boundary: whether its own scheduler applies the consistency function to x0.
        origin_steps: the number of points in the distillation grid that a run chooses from. None if
            a run takes trailing timesteps from all timesteps.
        single: the timestep of a run of one step, if the family has a separate model for that.
        tables, flow: whether the family is for models with a table of timesteps; for flow models.
        shift: of a flow model's sigmas; None keeps the model's own.
        lists: whole runs that the authors give as a flow model's sigmas, each of another length.
        weight: the strength that its LoRA is made for.
        steps: the numbers of steps that it is made for, if its file does not name them.
        cfg: whether it needs guidance, so that a high cfg is right.
        guidance: the value that it is made for, if the network has an input for guidance.
    """

    name: str
    eta: float
    boundary: bool = False
    origin_steps: int | None = None
    single: int | None = None
    tables: bool = True
    flow: bool = False
    shift: float | None = None
    lists: tuple[tuple[float, ...], ...] = ()
    weight: float = 1.0
    steps: tuple[int, ...] = ()
    cfg: bool = False
    guidance: float | None = None

    def timesteps(self, steps: int, strength: float = 1.0, T: int = 1000) -> list[int]:  # noqa: N803
        """The `steps` timesteps of a run, descending.

        strength in (0, 1]: the first timestep is the last point of the grid below strength * T. The
        others divide the range below it in the same way as at strength 1.

        Raises:
            ValueError: there are fewer timesteps than `steps`.
        """
        return ts.of_family(steps, strength, self.origin_steps, self.single, T)

    def times(self, steps: int, strength: float = 1.0) -> list[float]:
        """The `steps` times of a run on a flow model, from 1 (noise) down, before their shift.

        Raises:
            ValueError: the grid has fewer points than `steps`.
        """
        # The grid of a family for both kinds holds only for models with timesteps.
        return ts.times(steps, strength, None if self.tables else self.origin_steps)

    def listed(self, steps: int, strength: float = 1.0) -> list[float] | None:
        """The authors' sigmas of a whole run of `steps`. None if they give none."""
        matches = [sigmas for sigmas in self.lists if len(sigmas) == steps and strength == 1]
        return list(matches[0]) if matches else None

    def grid(self, T: int = 1000) -> list[int]:  # noqa: N803
        """All timesteps that a run can take, ascending."""
        return ts.grid(T if self.origin_steps is None else self.origin_steps, T=T)


DEFAULT = "lcm"  # the family of a LoRA or a MODEL that names none
DEFAULT_FLOW = "flow"  # the same for flow models


def of_flow(name: str, eta: float = 0.0, **settings: Any) -> Family:
    """A family of flow models only."""
    return Family(name, eta, tables=False, flow=True, **settings)


def _rectified(angle: float) -> float:
    """The rectified-flow sigma of a TrigFlow time; TrigFlow's x is cos(t) x0 + sin(t) eps."""
    return sin(angle) / (sin(angle) + cos(angle))


_FLUX2_TURBO = (1.0, 0.6509, 0.4374, 0.2932, 0.1893, 0.1108, 0.0495, 0.00031)
_RCM = tuple(map(_rectified, (atan(80), 1.5, 1.4, 1.0)))
# The settings of the authors' own examples, with one difference. TCD's scheduler, and DDIM as SDXL
# configures it, end at timestep 0 and leave its noise (a sigma of 0.03) in the picture. We end at
# the clean x0.
FAMILIES = {
    family.name: family
    for family in (
        # arXiv 2311.05556: LCMScheduler.
        Family("lcm", eta=1.0, boundary=True, origin_steps=ORIGIN_STEPS, flow=True),
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
        Family("phased", eta=0.0, origin_steps=ORIGIN_STEPS, flow=True),
        # How most few-step flow models are sampled: Euler, trailing, at the model's own shift.
        of_flow(DEFAULT_FLOW),
        # Qwen-Image-Lightning: "we use shift=3 in distillation", Euler, trailing.
        of_flow("qwen-lightning", shift=3.0, steps=(4, 8)),
        # Wuli's Qwen-Image-2512-Turbo-LoRA, as ComfyUI's own workflow for it samples.
        of_flow("qwen-turbo", shift=3.0, steps=(2,)),
        # fal's FLUX.2-dev-Turbo: the list on its card.
        of_flow("flux2-turbo", steps=(8,), lists=(_FLUX2_TURBO,)),
        # FLUX.1-Turbo-Alpha: Euler, trailing.
        of_flow("flux-turbo", steps=(8,), guidance=3.5),
        # arXiv 2404.13686: its card fuses these two at 0.125.
        of_flow("hyper-flux", weight=0.125, steps=(8, 16), guidance=3.5),
        of_flow("hyper-sd3", weight=0.125, steps=(4, 8, 16), cfg=True),
        # arXiv 2405.18407: PCMFMDeterministicScheduler and PCMFMStochasticScheduler.
        of_flow("pcm-sd3", shift=3.0, origin_steps=ORIGIN_STEPS, steps=(4,)),
        of_flow("pcm-sd3-shift1", shift=1.0, origin_steps=ORIGIN_STEPS, steps=(2, 4)),
        of_flow("pcm-sd3-stochastic", eta=1.0, shift=3.0, origin_steps=ORIGIN_STEPS),
        # TDM's README; its own sampler is DPM++, of which Euler is the first order.
        of_flow("tdm-sd3", shift=6.0, weight=0.125, steps=(4,)),
        # Wan2.2-Lightning and the lightx2v LoRAs, as ComfyUI's own workflows sample them.
        of_flow("wan-lightning", shift=5.0, steps=(4,)),
        # rCM's script for Wan: times of TrigFlow, from arctan(80); all noise is fresh.
        of_flow("rcm", eta=1.0, steps=(1, 2, 3, 4), lists=tuple(_RCM[:n] for n in (1, 2, 3, 4))),
        # SCFM, for Flux and SD3.5.
        of_flow("scfm", shift=3.25, steps=(3, 4, 5, 6, 7, 8)),
    )
}
