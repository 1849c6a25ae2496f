"""The node most people need: an LCM-LoRA on a model, with its sampling set."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..lora.files import fingerprint, read
from ..lora.host import apply
from ..samplers.host import patch_sampling
from .host import lora_names, lora_path, show

# A file does not say which distillation it came from, and LCM is the only one known so far.
SAMPLING = {"auto": "lcm", "lcm": "lcm"}


class LCMLoRALoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMLoRALoader",
            display_name="Load LCM-LoRA",
            category="LCM-LoRA",
            description=(
                "Applies an LCM-LoRA to a model and sets the model's sampling for it, so that 1 to "
                "8 steps at cfg 1 to 2 give finished pictures. Works with LCM KSampler, and with "
                "the KSampler node (sampler lcm, scheduler simple)."
            ),
            search_aliases=["lcm", "lcm lora", "load lora", "few steps", "fast", "acceleration"],
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint's model."),
                io.Combo.Input(
                    "lora_name",
                    options=lora_names(),
                    tooltip=(
                        "The LCM-LoRA made for this kind of model (SD1.5, SDXL, SSD-1B). Files of "
                        "another kind are refused."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Weight of the LoRA. 1 is what it was trained for; 0 leaves it out.",
                ),
                io.Combo.Input(
                    "family",
                    options=list(SAMPLING),
                    default="auto",
                    tooltip="How the LoRA was distilled, which decides the sampling. Keep auto.",
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
    def fingerprint_inputs(cls, lora_name: str, **_) -> tuple[str, int, int]:
        return fingerprint(lora_path(lora_name))

    @classmethod
    def execute(cls, model, lora_name: str, strength: float, family: str) -> io.NodeOutput:
        vector = read(lora_path(lora_name))
        model, _, coverage = apply(model, None, vector, strength, 0.0)
        show(str(coverage))
        return io.NodeOutput(patch_sampling(model, family=SAMPLING[family]))
