"""Lines for the node: what a few-step run did, and warnings about its settings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import isclose
from typing import Any, NamedTuple

from .families import DEFAULT, FAMILIES, Family

MOST_CFG = 2.0  # a higher cfg, on top of the distilled guidance, burns the colours
MOST_STEPS = 8  # more steps hardly help, unless the LoRA names its own numbers of steps
TIMESTEPS_SHOWN = 8


class Line(NamedTuple):
    """A line on a node. The page translates its text, so the values come separately.

    Attributes:
        text: English, with the names of values in braces.
        values: the value of each name: text, a number or another Line.
        warning: whether the user should change something.
    """

    text: str
    values: Mapping[str, Any] = {}
    warning: bool = False

    def __str__(self) -> str:
        return self.text.format(**self.values)


@dataclass(frozen=True)
class Acceleration:
    """An acceleration LoRA on a MODEL.

    Attributes:
        source: the LoRA's name.
        families: how it was distilled; several names for a sum of several accelerations.
        steps: the numbers of steps that it was made for; empty if unknown.
        cfg: whether it was made for guidance, so that a high cfg is right.
    """

    source: str
    families: tuple[str, ...]
    steps: tuple[int, ...] = ()
    cfg: bool = False


@dataclass(frozen=True)
class Applied:
    """What this pack's nodes added to a MODEL. The MODEL and its clones keep it.

    Attributes:
        accelerations: the acceleration LoRAs that were added.
        patches: the number of patches that were added. A MODEL with more patches has other LoRAs.
    """

    accelerations: tuple[Acceleration, ...] = field(default=())
    patches: int = 0

    def families(self) -> list[str]:
        """The families of all accelerations, sorted."""
        return sorted({name for lora in self.accelerations for name in lora.families})

    def family(
        self, possible: Collection[str] = FAMILIES, default: str = DEFAULT, kind: str = "a model"
    ) -> str:
        """The family to sample as; `default` if there is no acceleration.

        possible: the families that the MODEL can be sampled as. kind: what the MODEL is.

        Raises:
            ValueError: there are several families, or one that is not possible.
        """
        names = self.families() or [default]
        if len(names) > 1 or names[0] not in possible:
            sources = "; ".join(lora.source for lora in self.accelerations)
            raise ValueError(
                f"The MODEL, {kind}, cannot be sampled as {' + '.join(names)!r}, the family of its "
                f"LoRAs ({sources}). Expected one of {', '.join(possible)}. Choose the family in "
                "LCM Model Sampling."
            )
        return names[0]


def ran(family: str, timesteps: Sequence[object], cfg: float) -> Line:
    """What a run did: its family, its timesteps (or a flow model's sigmas) and guidance."""
    shown = list(map(str, timesteps))
    if len(shown) > TIMESTEPS_SHOWN:
        half = TIMESTEPS_SHOWN // 2
        shown = [*shown[:half], "…", *shown[-half:]]
    values = {
        "family": family, "steps": len(timesteps), "timesteps": " ".join(shown), "cfg": f"{cfg:g}",
    }  # fmt: skip
    unguided = isclose(cfg, 1.0)
    if len(timesteps) == 1:
        if unguided:
            return Line("{family}, 1 step: {timesteps}; cfg {cfg}, negative prompt unused", values)
        return Line("{family}, 1 step: {timesteps}; cfg {cfg}", values)
    if unguided:
        text = "{family}, {steps} steps: {timesteps}; cfg {cfg}, negative prompt unused"
        return Line(text, values)
    return Line("{family}, {steps} steps: {timesteps}; cfg {cfg}", values)


def origin_of(family: Family) -> Line:
    """Where the sigmas come from when a flow model is sampled as `family`."""
    if family.lists:
        counts = ", ".join(str(len(sigmas)) for sigmas in family.lists)
        text = "at {known} steps, the sigmas that the LoRA's authors give"
        return Line(text, {"known": counts})
    if family.shift is not None:
        return Line("shift {shift}, as the LoRA's authors use it", {"shift": f"{family.shift:g}"})
    return Line("the model's own shift: {family} sets none", {"family": family.name})


def guidance_other(family: Family, positive: Sequence[Sequence[Any]]) -> list[Line]:
    """A warning if the conditioning [[text, options], ...] sets another guidance for the network's
    own input than the family is made for. Without one, ComfyUI uses 3.5."""
    prompt_guidance = next((c[1]["guidance"] for c in positive if "guidance" in c[1]), None)
    if family.guidance is None or prompt_guidance in (None, family.guidance):
        return []
    values = {
        "family": family.name, "made": f"{family.guidance:g}", "found": f"{prompt_guidance:g}",
    }  # fmt: skip
    text = "{family} is made for guidance {made}, and the prompt has {found}: change FluxGuidance."
    return [Line(text, values, warning=True)]


def warnings(
    applied: Applied, others: bool, steps: int, cfg: float, guided: bool = False
) -> list[Line]:
    """What is wrong with a run, and what to change.

    others: whether something that this pack does not know may accelerate the MODEL: a LoRA from
    another loader, or the checkpoint itself. guided: whether the family needs guidance.
    """
    lines = []
    if not applied.accelerations and not others:
        text = "No acceleration LoRA on the MODEL: add Load LCM-LoRA after the checkpoint."
        lines.append(Line(text, warning=True))
    if cfg > MOST_CFG and not guided and not any(lora.cfg for lora in applied.accelerations):
        values = {"cfg": f"{cfg:g}"}
        lines.append(Line("cfg {cfg} burns the colours: use 1 to 2.", values, warning=True))
    made = [lora for lora in applied.accelerations if lora.steps]
    if made and not any(steps in lora.steps for lora in made):
        source, known = made[0].source, ", ".join(map(str, made[0].steps))
        values = {"source": source, "known": known}
        text = "{source} is made for {known} steps: change steps."
        lines.append(Line(text, values, warning=True))
    elif not made and steps > MOST_STEPS and (applied.accelerations or others):
        text = "More than 8 steps hardly help a few-step LoRA: use 1 to 8."
        lines.append(Line(text, warning=True))
    return lines
