"""Nodes for existing distillation jobs: their progress, and their LoRA."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comfy_api.v0_0_2 import io, ui
from PIL import Image

from ..lora.formats.wire import to_wire
from ..samplers.report import Line
from ..training.jobs import host, metrics
from .chart import chart
from .distill import CATEGORY, JOB, LCMJob
from .host import show
from .texts import as_ui, of_job


def _job_input() -> io.Input:
    return LCMJob.Input("job", tooltip="The job from Distil LCM-LoRA.")


class LCMJobStatus(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMJobStatus",
            display_name="Distillation Job Status",
            category=CATEGORY,
            description=(
                "Shows the progress of a distillation: its state, a plot of its loss and its "
                "newest sample pictures (columns: the teacher at 50 steps, then the LoRA at 1, 2 "
                "and 4 steps)."
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
    def fingerprint_inputs(cls, **_: Any) -> float:
        return float("nan")

    @classmethod
    def execute(cls, job: str) -> io.NodeOutput:
        store = host.store()
        described, path = store.job(job), store.path(job)
        rows = metrics.read(path, points=1000)["rows"]
        title = f"{described.name}: loss" if rows else "no loss yet"
        plot = chart([(row[0], row[1]) for row in rows], title)
        pictures = sorted((path / "samples").glob("step-*.png"))
        sheet = Image.open(pictures[-1]) if pictures else chart([], "no sample pictures yet")
        text = described.progress()
        shown = ui.PreviewText(text).as_dict() | as_ui(*of_job(described)) | {JOB: [job]}
        return io.NodeOutput(text, _image(plot), _image(sheet), ui=shown)


class LCMJobResult(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMJobResult",
            display_name="Distillation Job Result",
            category=CATEGORY,
            description=(
                "Gives the LoRA of a distillation job. It waits until the job is done; if you "
                "interrupt it, the job continues. With wait off, it gives the LoRA of the newest "
                "checkpoint."
            ),
            search_aliases=["trained lora", "wait for training"],
            inputs=[
                _job_input(),
                io.Boolean.Input(
                    "wait",
                    default=True,
                    tooltip="Wait until the job is done. If off, you get the LoRA of its newest "
                    "checkpoint, and the job continues.",
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="LORA_MODEL",
                    tooltip="The LoRA as a vector, for Apply LoRA Vector or Combine LoRA Vectors.",
                ),
                io.String.Output(
                    display_name="file name",
                    tooltip="The name that LoRA loaders show; empty until the job is done.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return float("nan")

    @classmethod
    def execute(cls, job: str, wait: bool) -> io.NodeOutput:
        vector, name, step = host.result(job, wait, lambda now: show(of_job(now)))
        if name:
            line = Line("Finished: {name}", {"name": name})
        else:
            line = Line("The LoRA after step {step}", {"step": step})
        return io.NodeOutput(to_wire(vector), name, ui=as_ui(line))


def _image(picture: Image.Image) -> torch.Tensor:
    """[1, H, W, 3] in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]
