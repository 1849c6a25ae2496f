"""The node that applies an LCM-LoRA and sets the sampling."""

from __future__ import annotations

from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.v0_0_2 import io

from ..lora.family import choose, made_for
from ..lora.formats.files import fingerprint, read
from ..lora.host import apply
from ..samplers.families import FAMILIES
from ..samplers.host import offered, patch_sampling, record
from .host import lora_names, lora_path, weight_input
from .texts import acceleration, as_ui, of_load, of_sampling


class LCMLoRALoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMLoRALoader",
            display_name="Load LCM-LoRA",
            category="LCM-LoRA",
            essentials_category="Image Generation",
            description=(
                "Applies an LCM-LoRA, or a TCD, DMD2, Hyper-SD, PCM or Lightning LoRA, to a model "
                "and sets the model's sampling for it, so that 1 to 8 steps at cfg 1 to 2 give "
                "finished pictures. Use it with LCM KSampler. An LCM-LoRA also works with the "
                "KSampler node (sampler lcm, scheduler simple). A flow model (Flux, Qwen-Image, "
                "Wan) is sampled as the authors of its LoRA do."
            ),
            search_aliases=[
                "lcm",
                "lcm lora",
                "load lora",
                "few steps",
                "fast",
                "acceleration",
                "tcd",
                "dmd2",
                "hyper-sd",
                "pcm",
                "lightning",
                "qwen lightning",
                "flux turbo",
                "wan lightning",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint's model."),
                io.Combo.Input(
                    "lora_name",
                    options=lora_names(),
                    tooltip=(
                        "The LCM-LoRA, or another few-step LoRA, for this model's architecture "
                        "(SD1.5, SDXL, SSD-1B, or a flow model). The node refuses a LoRA for "
                        "another architecture. Between SDXL and its relatives (SSD-1B, Vega, "
                        "KOALA), and between Flux and Chroma, it applies what fits and warns you."
                    ),
                ),
                weight_input(
                    "strength",
                    "Weight of the LoRA. Most are made for 1; the node warns if yours is made for "
                    "another weight. 0 leaves it out.",
                ),
                io.Combo.Input(
                    "family",
                    options=["auto", *FAMILIES],
                    default="auto",
                    tooltip=(
                        "How the LoRA was distilled. This sets the timesteps and the noise. auto "
                        "reads the file's metadata, then its name. If neither names a family, it "
                        "uses lcm, or flow for a flow model. The node shows the choice."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL",
                    tooltip="The model with the LCM-LoRA applied and its sampling set.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: Any) -> tuple[str, int, int]:
        return fingerprint(lora_path(lora_name))

    @classmethod
    def execute(
        cls, model: ModelPatcher, lora_name: str, strength: float, family: str
    ) -> io.NodeOutput:
        vector = read(lora_path(lora_name))
        family, why = choose(family, vector.metadata, lora_name, *offered(model))
        made = made_for(vector.metadata, lora_name, family)
        loaded, _, coverage = apply(model, None, vector, strength, 0.0)
        record(model, loaded, acceleration(vector.source, made, strength))
        sampled = patch_sampling(loaded, family)
        lines = [*of_load(coverage, family, why), *of_sampling(sampled, strength, made)]
        return io.NodeOutput(sampled, ui=as_ui(*lines))
