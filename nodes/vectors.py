"""LoRAs as vectors in weight space: load, combine by weights, apply, save."""

from __future__ import annotations

import folder_paths
from comfy_api.v0_0_2 import io

from ..lora.combine import exact
from ..lora.files import DTYPES, fingerprint, read, write
from ..lora.host import apply
from ..lora.reduce import truncated
from ..lora.wire import describe, from_wire, to_wire
from .host import lora_names, lora_path, new_lora_path, show

CATEGORY = "LCM-LoRA"
MAX_VECTORS = 8


class LCMLoRAVectorLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMLoRAVectorLoader",
            display_name="Load LoRA Vector",
            category=CATEGORY,
            description=(
                "Reads a LoRA file without applying it, to combine it with others. Takes kohya, "
                "diffusers/PEFT and native ComfyUI key names."
            ),
            search_aliases=["load lora", "lora vector", "lora model", "read lora"],
            inputs=[
                io.Combo.Input(
                    "lora_name", options=lora_names(), tooltip="A LoRA file (safetensors)."
                )
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="LORA_MODEL", tooltip="The LoRA as a vector, in kohya key names."
                ),
                io.String.Output(
                    display_name="info",
                    tooltip="What the file holds: base model, modules, ranks and alphas.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str) -> tuple[str, int, int]:
        return fingerprint(lora_path(lora_name))

    @classmethod
    def execute(cls, lora_name: str) -> io.NodeOutput:
        vector = read(lora_path(lora_name))
        return io.NodeOutput(to_wire(vector), describe(vector))


class LCMLoRACombine(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        rows = [_row(number) for number in range(1, MAX_VECTORS + 1)]
        counts = [
            io.DynamicCombo.Option(str(count), [field for row in rows[:count] for field in row])
            for count in range(2, MAX_VECTORS + 1)
        ]
        return io.Schema(
            node_id="LCMLoRACombine",
            display_name="Combine LoRA Vectors",
            category=CATEGORY,
            description=(
                "Adds LoRA vectors by weights: a style LoRA and the LCM-LoRA become one LoRA that "
                "paints the style in few steps. The LCM paper takes 1.0 for the LCM-LoRA and 0.8 "
                "for the style."
            ),
            search_aliases=["merge lora", "combine lora", "add lora", "lora sum", "mix lora"],
            inputs=[
                io.DynamicCombo.Input(
                    "count", options=counts, tooltip="How many vectors to combine."
                ),
                io.Combo.Input(
                    "method",
                    options=["exact", "svd"],
                    default="exact",
                    tooltip=(
                        "exact: the true weighted sum, with no error. Its rank is the sum of the "
                        "ranks, so the file grows accordingly. svd: the same sum, reduced to what "
                        "rank and keep_energy allow, with the least error there is."
                    ),
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip=(
                        "svd: the most ranks a module may have; 0 for no limit. The exact method "
                        "needs 0."
                    ),
                ),
                io.Float.Input(
                    "keep_energy",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip=(
                        "svd: share of the energy (the squared norm) of all modules together to "
                        "keep, with the fewest ranks; 0.99 is a relative error of 10 %. The exact "
                        "method needs 1."
                    ),
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="LORA_MODEL", tooltip="The combined vector: apply it or save it."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="Modules and ranks of every input and of the result.",
                ),
            ],
        )

    @classmethod
    def execute(cls, count: dict, method: str, rank: int, keep_energy: float) -> io.NodeOutput:
        if method == "exact" and (rank != 0 or keep_energy != 1.0):
            raise ValueError(
                f"The method exact keeps every rank, so it cannot honour rank {rank} and "
                f"keep_energy {keep_energy:g}; choose svd, or set rank to 0 and keep_energy to 1."
            )
        numbers = range(1, int(count["count"]) + 1)
        vectors = [from_wire(count[f"vector_{number}"]) for number in numbers]
        combined, report = exact(vectors, [count[f"weight_{number}"] for number in numbers])
        if method == "svd":
            combined, kept = truncated(combined, rank, keep_energy)
            report = f"{report}\n{kept}"
        return io.NodeOutput(to_wire(combined), report)


def _row(number: int) -> list[io.Input]:
    first = number == 1
    return [
        io.LoraModel.Input(
            f"vector_{number}",
            tooltip="The LCM-LoRA's vector." if first else "A style LoRA's vector, or any other.",
        ),
        io.Float.Input(
            f"weight_{number}",
            default=1.0 if first else 0.8,
            min=-10.0,
            max=10.0,
            step=0.01,
            tooltip=f"Weight of vector {number}; negative takes it away, 0 leaves it out.",
        ),
    ]


class LCMLoRAApply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMLoRAApply",
            display_name="Apply LoRA Vector",
            category=CATEGORY,
            description=(
                "Adds a LoRA vector to a model and, where a CLIP is connected, to its text "
                "encoder. Refuses a LoRA of another family and names the modules that do not fit. "
                "Sampling is left as it is: add LCM Model Sampling or use LCM KSampler."
            ),
            search_aliases=["apply lora", "load lora model", "lora vector"],
            inputs=[
                io.Model.Input("model", tooltip="The model to add the vector to."),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoder, for LoRAs that change it too.",
                ),
                io.LoraModel.Input("vector", tooltip="From Load LoRA Vector or Combine."),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Weight on the model; 0 leaves the model as it is.",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Weight on the text encoder; 0 leaves it as it is.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the vector added."),
                io.Clip.Output(
                    display_name="CLIP",
                    tooltip="The text encoder with the vector added; empty if none is connected.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, vector, strength_model: float, strength_clip: float, clip=None
    ) -> io.NodeOutput:
        model, clip, coverage = apply(model, clip, from_wire(vector), strength_model, strength_clip)
        show(str(coverage))
        return io.NodeOutput(model, clip)


class LCMLoRASave(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMLoRASave",
            display_name="Save LoRA Vector",
            category=CATEGORY,
            description=(
                "Writes a LoRA vector as an ordinary LoRA file (kohya key names, alphas included) "
                "into the loras folder, where every LoRA loader finds it."
            ),
            search_aliases=["save lora", "export lora", "write lora"],
            is_output_node=True,
            inputs=[
                io.LoraModel.Input("vector", tooltip="The vector to save."),
                io.String.Input(
                    "filename",
                    default="lcm-lora-combined",
                    tooltip="Name within the loras folder; subfolders as folder/name.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="fp16",
                    tooltip="Number format: fp16 is usual and small, fp32 is exact and twice that.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Replace a file of the same name; otherwise that is an error.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="file name", tooltip="The file's name as LoRA loaders show it."
                )
            ],
        )

    @classmethod
    def execute(cls, vector, filename: str, dtype: str, overwrite: bool) -> io.NodeOutput:
        path = new_lora_path(filename)
        write(path, from_wire(vector), dtype, overwrite)
        name = str(path.relative_to(folder_paths.get_folder_paths("loras")[0]))
        show(f"Saved {name}")
        return io.NodeOutput(name)
