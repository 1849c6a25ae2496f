"""Distillation jobs that are there: how one goes, and the LoRA it made."""

from __future__ import annotations

import time
from pathlib import Path

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from comfy_api.v0_0_2 import io, ui
from PIL import Image

from ..lora.acceleration import FAMILY
from ..lora.blocks import place_of
from ..lora.delta import Vector
from ..lora.files import read
from ..lora.wire import to_wire
from ..training import spec
from ..training.export import vector, with_styles
from ..training.jobs import host, metrics, ray_job
from ..training.jobs.store import Job, NoJob
from ..training.spec import StyleLoRA
from ..training.state import checkpoints
from .chart import chart
from .distill import CATEGORY, LCMJob
from .host import lora_path, show


def _job_input() -> io.Input:
    return LCMJob.Input("job", tooltip="The job from Distill LCM-LoRA.")


class LCMJobStatus(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMJobStatus",
            display_name="Distillation Job Status",
            category=CATEGORY,
            description=(
                "Shows how far a distillation is: its state, a plot of its loss and its newest "
                "sample pictures (columns: the teacher at 50 steps, then the LoRA at 1, 2 and 4 "
                "steps)."
            ),
            search_aliases=["progress", "loss", "training status"],
            is_output_node=True,
            inputs=[_job_input()],
            outputs=[
                io.String.Output(display_name="progress", tooltip="State, step, loss, time left."),
                io.Image.Output(display_name="loss", tooltip="Loss over steps, on a log scale."),
                io.Image.Output(display_name="samples", tooltip="The newest sample pictures."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> float:
        return float("nan")

    @classmethod
    def execute(cls, job: str) -> io.NodeOutput:
        found, path = _found(job), host.store().path(job)
        told = metrics.read(path, points=1000)
        plot = chart([(row[0], row[1]) for row in told["rows"]], f"{found.name}: loss")
        pictures = sorted((path / "samples").glob("step-*.png"))
        sheet = Image.open(pictures[-1]) if pictures else chart([], "no sample pictures yet")
        text = progress(found)
        return io.NodeOutput(text, _image(plot), _image(sheet), ui=ui.PreviewText(text))


class LCMJobResult(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMJobResult",
            display_name="Distillation Job Result",
            category=CATEGORY,
            description=(
                "Gives the LoRA of a distillation job. It waits until the job is done, and "
                "interrupting it does the job no harm. With wait off, it gives the LoRA of the "
                "newest checkpoint."
            ),
            search_aliases=["trained lora", "wait for training"],
            inputs=[
                _job_input(),
                io.Boolean.Input(
                    "wait",
                    default=True,
                    tooltip="Wait until the job is done. If off, you get the LoRA of its newest "
                    "checkpoint while it goes on.",
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="LORA_MODEL",
                    tooltip="The LoRA as a vector, for Apply LoRA Vector or Combine.",
                ),
                io.String.Output(
                    display_name="file name",
                    tooltip="The name that LoRA loaders show; empty until the job is done.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> float:
        return float("nan")

    @classmethod
    def execute(cls, job: str, wait: bool) -> io.NodeOutput:
        found = _found(job)
        if wait and found.state != "done":
            found = _ended(found)
        if found.state == "done":
            return io.NodeOutput(to_wire(read(lora_path(found.lora_name))), found.lora_name)
        path = host.store().path(job)
        newest = checkpoints.newest(ray_job.checkpoints(path))
        if newest is None:
            raise ValueError(f"The job {found.name!r} has no checkpoint yet: {progress(found)}.")
        settings = spec.read(path / "spec.json")
        made = vector(
            newest.adapter, settings.lora_alpha, {FAMILY: settings.objective},
            f"{found.name}, step {newest.step}",
        )  # fmt: skip
        made = with_styles(made, [_style(lora) for lora in settings.loras])
        show(f"The LoRA after step {newest.step}")
        return io.NodeOutput(to_wire(made), "")


def _style(lora: StyleLoRA) -> tuple[Vector, float]:
    """The part of a job's style that its teacher has, for the model, and its strength."""
    style = read(Path(lora.path))
    return style.only({m for m in style.modules() if place_of(m) != "text"}), lora.strength


def _found(job: str) -> Job:
    try:
        return host.store().job(job)
    except NoJob:
        raise ValueError(f"There is no distillation job {job}: it was deleted.") from None


def _ended(found: Job) -> Job:
    """Waits until a job is done. Raises ValueError when it fails or is stopped."""
    if not found.remote and found.policy != "share":
        # What beside.py asks for is heard between prompts only, and this one lasts.
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
    bar = comfy.utils.ProgressBar(max(1, found.steps))
    with host.waited_for(found.id):
        while found.state != "done":
            comfy.model_management.throw_exception_if_processing_interrupted()
            if found.state == "failed" or (found.state == "paused" and not found.aside):
                raise ValueError(f"The job {found.name!r} is {progress(found)}.")
            bar.update_absolute(found.step, max(1, found.steps))
            show(progress(found))
            time.sleep(0.5)
            found = _found(found.id)
    return found


def progress(job: Job) -> str:
    """A line: state, step, loss, time left, and why."""
    words = [job.state]
    if job.step:
        words.append(f"step {job.step} of {job.steps}")
    if job.loss is not None:
        words.append(f"loss {job.loss:.4f}")
    if job.seconds_left is not None:
        minutes, seconds = divmod(int(job.seconds_left), 60)
        words.append(f"{minutes // 60} h {minutes % 60} min left" if minutes >= 60 else
                     f"{minutes} min {seconds} s left")  # fmt: skip
    if job.message and job.state != "running":
        words.append(job.message)
    return ", ".join(words)


def _image(picture: Image.Image) -> torch.Tensor:
    """[1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]
