"""The node that combines LoRA vectors."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io

from ..lora.elementwise.table import RULES
from ..lora.formats.searched import read_weights
from ..lora.formats.wire import from_wire, to_wire
from ..lora.methods import METHODS, Settings, combine
from ..samplers.report import Line
from .host import device, watched, weight_input
from .overlap import overlap
from .texts import as_ui

MAX_VECTORS = 8


class LCMLoRACombine(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        rows = [_row(number) for number in range(1, MAX_VECTORS + 1)]
        counts = [
            io.DynamicCombo.Option(str(count), [field for row in rows[:count] for field in row])
            for count in range(2, MAX_VECTORS + 1)
        ]
        rules = "; ".join(f"{rule.name}: {rule.says}" for rule in RULES.values())
        return io.Schema(
            node_id="LCMLoRACombine",
            display_name="Combine LoRA Vectors",
            category="LCM-LoRA",
            description=(
                "Adds up LoRA vectors, each with a weight. A style LoRA and the LCM-LoRA become "
                "one LoRA that draws the style in a few steps. The LCM-LoRA paper uses 1.0 for "
                "the LCM-LoRA and 0.8 for the style."
            ),
            search_aliases=[
                "merge lora", "combine lora", "add lora", "lora sum", "mix lora", *RULES
            ],
            inputs=[
                io.DynamicCombo.Input(
                    "count", options=counts, tooltip="How many vectors to combine."
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="exact",
                    tooltip=(
                        "exact: the weighted sum, without any error. Its rank is the sum of the "
                        "ranks, so the file grows accordingly. svd: the same sum, reduced as far "
                        "as rank, keep_energy and max_error allow, with the smallest possible "
                        f"error. {rules}. These rules take minutes on SDXL and reduce their "
                        "result to the given rank."
                    ),
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip=(
                        "Maximum rank of a module. 0 means no limit for svd, and the sum of the "
                        "ranks for the rules. exact needs 0."
                    ),
                ),
                io.Float.Input(
                    "keep_energy",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip=(
                        "svd: share of the energy (the squared norm of all modules together) to "
                        "keep, with as few ranks as possible. 0.99 gives a relative error of 10 %. "
                        "The other methods need 1."
                    ),
                ),
                io.Float.Input(
                    "max_error",
                    default=0.0,
                    min=0.0,
                    max=0.99,
                    step=0.001,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "svd: relative error to allow over all modules together. This is another "
                        "way to set keep_energy: 0.1 means 0.99 of the energy. 0 switches it off. "
                        "If both are set, the stricter one counts. The other methods need 0."
                    ),
                ),
                io.Float.Input(
                    "density",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip=f"{', '.join(RULES)}: share of each vector's values to keep.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=False,  # a new seed would merge again
                    optional=True,
                    advanced=True,
                    tooltip="dare, della: random seed for the values that are dropped.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    optional=True,
                    force_input=True,
                    tooltip=(
                        "Replaces the weights above: the weights of Find LoRA Weights, or the info "
                        "of a file that it made. One line for each vector, such as "
                        "0.8 x style.safetensors. If nothing is connected, the weights above count."
                    ),
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="LORA_MODEL", tooltip="The combined vector: apply it or save it."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip=(
                        "Modules and ranks of the inputs and the result; for exact and svd, the "
                        "angles between the inputs; and what a reduction loses in each part."
                    ),
                ),
                io.Image.Output(
                    display_name="overlap",
                    tooltip=(
                        "Where the vectors support or fight each other: how large the change of "
                        "each vector is in every block, and its angle to vector 1."
                    ),
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        count: dict[str, Any],
        method: str,
        rank: int,
        keep_energy: float,
        max_error: float = 0.0,
        density: float = 0.5,
        seed: int = 0,
        weights: str = "",
    ) -> io.NodeOutput:
        settings = Settings(method, rank, keep_energy, max_error, density, seed)
        numbers = range(1, int(count["count"]) + 1)
        vectors = [from_wire(count[f"vector_{number}"]) for number in numbers]
        if weights.strip():
            factors = read_weights(weights, [vector.source for vector in vectors])
        else:
            factors = [count[f"weight_{number}"] for number in numbers]
        combined, report, grams = combine(vectors, factors, settings, device(), watched)
        ranks = combined.ranks().replace(" to ", "–")
        made = {"method": method, "count": len(combined.modules()), "rank": ranks}
        line = Line("{method}: {count} modules, rank {rank}", made)
        names = [v.source for v, factor in zip(vectors, factors, strict=True) if factor != 0]
        return io.NodeOutput(to_wire(combined), report, overlap(grams, names), ui=as_ui(line))


def _row(number: int) -> list[io.Input]:
    first = number == 1
    return [
        io.LoraModel.Input(
            f"vector_{number}",
            tooltip="The LCM-LoRA's vector." if first else "A style LoRA's vector, or any other.",
        ),
        weight_input(
            f"weight_{number}",
            f"Weight of vector {number}. A negative weight subtracts it; 0 leaves it out.",
            1.0 if first else 0.8,
        ),
    ]
