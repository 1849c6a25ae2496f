"""Distillation in the background: what from, and the order."""

from __future__ import annotations

from dataclasses import asdict

from comfy_api.v0_0_2 import io

from ..training.jobs import host
from ..training.jobs.store import POLICIES
from ..training.spec import OBJECTIVES, PRECISIONS, build
from .host import checkpoint_names, lora_names, show

CATEGORY = "LCM-LoRA/distil"
LCMData = io.Custom("LCM_DATA")
LCMJob = io.Custom("LCM_JOB")
NONE = "none"


class LCMDistillData(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMDistillData",
            display_name="Distillation Data",
            category=CATEGORY,
            description=(
                "What an LCM-LoRA is distilled from. With prompts the checkpoint draws the "
                "pictures itself, so that no data set is needed; or take your own pictures, with "
                "captions beside them."
            ),
            search_aliases=["dataset", "training data", "captions", "prompts"],
            inputs=[
                io.DynamicCombo.Input(
                    "source",
                    options=[
                        io.DynamicCombo.Option("prompts", [_prompts(), *_drawn()]),
                        io.DynamicCombo.Option("prompt file", [_file(), *_drawn()]),
                        io.DynamicCombo.Option("pictures", [_folder(), *_cropped()]),
                    ],
                    tooltip="prompts: the checkpoint draws. pictures: your own, with captions.",
                ),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip=(
                        "Side in pixels of the square whose area the pictures have: 512 for SD1.5, "
                        "768 for SD2, 1024 for SDXL."
                    ),
                ),
            ],
            outputs=[
                LCMData.Output(
                    display_name="LCM_DATA", tooltip="For Distill LCM-LoRA. Holds no pictures."
                )
            ],
        )

    @classmethod
    def execute(cls, source: dict, resolution: int) -> io.NodeOutput:
        known = dict(source)
        kind = known.pop("source")
        path = known.pop("file", known.pop("folder", ""))
        told = host.Source(kind=kind, path=path, resolution=resolution, **known)
        return io.NodeOutput(asdict(told))


def _prompts() -> io.Input:
    return io.String.Input(
        "prompts",
        multiline=True,
        default="",
        tooltip="One a line. Empty: the list that comes with the pack.",
    )


def _file() -> io.Input:
    return io.String.Input(
        "file",
        default="prompts.txt",
        tooltip="A text file (UTF-8, one prompt a line) in ComfyUI's input folder.",
    )


def _folder() -> io.Input:
    return io.String.Input(
        "folder",
        default="my pictures",
        tooltip=(
            "A folder in ComfyUI's input folder: pictures with a .txt or .caption each or a "
            "metadata.jsonl or .csv, or WebDataset tars."
        ),
    )


def _drawn() -> list[io.Input]:
    return [
        io.Int.Input(
            "count",
            default=1000,
            min=1,
            max=1_000_000,
            tooltip=(
                "Pictures the checkpoint draws, once: later jobs with the same checkpoint, data, "
                "guidance, seed, resolution, precision and style LoRA use them again."
            ),
        ),
        io.Int.Input(
            "draw_steps",
            default=25,
            min=1,
            max=1000,
            tooltip="Its DDIM steps for each of them.",
        ),
    ]


def _cropped() -> list[io.Input]:
    return [
        io.Int.Input("crops", default=1, min=1, max=16, tooltip="Crops of each picture."),
        io.Boolean.Input("flip", default=True, tooltip="Mirror half of them."),
    ]


class LCMDistill(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMDistill",
            display_name="Distill LCM-LoRA (background)",
            category=CATEGORY,
            description=(
                "Makes an LCM-LoRA of a checkpoint, in a process of its own: this node returns at "
                "once and the graph stays free. The job goes on when the browser or ComfyUI is "
                "closed; the tab LCM-LoRA jobs shows it. Queued again with the same settings, it "
                "is the same job."
            ),
            search_aliases=["train lora", "training", "distill", "make lcm lora", "train"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=checkpoint_names(),
                    tooltip="The model to accelerate: SD1.5, SD2, SDXL, SSD-1B, Vega or KOALA.",
                ),
                LCMData.Input("data", tooltip="From Distillation Data."),
                io.String.Input(
                    "name",
                    default="my-lcm-lora",
                    tooltip="Of the file in the loras folder; subfolders as folder/name.",
                ),
                io.Int.Input(
                    "steps",
                    default=1000,
                    min=1,
                    max=1_000_000,
                    tooltip="Optimiser steps. The paper's LoRAs took some thousands.",
                ),
                io.Int.Input(
                    "batch",
                    default=12,
                    min=1,
                    max=1024,
                    tooltip="Pictures a step. Halved by itself, with more turns, if memory ends.",
                ),
                io.Int.Input(
                    "rank", default=64, min=1, max=1024, tooltip="Of the LoRA; 64 is the paper's."
                ),
                io.Float.Input(
                    "guidance",
                    default=7.5,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    tooltip="The cfg scale that is distilled in: what you draw this model with, or "
                    "somewhat less, since each of several steps guides anew.",
                ),
                io.Float.Input(
                    "lr",
                    default=1e-4,
                    min=1e-7,
                    max=1.0,
                    step=1e-6,
                    round=False,
                    tooltip="Learning rate of AdamW.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    control_after_generate=False,  # a new seed each time would be a new job
                    tooltip="Of everything that is drawn. Another seed is another job.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip="Of the checkpoint's weights while training; the LoRA is float32.",
                ),
                io.Combo.Input(
                    "policy",
                    options=list(POLICIES),
                    default=POLICIES[0],
                    tooltip=(
                        "Beside your prompts. yield: the job saves, ends, and comes back when the "
                        "queue is empty; ComfyUI unloads its models each time the job starts. "
                        "exclusive: the job goes on, and ComfyUI unloads its models when it starts "
                        "and each time the queue has run empty. share: both simply go on."
                    ),
                ),
                io.Combo.Input(
                    "style_lora",
                    options=[NONE, *lora_names()],
                    default=NONE,
                    tooltip="A style to bake in, for an accelerated style in one file.",
                ),
                io.Float.Input(
                    "style_strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Weight of that style.",
                ),
                io.Int.Input(
                    "sample_every",
                    default=250,
                    min=0,
                    max=1_000_000,
                    tooltip="Steps between sample pictures in the tab; 0 draws none.",
                ),
                io.Int.Input(
                    "checkpoint_every",
                    default=100,
                    min=1,
                    max=1_000_000,
                    tooltip="Steps between checkpoints: at most that many are lost in a crash.",
                ),
                io.String.Input(
                    "device",
                    default="",
                    tooltip=(
                        'Numbers of the GPUs, such as "1" or "0,1"; empty for the first. "ray" or '
                        '"ray:4": as many workers of your Ray cluster.'
                    ),
                ),
                io.Boolean.Input(
                    "overwrite", default=False, tooltip="Replace a LoRA file of the same name."
                ),
                io.Combo.Input(
                    "objective",
                    options=list(OBJECTIVES),
                    default=OBJECTIVES[0],
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "What it learns. lcm: to leap to the picture from anywhere, for 1 to 8 "
                        "steps. phased: to follow the teacher in exactly 4 steps without fresh "
                        "noise, which is better there and worse everywhere else."
                    ),
                ),
                io.Int.Input(
                    "passes",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "How many passes over the training pictures use the same answers of the "
                        "teacher, which are kept on disk. 8 makes a step about a quarter cheaper; "
                        "then give it a third more steps."
                    ),
                ),
            ],
            outputs=[LCMJob.Output(display_name="LCM_JOB", tooltip="The job's id.")],
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> float:
        return float("nan")  # a job may have been deleted, or its LoRA, since the last time

    @classmethod
    def execute(cls, data: dict, style_lora: str, **settings) -> io.NodeOutput:
        style = "" if style_lora == NONE else style_lora
        order = {"data": data, "style_lora": style, **settings}
        job, new = host.start(build(host.Order, order, "the order"))
        show("Queued" if new else "This job is there already")
        return io.NodeOutput(job)
