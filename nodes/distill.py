"""Nodes that order a distillation: its data and its settings.

The widgets are made from the declarations in training/spec.py and training/jobs/order.py.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict
from typing import Any

from comfy_api.v0_0_2 import io

from ..samplers.report import Line
from ..training.jobs import host
from ..training.jobs.order import SOURCES, DataOrder, Order, TeacherOrder
from ..training.schema import build, declared
from .host import checkpoint_names, lora_names, part_names
from .texts import as_ui, of_order

CATEGORY = "LCM-LoRA/distil"
LCMData = io.Custom("LCM_DATA")
LCMTeacherParts = io.Custom("LCM_TEACHER")
LCMJob = io.Custom("LCM_JOB")
NONE = "none"
CHOICES = ("checkpoint", "data", "name", "length")  # always shown; the host folds the other inputs
PARTS = {  # ComfyUI's model folder of each input
    "diffusion_model": "diffusion_models", "text_encoder": "text_encoders",
    "text_encoder_2": "text_encoders", "text_encoder_3": "text_encoders", "vae": "vae",
}  # fmt: skip
FURTHER = ("text_encoder_2", "text_encoder_3")  # a file from ComfyUI's list, or NONE
LORAS = ("style_lora", "start_from")  # a file from ComfyUI's list, or NONE
JOB = "lcm_lora_job"  # key of the job's id in a node's output; web/distill.mjs reads it


class LCMDistillData(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMDistillData",
            display_name="Distillation Data",
            category=CATEGORY,
            description=(
                "Chooses what an LCM-LoRA is distilled from. With prompts, the checkpoint draws "
                "the pictures itself and you need no data set. You can also use your own pictures "
                "with captions."
            ),
            search_aliases=["dataset", "training data", "captions", "prompts"],
            inputs=[
                io.DynamicCombo.Input(
                    "source",
                    options=[
                        io.DynamicCombo.Option(kind, inputs)
                        for kind, inputs in zip(SOURCES, _sources(), strict=True)
                    ],
                    tooltip=declared(DataOrder)["kind"].setting.help,
                ),
                _input(DataOrder, "resolution"),
                _input(DataOrder, "auto_resolution"),
            ],
            outputs=[
                LCMData.Output(
                    display_name="LCM_DATA",
                    tooltip="The settings of the data, for Distil LCM-LoRA. It holds no pictures.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, source: dict[str, Any], resolution: int, auto_resolution: bool = False
    ) -> io.NodeOutput:
        settings = dict(source)
        kind = settings.pop("source")
        path = settings.pop("file", settings.pop("folder", ""))
        settings |= {"resolution": resolution, "auto_resolution": auto_resolution}
        order = DataOrder(kind=kind, path=path, **settings)
        return io.NodeOutput(asdict(order))


def _sources() -> list[list[io.Input]]:
    """The inputs for each of SOURCES."""
    drawn = [_input(DataOrder, "count"), _input(DataOrder, "draw_steps")]
    file = io.String.Input(
        "file",
        default="prompts.txt",
        tooltip="A text file (UTF-8, one prompt per line) in ComfyUI's input folder.",
    )
    folder = io.String.Input(
        "folder",
        default="my pictures",
        tooltip=(
            "A folder in ComfyUI's input folder. It holds pictures, each with a .txt, .caption "
            "or .json file, or all with one metadata.jsonl or .csv; or it holds WebDataset tars."
        ),
    )
    pictures = [folder, _input(DataOrder, "crops"), _input(DataOrder, "flip")]
    return [[_input(DataOrder, "prompts"), *drawn], [file, *drawn], pictures]


class LCMTeacher(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMTeacher",
            display_name="Distillation Teacher",
            category=CATEGORY,
            description=(
                "Names the files of a flow model that comes in several files: diffusion model, "
                "text encoders and VAE. Connect it to Distil LCM-LoRA, where it replaces the "
                "checkpoint."
            ),
            search_aliases=["diffusion model", "unet", "text encoder", "vae", "flow model"],
            inputs=[_part_input(name, kind) for name, kind in PARTS.items()],
            outputs=[
                LCMTeacherParts.Output(
                    display_name="LCM_TEACHER",
                    tooltip="The names of the files, for Distil LCM-LoRA. It holds no models.",
                )
            ],
        )

    @classmethod
    def execute(cls, **names: str) -> io.NodeOutput:
        files = {name: "" if file == NONE else file for name, file in names.items()}
        return io.NodeOutput(asdict(TeacherOrder(**files)))


def _part_input(name: str, kind: str) -> io.Input:
    if name in FURTHER:
        return _input(TeacherOrder, name, [NONE, *part_names(kind)], default=NONE)
    return io.Combo.Input(
        name, options=part_names(kind), tooltip=declared(TeacherOrder)[name].setting.help
    )


class LCMDistill(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMDistill",
            display_name="Distil LCM-LoRA (background)",
            category=CATEGORY,
            description=(
                "Distils an LCM-LoRA from a checkpoint in a separate process. This node returns "
                "immediately, so you can go on using ComfyUI. The job continues when you close the "
                "browser or ComfyUI; the sidebar tab LCM-LoRA jobs shows it. Queuing the same "
                "settings again gives the same job."
            ),
            search_aliases=["train lora", "training", "distill", "make lcm lora", "train"],
            is_output_node=True,
            inputs=[_order_input(name) for name in declared(Order)],
            hidden=[io.Hidden.extra_pnginfo],
            outputs=[LCMJob.Output(display_name="LCM_JOB", tooltip="The job's id.")],
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        return float("nan")  # the job or its LoRA may have been deleted since the last run

    @classmethod
    def execute(
        cls, data: dict[str, Any], teacher: dict[str, Any] | None = None, **settings: Any
    ) -> io.NodeOutput:
        order = {"data": data, "teacher": teacher or {}, **settings}
        order |= {name: "" for name in LORAS if settings.get(name) == NONE}
        # Prompts sent over the API have no graph, and calls outside a prompt no hidden inputs.
        extra = cls.hidden.extra_pnginfo if cls.hidden else None
        workflow = extra.get("workflow") if isinstance(extra, dict) else None
        job, new, spec = host.start(build(Order, order, "the order"), workflow)
        line = Line("Queued") if new else Line("This job already exists")
        shown = as_ui(line, of_order(spec)) | {JOB: [job]}
        return io.NodeOutput(job, ui=shown)


def _order_input(name: str) -> io.Input:
    if name == "data":
        return LCMData.Input(name, tooltip=declared(Order)[name].setting.help)
    if name == "teacher":
        tooltip = declared(Order)[name].setting.help
        return LCMTeacherParts.Input(name, optional=True, tooltip=tooltip)
    if name == "checkpoint":
        return _input(Order, name, [*checkpoint_names(), NONE])
    folded: dict[str, Any] = {} if name in CHOICES else {"advanced": True}
    if name in LORAS:
        return _input(Order, name, [NONE, *lora_names()], default=NONE, **folded)
    return _input(Order, name, **folded)


def _input(kind: type, name: str, options: list[str] | None = None, **changes: Any) -> io.Input:
    """The widget of a setting. options: the names of files to choose from."""
    item = declared(kind)[name]
    setting = item.setting
    widget: dict[str, Any] = {"tooltip": setting.help}
    if item.default is not MISSING:
        widget["default"] = item.default
    if item.type in (int, float):
        widget |= {"min": setting.least, "max": setting.most}
    widget |= setting.widget
    if options is not None or setting.choices:
        choices = list(setting.choices) if options is None else options
        return io.Combo.Input(name, options=choices, **widget | changes)
    inputs = {bool: io.Boolean, str: io.String, int: io.Int, float: io.Float}
    return inputs[item.type].Input(name, **widget | changes)
