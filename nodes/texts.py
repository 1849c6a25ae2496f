"""The lines that nodes show about their run, the most important first. The page translates them."""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose
from typing import Any

from comfy.model_patcher import ModelPatcher

from ..lora.architecture import DOUBT
from ..lora.family import MadeFor, few_step_model
from ..lora.host import Coverage
from ..samplers import host
from ..samplers.families import FAMILIES
from ..samplers.report import Acceleration, Line, guidance_other, origin_of
from ..training.jobs.job import Job
from ..training.spec import Spec

TEXT = "lcm_lora_text"  # the key in a node's output; web/texts.mjs reads it


def as_ui(*lines: Line) -> dict[str, Any]:
    """The `ui` of a node's output, which shows these lines on the node. Without lines, the node's
    old text disappears."""
    return {TEXT: [list(line) for line in lines]}


def of_coverage(coverage: Coverage, families: str = "") -> list[Line]:
    """How much of a LoRA a model took. families: of the LoRA, if it is an acceleration."""
    counts = {"taken": coverage.taken, "total": coverage.total, "family": families}
    if families:
        lines = [Line("{family}: {taken} of {total} modules applied", counts)]
    else:
        lines = [Line("{taken} of {total} modules applied", counts)]
    if coverage.left_over:
        text = "{count} modules do not fit the model. The log names them."
        lines.append(Line(text, {"count": len(coverage.left_over)}, warning=True))
    if coverage.doubt:
        made, actual = coverage.doubt
        lines.append(Line(DOUBT, {"made": made, "actual": actual}, warning=True))
    if coverage.skipped:
        text = "{count} modules are not used: no CLIP is connected, or a strength is 0."
        lines.append(Line(text, {"count": coverage.skipped}))
    return lines


def of_load(coverage: Coverage, family: str, why: tuple[str, str]) -> list[Line]:
    """How much of an acceleration a model took, and why it is sampled as this family."""
    reason, where = why
    return [*of_coverage(coverage, family), Line(reason, {"what": where})]


def of_rows(
    rows: Sequence[tuple[Coverage, str]], family: str, why: tuple[str, str]
) -> list[Line]:  # fmt: skip
    """How much of each LoRA of a stack a model took, and why it is sampled as this family.

    rows: (coverage, weights as text) of each LoRA, the acceleration first.
    """
    lines = [Line("{family}; LoRAs applied: {count}", {"family": family, "count": len(rows)})]
    for coverage, weights in rows:
        name = coverage.source.removesuffix(".safetensors")
        counts = {"taken": coverage.taken, "total": coverage.total}
        values = {"weights": weights, "source": name, **counts}
        lines.append(Line("{weights} x {source}: {taken} of {total} modules", values))
        lines += of_coverage(coverage)[1:]
    reason, where = why
    return [*lines, Line(reason, {"what": where})]


def of_family(model: ModelPatcher, wanted: str, family: str) -> list[Line]:
    """Why LCM Model Sampling chose `family`, and a warning if the MODEL's LoRAs have another one.

    wanted: what the user chose.
    """
    applied = host.applied_to(model)
    values = {"family": family, "source": " + ".join(x.source for x in applied.accelerations)}
    if wanted == "auto":
        if applied.accelerations:
            return [Line("{family}, from {source}", values)]
        return [Line("{family}: no LoRA on the MODEL sets a family", values)]
    if applied.accelerations and family not in applied.families():
        values |= {"other": " + ".join(applied.families())}
        text = "{source} is {other}, not {family}: choose auto."
        return [Line(text, values, warning=True)]
    return []


def of_sampling(
    model: ModelPatcher, strength: float = 0.0, made: MadeFor | None = None
) -> list[Line]:  # fmt: skip
    """Where a flow model's sigmas come from, and a warning if its LoRA is made for another
    strength. No lines for other models.

    strength: of the LoRA; 0 if there is none. made: what the LoRA was made for.
    """
    family = host.family_for(model)
    if not host.is_flow(model.get_model_object("model_sampling")):
        return []
    lines = [origin_of(family)]
    # In a merged file, the acceleration already has a weight.
    right = family.weight / (made.weight if made else 1.0)
    if strength and family.weight != 1 and not isclose(strength, right, rel_tol=0.01):
        values = {"family": family.name, "weight": f"{right:g}"}
        text = "{family} is made for strength {weight}: change strength."
        lines.append(Line(text, values, warning=True))
    return lines


def of_run(
    model: ModelPatcher, run: host.Run, positive: Sequence[Sequence[Any]] = ()
) -> list[Line]:
    """Warnings about a run of LCM KSampler, and what it did. positive: its conditioning."""
    file = host.file_of(model)
    fast = file is not None and few_step_model(file.name)
    return [*guidance_other(host.family_for(model), positive), *host.report(model, run, fast=fast)]


def of_order(spec: Spec) -> Line:
    """What a job will do: its steps, batch, resolution and data."""
    values = {"steps": spec.steps, "batch": spec.batch, "pixels": spec.resolution}
    if spec.data.kind == "prompts":
        text = "{steps} steps of {batch} pictures, {pixels} pixels, {count} drawn from prompts"
        return Line(text, values | {"count": spec.data.count})
    return Line("{steps} steps of {batch} pictures, {pixels} pixels, from your pictures", values)


def of_job(job: Job) -> list[Line]:
    """A job's progress: what it does now, and in a second line its step, loss and time left."""
    parts = []
    if job.step:
        values = {"step": job.step, "steps": job.steps}
        parts.append(Line("step {step} of {steps}", values))
    if job.loss is not None:
        parts.append(Line("loss {loss}", {"loss": f"{job.loss:.4f}"}))
    if job.seconds_left is not None:
        parts.append(_time_left(int(job.seconds_left)))
    # The message of a finished job says nothing new. The page translates the fixed messages.
    if job.message and not job.activity and job.state != "done":
        message = Line(job.message) if "{" not in job.message else job.message
        parts.append(Line("{message}", {"message": message}))
    numbered = {f"part{number}": part for number, part in enumerate(parts)}
    facts = Line(" · ".join(f"{{{name}}}" for name in numbered), numbered)
    return [_doing(job), *([facts] if parts else [])]


def _doing(job: Job) -> Line:
    activity = Line(job.activity or job.state, warning=job.state in ("failed", "lost"))
    done, total = job.activity_done, job.activity_total
    if not job.activity or not total:
        return activity
    if job.activity == "waiting for memory":
        memory = {"free": f"{done / 1000:.1f}", "needed": f"{total / 1000:.1f}"}
        return Line("waiting for memory: {free} of {needed} GB are free", memory)
    values = {"activity": activity, "done": done, "total": total}
    return Line("{activity} {done} of {total}", values)


def _time_left(seconds: int) -> Line:
    minutes, seconds_of_minute = divmod(seconds, 60)
    hours, minutes_of_hour = divmod(minutes, 60)
    if hours:
        return Line("{hours} h {minutes} min left", {"hours": hours, "minutes": minutes_of_hour})
    if minutes:
        return Line("{minutes} min left", {"minutes": minutes})
    return Line("{seconds} s left", {"seconds": seconds_of_minute})


def acceleration(source: str, made: MadeFor | None, strength: float) -> Acceleration | None:
    """An applied LoRA as a MODEL carries it; None if it does not accelerate the MODEL."""
    if made is None or strength <= 0:
        return None
    name = source.removesuffix(".safetensors")
    usual = {n for family in made.families if family in FAMILIES for n in FAMILIES[family].steps}
    steps = made.steps or tuple(sorted(usual))
    return Acceleration(name, made.families, steps, made.cfg)
