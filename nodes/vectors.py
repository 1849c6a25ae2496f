"""The nodes that load, apply and save LoRA vectors."""

from __future__ import annotations

import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from comfy_api.v0_0_2 import io

from ..lora.family import FAMILY, recorded
from ..lora.formats.describe import describe
from ..lora.formats.files import DTYPES, fingerprint, read_named, write
from ..lora.formats.wire import Tensors, from_wire, to_wire
from ..lora.host import apply
from ..samplers.host import record
from ..samplers.report import Line
from .host import lora_names, lora_path, new_lora_path, weight_input
from .texts import acceleration, as_ui, of_coverage

CATEGORY = "LCM-LoRA"


class LCMLoRAVectorLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMLoRAVectorLoader",
            display_name="Load LoRA Vector",
            category=CATEGORY,
            description=(
                "Reads a LoRA file without applying it, so that you can combine it with others. "
                "It reads kohya, diffusers/PEFT, OneTrainer, SimpleTuner and native ComfyUI key "
                "names."
            ),
            search_aliases=["load lora", "lora vector", "lora model", "read lora"],
            inputs=[
                io.Combo.Input(
                    "lora_name", options=lora_names(), tooltip="A LoRA file (safetensors)."
                )
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="LORA_MODEL",
                    tooltip="The LoRA as a vector, in ComfyUI's key names.",
                ),
                io.String.Output(
                    display_name="info",
                    tooltip="What the file holds: architecture, modules, ranks and alphas.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str) -> tuple[str, int, int]:
        return fingerprint(lora_path(lora_name))

    @classmethod
    def execute(cls, lora_name: str) -> io.NodeOutput:
        vector = read_named(lora_path(lora_name), lora_name)
        return io.NodeOutput(to_wire(vector), describe(vector))


class LCMLoRAApply(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMLoRAApply",
            display_name="Apply LoRA Vector",
            category=CATEGORY,
            description=(
                "Adds a LoRA vector to a model and, if a CLIP is connected, to its text encoder. "
                "It refuses a LoRA for another architecture and names the modules that do not fit. "
                "It does not change the sampling, but it passes the LoRA's family on to LCM "
                "KSampler and LCM Model Sampling (auto)."
            ),
            search_aliases=["apply lora", "load lora model", "lora vector"],
            inputs=[
                io.Model.Input("model", tooltip="The model to add the vector to."),
                io.Clip.Input(
                    "clip", optional=True, tooltip="The text encoder, for LoRAs that change it too."
                ),
                io.LoraModel.Input(
                    "vector", tooltip="A vector from Load LoRA Vector or Combine LoRA Vectors."
                ),
                weight_input("strength_model", "Weight on the model; 0 leaves the model as it is."),
                weight_input("strength_clip", "Weight on the text encoder; 0 leaves it as it is."),
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
        cls,
        model: ModelPatcher,
        vector: Tensors,
        strength_model: float,
        strength_clip: float,
        clip: CLIP | None = None,
    ) -> io.NodeOutput:
        lora = from_wire(vector)
        applied, clip, coverage = apply(model, clip, lora, strength_model, strength_clip)
        fast = acceleration(lora.source, recorded(lora.metadata), strength_model)
        record(model, applied, fast)
        families = lora.metadata.get(FAMILY, "") if fast else ""
        return io.NodeOutput(applied, clip, ui=as_ui(*of_coverage(coverage, families)))


class LCMLoRASave(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMLoRASave",
            display_name="Save LoRA Vector",
            category=CATEGORY,
            description=(
                "Writes a LoRA vector as an ordinary LoRA file (ComfyUI's key names, alphas "
                "included) into the loras folder, where every LoRA loader finds it."
            ),
            search_aliases=["save lora", "export lora", "write lora"],
            is_output_node=True,
            inputs=[
                io.LoraModel.Input("vector", tooltip="The vector to save."),
                io.String.Input(
                    "filename",
                    default="lcm-lora-combined",
                    tooltip="Name within the loras folder. For a subfolder, write folder/name.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="fp16",
                    tooltip="Number format. fp16 is usual; fp32 is exact and twice as large.",
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip=(
                        "Replace a file of the same name. If off, an existing file is an error."
                    ),
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="file name", tooltip="The file's name as LoRA loaders show it."
                )
            ],
        )

    @classmethod
    def execute(cls, vector: Tensors, filename: str, dtype: str, overwrite: bool) -> io.NodeOutput:
        path = new_lora_path(filename)
        write(path, from_wire(vector), dtype, overwrite)
        name = str(path.relative_to(folder_paths.get_folder_paths("loras")[0]))
        return io.NodeOutput(name, ui=as_ui(Line("Saved {name}", {"name": name})))
