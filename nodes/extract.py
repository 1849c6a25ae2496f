"""The node that makes a LoRA vector from the difference of two models."""

from __future__ import annotations

from dataclasses import replace

from comfy.model_patcher import ModelPatcher
from comfy_api.v0_0_2 import io

from ..lora.extract import extract
from ..lora.formats.metadata import of_transformer
from ..lora.formats.wire import to_wire
from ..lora.weights.host import detect, differences
from .host import device, watched

SEED = 0


class LCMLoRAExtract(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMLoRAExtract",
            display_name="Acceleration Vector from Models",
            category="LCM-LoRA",
            description=(
                "Makes a LoRA of the difference between two models. For an LCM, Turbo or Lightning "
                "checkpoint and the model it was distilled from, this is the acceleration alone. "
                "Use it on other models of the same architecture, or combine it with styles."
            ),
            search_aliases=["extract lora", "model difference", "lora from checkpoint", "subtract"],
            inputs=[
                io.Model.Input("distilled", tooltip="The fast model, or any other modified model."),
                io.Model.Input("base", tooltip="The model it was made from."),
                io.Int.Input(
                    "rank",
                    default=64,
                    min=1,
                    max=1024,
                    tooltip="Rank of the LoRA. The report says how much this rank leaves out.",
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="LORA_MODEL", tooltip="Distilled minus base, as a vector."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="The number of layers, and the relative error at this rank.",
                ),
            ],
        )

    @classmethod
    def execute(cls, distilled: ModelPatcher, base: ModelPatcher, rank: int) -> io.NodeOutput:
        vector, report = extract(
            differences(distilled, base, watched), rank, SEED, "distilled - base", device()
        )
        # A LoRA of a small model, or of a part of it, may not show what it is for.
        if architecture := detect(base):
            vector = replace(vector, metadata={**vector.metadata, **of_transformer(architecture)})
        return io.NodeOutput(to_wire(vector), report)
