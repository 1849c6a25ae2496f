"""The node that applies an acceleration and styles together, one LoRA a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.v0_0_2 import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..lora.atomic import sha256
from ..lora.delta import Vector
from ..lora.family import choose, made_for, recorded
from ..lora.formats.facts import facts, lines
from ..lora.formats.files import fingerprint, read, read_named
from ..lora.formats.wire import LoraModel, to_wire
from ..lora.host import Coverage, apply
from ..lora.stack import added
from ..samplers.families import FAMILIES
from ..samplers.host import offered, patch_sampling, record
from .host import lora_names, lora_path, weight_input
from .texts import acceleration, as_ui, of_rows, of_sampling

MOST_ROWS = 8
NONE = "None"


class Row(NamedTuple):
    """A LoRA of the stack, by its name in ComfyUI's lists, and its two weights."""

    name: str
    weight: float
    text_weight: float

    @property
    def weights(self) -> str:
        """The weights as text; a single number if they are equal."""
        numbers = dict.fromkeys((f"{self.weight:g}", f"{self.text_weight:g}"))
        return " / ".join(numbers)


class LCMLoRAStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        rows = [_inputs(number) for number in range(1, MOST_ROWS + 1)]
        counts = [
            io.DynamicCombo.Option(str(count), [field for row in rows[:count] for field in row])
            for count in range(1, MOST_ROWS + 1)
        ]
        return io.Schema(
            node_id="LCMLoRAStack",
            display_name="Few-step LoRA Stack",
            category="LCM-LoRA",
            essentials_category="Image Generation",
            description=(
                "Applies an LCM-LoRA, or another few-step LoRA, and up to 8 styles to a model, and "
                "sets the model's sampling for it: Load LCM-LoRA and a LoRA loader for each style "
                "in one node. Each row has a switch and two weights. Use it with LCM KSampler."
            ),
            search_aliases=[
                "lora stack",
                "lora stacker",
                "power lora loader",
                "multi lora",
                "load loras",
                "several loras",
                "lora info",
                "trigger words",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint's model."),
                io.Clip.Input(
                    "clip", optional=True, tooltip="The text encoder, for LoRAs that change it too."
                ),
                io.Combo.Input(
                    "lora_name",
                    options=lora_names(),
                    tooltip=(
                        "The LCM-LoRA, or another few-step LoRA, for this model's architecture. "
                        "Its family sets how the model is sampled."
                    ),
                ),
                weight_input(
                    "strength",
                    "Weight of the few-step LoRA. Most are made for 1; 0 leaves it out.",
                ),
                io.Combo.Input(
                    "family",
                    options=["auto", *FAMILIES],
                    default="auto",
                    tooltip=(
                        "How the few-step LoRA was distilled, as in Load LCM-LoRA. auto reads the "
                        "file's metadata, then its name. If neither names a family, it uses lcm, "
                        "or flow for a flow model."
                    ),
                ),
                io.DynamicCombo.Input(
                    "count",
                    options=counts,
                    tooltip=(
                        "How many rows the node has. Right-click the node to move or remove a row."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="The model with all LoRAs applied and its sampling set.",
                ),
                io.Clip.Output(
                    display_name="CLIP",
                    tooltip="The text encoder with the LoRAs; empty if none is connected.",
                ),
                io.LoraModel.Output(
                    display_name="LORA_MODEL",
                    tooltip="The exact sum of these LoRAs as one vector: save it or combine it.",
                ),
                io.String.Output(
                    display_name="info",
                    tooltip=(
                        "What was applied, and what each file's metadata says: architecture, rank, "
                        "family, trigger words, training."
                    ),
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls, lora_name: str, count: dict[str, Any] | None = None, **_: Any
    ) -> list[tuple[str, int, int]]:
        # A connected input is None here, so its row may be on.
        connected = [key for key, value in (count or {}).items() if value is None]
        maybe = {key: True for key in connected if not key.startswith("lora_")}
        names = [lora_name, *(row.name for row in _rows((count or {}) | maybe))]
        return [fingerprint(lora_path(name)) for name in names]

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        lora_name: str,
        strength: float,
        family: str,
        count: dict[str, Any],
        clip: CLIP | None = None,
    ) -> io.NodeOutput:
        path = lora_path(lora_name)
        fast = read(path)
        family, why = choose(family, fast.metadata, lora_name, *offered(model))
        made = made_for(fast.metadata, lora_name, family)
        metadata = {**fast.metadata, **(made.metadata() if made else {})}
        fast = replace(fast, metadata=metadata, sha256=sha256(path))
        rows = [Row(lora_name, strength, strength), *_rows(count)]
        vectors = [fast, *(read_named(lora_path(row.name), row.name) for row in rows[1:])]
        coverages = []
        for vector, row in zip(vectors, rows, strict=True):
            before = model
            model, clip, coverage = apply(model, clip, vector, row.weight, row.text_weight)
            record(
                before, model, acceleration(vector.source, recorded(vector.metadata), row.weight)
            )
            coverages.append(coverage)
        total, report = _total(vectors, rows)
        weights = [row.weights for row in rows]
        model = patch_sampling(model, family)
        texts = of_rows(list(zip(coverages, weights, strict=True)), family, why)
        texts += of_sampling(model, strength, made)
        info = [
            _info(vector, row, coverage)
            for vector, row, coverage in zip(vectors, rows, coverages, strict=True)
        ]
        return io.NodeOutput(
            model,
            clip,
            total,
            "\n\n".join([*info, report]),
            ui=as_ui(*texts),
        )


def _inputs(number: int) -> list[io.Input]:
    return [
        io.Boolean.Input(
            f"on_{number}",
            default=True,
            tooltip=f"Whether row {number} is applied. Off keeps its LoRA and weights for later.",
        ),
        io.Combo.Input(
            f"lora_{number}",
            options=[NONE, *lora_names()],
            default=NONE,
            tooltip=f"The LoRA of row {number}: a style, or any other. None leaves the row empty.",
        ),
        weight_input(
            f"weight_{number}",
            f"Weight of LoRA {number} on the model. A negative weight subtracts it.",
            0.8,
        ),
        weight_input(
            f"text_weight_{number}",
            f"Weight of LoRA {number} on the text encoder, if a CLIP is connected.",
            0.8,
        ),
    ]


def _rows(count: dict[str, Any]) -> list[Row]:
    """The rows that are on and name a LoRA, without those whose weights are both 0."""
    rows = [
        Row(count[f"lora_{n}"], count[f"weight_{n}"], count[f"text_weight_{n}"])
        for n in range(1, int(count.get("count", 0)) + 1)
        if count[f"on_{n}"]
    ]
    return [row for row in rows if row.name != NONE and (row.weight or row.text_weight)]


def _total(
    vectors: Sequence[Vector], rows: Sequence[Row]
) -> tuple[LoraModel | ExecutionBlocker, str]:
    """The sum as a vector, and a report. Some LoRAs can be applied but not added up, such as DoRA:
    then only a node that is connected to the sum stops, and says why."""
    try:
        parts = [(v, row.weight, row.text_weight) for v, row in zip(vectors, rows, strict=True)]
        vector, report = added(parts)
    except ValueError as error:
        return ExecutionBlocker(f"The LoRAs have no sum. {error}"), f"No sum: {error}"
    return to_wire(vector), report


def _info(vector: Vector, row: Row, coverage: Coverage) -> str:
    """How much of a LoRA was applied, and what its file says about itself."""
    head = f"{row.weights} x {row.name}: {coverage.taken} of {coverage.total} modules applied"
    return "\n".join([head, *(f"  {line}" for line in lines(facts(vector, row.name)))])
