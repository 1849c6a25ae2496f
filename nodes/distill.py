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
                "Sets what an LCM-LoRA is distilled from. With prompts, the checkpoint draws the "
                "pictures itself and you need no data set. You can also use your own pictures "
                "with captions."
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
                    tooltip="prompts: the checkpoint draws the pictures. pictures: your own, with "
                    "captions.",
                ),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip=(
                        "Size of the pictures, as the side in pixels of a square with the same "
                        "area: 512 for SD1.5, 768 for SD2, 1024 for SDXL."
                    ),
                ),
            ],
            outputs=[
                LCMData.Output(
                    display_name="LCM_DATA",
                    tooltip="Connect it to Distill LCM-LoRA. It holds settings, not pictures.",
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
        tooltip="One prompt per line. Leave it empty to use the list that comes with the pack.",
    )


def _file() -> io.Input:
    return io.String.Input(
        "file",
        default="prompts.txt",
        tooltip="A text file (UTF-8, one prompt per line) in ComfyUI's input folder.",
    )


def _folder() -> io.Input:
    return io.String.Input(
        "folder",
        default="my pictures",
        tooltip=(
            "A folder in ComfyUI's input folder. It holds pictures, each with a .txt, .caption "
            "or .json file, or all with one metadata.jsonl or .csv; or it holds WebDataset tars."
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
                "Number of pictures that the checkpoint draws. Later jobs with the same "
                "checkpoint, data, guidance, seed, resolution, precision and style LoRA reuse them."
            ),
        ),
        io.Int.Input(
            "draw_steps",
            default=25,
            min=1,
            max=1000,
            tooltip="DDIM steps for each of these pictures.",
        ),
    ]


def _cropped() -> list[io.Input]:
    return [
        io.Int.Input("crops", default=1, min=1, max=16, tooltip="Crops from each picture."),
        io.Boolean.Input("flip", default=True, tooltip="Mirror half of the crops."),
    ]


class LCMDistill(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMDistill",
            display_name="Distill LCM-LoRA (background)",
            category=CATEGORY,
            description=(
                "Distils an LCM-LoRA from a checkpoint in a separate process. This node returns "
                "immediately and the graph stays free. The job goes on when you close the browser "
                "or ComfyUI; the tab LCM-LoRA jobs shows it. Queuing the same settings again gives "
                "the same job."
            ),
            search_aliases=["train lora", "training", "distill", "make lcm lora", "train"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=checkpoint_names(),
                    tooltip="The model to accelerate: SD1.5, SD2, SDXL, SSD-1B, Vega or KOALA.",
                ),
                LCMData.Input("data", tooltip="The data from Distillation Data."),
                io.String.Input(
                    "name",
                    default="my-lcm-lora",
                    tooltip="File name in the loras folder. For a subfolder, write folder/name.",
                ),
                io.Int.Input(
                    "steps",
                    default=1000,
                    min=1,
                    max=1_000_000,
                    tooltip="Number of optimiser steps. The paper's LoRAs took a few thousand.",
                ),
                io.Int.Input(
                    "batch",
                    default=12,
                    min=1,
                    max=1024,
                    tooltip="Pictures per step. If memory runs out, the batch is halved "
                    "automatically and gradients are accumulated.",
                ),
                io.Int.Input(
                    "rank", default=64, min=1, max=1024,
                    tooltip="Rank of the LoRA; the paper uses 64.",
                ),
                io.Float.Input(
                    "guidance",
                    default=7.5,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    tooltip="The cfg scale that is distilled into the LoRA: the one you use with "
                    "this model, or somewhat less, because every sampling step applies it again.",
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
                    tooltip="Random seed of the job. Another seed makes another job.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="auto",
                    tooltip="Precision of the checkpoint in training; the LoRA is float32.",
                ),
                io.Combo.Input(
                    "policy",
                    options=list(POLICIES),
                    default=POLICIES[0],
                    tooltip=(
                        "What happens while you generate. yield: the job saves and ends, and "
                        "resumes when the queue is empty; ComfyUI unloads its models each time "
                        "the job starts. exclusive: the job goes on; ComfyUI unloads its models "
                        "when the job starts and each time the queue becomes empty. share: the "
                        "job goes on, and ComfyUI does not unload its models."
                    ),
                ),
                io.Combo.Input(
                    "style_lora",
                    options=[NONE, *lora_names()],
                    default=NONE,
                    tooltip="A style LoRA to bake into the checkpoint first. You get an "
                    "accelerated style in one file.",
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
                    tooltip="Steps between the job's checkpoints. A crash loses at most that many.",
                ),
                io.String.Input(
                    "device",
                    default="",
                    tooltip=(
                        'GPU numbers, such as "1" or "0,1"; leave it empty for the first GPU. '
                        '"ray" uses one worker of your Ray cluster, "ray:4" four.'
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
                        "What the LoRA learns. lcm: to jump to the picture from any timestep, for "
                        "1 to 8 steps. phased: to imitate the teacher in exactly 4 steps without "
                        "fresh noise; this is better at 4 steps and worse at any other number."
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
                        "Number of passes over the training pictures that share one set of the "
                        "teacher's outputs, kept on disk. 8 makes a step about a quarter "
                        "cheaper; then use a third more steps."
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
        show("Queued" if new else "This job already exists")
        return io.NodeOutput(job)
