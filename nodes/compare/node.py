"""The node that draws one picture at many settings."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import comfy.utils
import numpy as np
import torch
from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.v0_0_2 import io, ui
from PIL import Image

from ...lora.delta import Vector
from ...lora.formats.files import fingerprint
from ...lora.formats.wire import from_wire
from ...samplers.report import Line
from ...training.jobs import host as jobs
from ..distill import LCMJob
from ..host import interruptions, lora_names, lora_path, weight_input
from ..texts import as_ui
from . import axes
from .axes import ALONE, Axis
from .cells import cells_of
from .draw import Drawing
from .settings import NUMBERS, plain
from .sheet import Sheet, joined

MOST_VECTORS = 8
NONE = "none"
PREVIEW = 768  # pixels of the longer side
PAUSE = 0.4  # seconds between two previews: each is a JPEG of the whole sheet
NUMERIC = ("steps", "cfg", "weight", "denoise", "eta", "seed")


class LCMCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        rows = [_row(number) for number in range(1, MOST_VECTORS + 1)]
        counts = [
            io.DynamicCombo.Option(str(count), [field for row in rows[:count] for field in row])
            for count in range(MOST_VECTORS + 1)
        ]
        return io.Schema(
            node_id="LCMCompare",
            display_name="Compare Settings",
            category="LCM-LoRA",
            description=(
                "Draws the same picture at many settings and puts the pictures in one labelled "
                "sheet: steps, cfg, weights of LoRAs, prompts, seeds, LoRA files or the "
                "checkpoints of a distillation job, one in columns and another in rows. All "
                "pictures start from the same noise, unless seeds are compared. Each matches what "
                "LCM KSampler draws with the same settings, up to rounding."
            ),
            search_aliases=[
                "xy plot", "xyz plot", "grid", "contact sheet", "sweep", "compare weights",
                "lora weight", "which steps", "parameter search",
            ],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The checkpoint's model, or one that has LoRAs applied. The vectors "
                    "below are added to it.",
                ),
                io.Clip.Input(
                    "clip", optional=True,
                    tooltip="Only needed to compare prompts. The text encoder parts of the vectors "
                    "are then applied too.",
                ),
                io.Vae.Input("vae", tooltip="Decodes the pictures."),
                io.Conditioning.Input(
                    "positive", optional=True,
                    tooltip="What the pictures should show. Not needed if prompts are compared.",
                ),
                io.Conditioning.Input(
                    "negative", optional=True,
                    tooltip="What the pictures should not show. Only used where cfg is not 1.",
                ),
                io.Latent.Input(
                    "latent", tooltip="An empty latent, or a picture's latent for image to image."
                ),
                io.DynamicCombo.Input(
                    "count", options=counts,
                    tooltip="How many LoRA vectors are added to the model. With 0, the model is "
                    "compared as it is.",
                ),
                _axis(
                    "columns", [],
                    "What changes from column to column. Values are a list such as 1, 2, 4, 8 or a "
                    "range from:to:step such as 0.4:1.2:0.2.",
                ),
                _axis("rows", [NONE], "What changes from row to row. none gives a single row."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Seed of all pictures, unless seeds are compared.",
                ),
                io.Int.Input(
                    "steps", default=4, min=1, max=50,
                    tooltip="Sampling steps of all pictures, unless steps are compared.",
                ),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=30.0, step=0.1, round=0.01,
                    tooltip="Guidance of all pictures, unless cfg is compared. 1 to 2 suit a "
                    "few-step LoRA.",
                ),
                io.Float.Input(
                    "denoise", default=1.0, min=0.01, max=1.0, step=0.01,
                    tooltip="As in LCM KSampler: 1 makes a new picture, lower values keep more of "
                    "the input latent.",
                ),
                io.Float.Input(
                    "eta", default=-1.0, min=-1.0, max=1.0, step=0.01, optional=True, advanced=True,
                    tooltip="Share of fresh noise between steps: 1 is LCM, 0 is deterministic. "
                    "Below 0, the MODEL's family sets it.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="sheet",
                    tooltip="The labelled sheet. Large pictures are made smaller in it.",
                ),
                io.Image.Output(
                    display_name="pictures",
                    tooltip="The pictures in full size as one batch, row by row.",
                ),
                io.String.Output(
                    display_name="settings",
                    tooltip="One line with the settings of each picture, row by row. Paste the "
                    "lines of the best ones into columns (settings) to compare only those.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(
        cls, columns: dict[str, Any], rows: dict[str, Any], **_: Any
    ) -> list[Any]:
        seen: list[Any] = [interruptions["LCMCompare"]]
        for given in (columns, rows):
            if given.get("files") or given.get("lines"):
                axis = _axis_of(given, "columns" if "columns" in given else "rows")
                names = [
                    value for point in axis.points for name, value in point.changes.items()
                    if name.startswith("lora_")
                ]  # fmt: skip
                seen += [fingerprint(lora_path(name)) for name in names]
            if "job" in given:
                seen.append(float("nan"))  # it may have other checkpoints now
        return seen

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        vae: VAE,
        latent: dict[str, Any],
        count: dict[str, Any],
        columns: dict[str, Any],
        rows: dict[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        denoise: float,
        eta: float = -1.0,
        clip: CLIP | None = None,
        positive: list[Any] | None = None,
        negative: list[Any] | None = None,
    ) -> io.NodeOutput:
        across, down = _axis_of(columns, "columns"), _axis_of(rows, "rows")
        axes.require_crossed(across, down)
        numbers = range(1, int(count["count"]) + 1)
        given = [count.get(f"vector_{number}") for number in numbers]
        wired = [None if tensors is None else from_wire(tensors) for tensors in given]
        defaults = {"steps": steps, "cfg": cfg, "denoise": denoise, "eta": eta, "seed": seed}
        defaults |= {f"weight_{number}": count[f"weight_{number}"] for number in numbers}
        cells = cells_of(across, down, defaults, [vector is not None for vector in wired])
        drawing = Drawing(model, clip, vae, (positive, negative), latent, wired, cells)
        across, down = (_named(axis, wired) for axis in (across, down))
        result = drawn(drawing, across, down, _note(defaults, across, down, wired))
        lines = [*result.lines, *drawing.lines()]
        shown = ui.PreviewImage(result.sheet, cls=cls).as_dict() | as_ui(*lines)
        return io.NodeOutput(result.sheet, result.pictures, result.settings, ui=shown)


class Result(NamedTuple):
    """sheet: [1, H, W, 3]. pictures: [N, H, W, 3]. settings: one line for each drawn cell."""

    sheet: torch.Tensor
    pictures: torch.Tensor
    settings: str
    lines: list[Line]


def drawn(drawing: Drawing, columns: Axis, rows: Axis, note: str) -> Result:
    """Draws all cells, and shows the growing sheet on the node. After an interruption, the result
    has the cells drawn so far; if there are none, raises the interruption again."""
    cells = drawing.cells
    bar = comfy.utils.ProgressBar(sum(cell.run.steps for cell in cells))
    pictures: dict[int, torch.Tensor] = {}
    sheet: Sheet | None = None
    lines, shown_at = [], -math.inf
    try:
        for number, images in drawing.pictures(bar.update_absolute):
            tile = joined([_picture(image) for image in images])
            sheet = sheet or Sheet(columns, rows, note, tile.size)
            sheet.put(number, tile)
            pictures[number] = images
            if bar.hook is not None and time.monotonic() - shown_at >= PAUSE:
                bar.update_absolute(bar.current, preview=("JPEG", sheet.image, PREVIEW))
                shown_at = time.monotonic()
    except InterruptProcessingException:
        if sheet is None:
            raise
        interruptions["LCMCompare"] += 1
        text = "Interrupted: {count} of {total} pictures are drawn."
        lines.append(Line(text, {"count": len(pictures), "total": len(cells)}, warning=True))
    assert sheet is not None
    values = {"count": len(pictures), "columns": len(columns.points), "rows": len(rows.points)}
    lines.append(Line("{count} pictures, {columns} x {rows}", values))
    numbers = sorted(pictures)
    image = torch.from_numpy(np.asarray(sheet.image, dtype=np.float32) / 255)[None]
    batch = torch.cat([pictures[number] for number in numbers])
    return Result(image, batch, "\n".join(cells[number].text for number in numbers), lines)


def _picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((255 * image).numpy().astype(np.uint8))


def _row(number: int) -> list[io.Input]:
    first = number == 1
    return [
        io.LoraModel.Input(
            f"vector_{number}", optional=True,
            tooltip=("The LCM-LoRA's vector." if first else "A style LoRA's vector, or any other.")
            + " Leave it empty if LoRA files or a job's checkpoints take its place.",
        ),
        weight_input(
            f"weight_{number}",
            f"Weight of vector {number}, unless it is compared. 0 leaves the vector out.",
            1.0 if first else 0.8,
        ),
    ]  # fmt: skip


def _axis(name: str, first: Sequence[str], tooltip: str) -> io.DynamicCombo.Input:
    """The input for an axis. The names of its inner inputs contain the axis, because apps show them
    alone."""

    def values(default: str) -> io.Input:
        # One tooltip for all kinds, because translations are found by the input's name alone.
        return io.String.Input(
            "values", display_name=f"values ({name})", default=default,
            tooltip="A list such as 1, 2, 4, 8, a range from:to:step such as 0.4:1.2:0.2, or both. "
            "For checkpoints, all or steps such as 100, 200.",
        )  # fmt: skip

    vector = io.Int.Input(
        "vector", display_name=f"vector ({name})", default=2, min=1, max=MOST_VECTORS,
        tooltip="The number of the vector, such as 2 for vector_2. LoRA files and checkpoints take "
        "its place, and get its weight.",
    )  # fmt: skip
    own = {
        "weight": [vector, values(NUMBERS["weight"].example)],
        "prompt": [
            io.String.Input(
                "prompts", display_name=f"prompts ({name})", default="", multiline=True,
                tooltip="One prompt per line. These prompts replace positive.",
            )
        ],
        "LoRA file": [
            vector,
            io.String.Input(
                "files", display_name=f"files ({name})", default="", multiline=True,
                tooltip="One LoRA per line, by its name in the loras folder. my-style-* stands "
                "for all files whose name begins with my-style-.",
            ),
        ],
        "job checkpoint": [
            vector,
            LCMJob.Input("job", tooltip="A job from Distil LCM-LoRA."),
            values("all"),
        ],
        "settings": [
            io.String.Input(
                "lines", display_name=f"lines ({name})", default="", multiline=True,
                tooltip="The settings of one picture per line, such as steps=4, weight_2=0.8. The "
                "output settings has such lines.",
            )
        ],
    }  # fmt: skip
    kinds = ("steps", "cfg", "weight", "prompt", "seed", "LoRA file", "denoise", "eta")
    options = [
        io.DynamicCombo.Option(
            kind, [] if kind == NONE else own.get(kind) or [values(NUMBERS[kind].example)]
        )
        for kind in (*first, *kinds, "job checkpoint", "settings")
    ]
    return io.DynamicCombo.Input(name, options=options, tooltip=tooltip)


def _axis_of(given: dict[str, Any], name: str) -> Axis:
    """The user's axis. Raises ValueError for values that cannot be used."""
    kind = given[name]
    if kind == NONE:
        return ALONE
    make: dict[str, Callable[[], Axis]] = {
        "weight": lambda: axes.of_numbers("weight", given["values"], given["vector"]),
        "prompt": lambda: axes.of_prompts(given["prompts"]),
        "LoRA file": lambda: axes.of_files(given["files"], lora_names(), given["vector"]),
        "job checkpoint": lambda: axes.of_checkpoints(
            given["job"], given["values"], jobs.checkpoint_steps(given["job"]), given["vector"]
        ),
        "settings": lambda: axes.of_settings(given["lines"]),
    }
    return make[kind]() if kind in make else axes.of_numbers(kind, given["values"])


def _named(axis: Axis, wired: Sequence[Vector | None]) -> Axis:
    """The axis with a readable title."""
    kind, _, number = axis.title.partition("_")
    vector = wired[int(number) - 1] if number else None
    if kind == "weight":
        title = f"weight of {_name(vector)}" if vector else f"weight of vector {number}"
        return Axis(title, axis.points)
    return Axis("LoRA" if kind == "lora" else axis.title, axis.points)


def _name(vector: Vector) -> str:
    return vector.source.removesuffix(".safetensors")


def _note(
    defaults: dict[str, Any], columns: Axis, rows: Axis, wired: Sequence[Vector | None]
) -> str:  # fmt: skip
    """The settings that all cells have in common."""
    changed = {name for axis in (columns, rows) for point in axis.points for name in point.changes}
    parts = []
    for name, value in defaults.items():
        kind, _, number = name.partition("_")
        if name in changed or (kind, value) in (("denoise", 1.0), ("eta", -1.0)):
            continue
        vector = wired[int(number) - 1] if number else None
        parts.append(f"{_name(vector) if vector else name} {plain(value)}")
    return " · ".join(parts)
