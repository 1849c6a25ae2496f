"""The acceleration of a distilled model, taken out as a LoRA vector."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..lora.extract import extract
from ..lora.host import differences
from ..lora.wire import to_wire

SEED = 0


class LCMLoRAExtract(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMLoRAExtract",
            display_name="Acceleration Vector from Models",
            category="LCM-LoRA",
            description=(
                "The difference of two models as a LoRA: of an LCM, Turbo or Lightning checkpoint "
                "and the model it was distilled from, this is the acceleration alone, to use with "
                "other models of the family or to combine with styles."
            ),
            search_aliases=["extract lora", "model difference", "lora from checkpoint", "subtract"],
            inputs=[
                io.Model.Input("distilled", tooltip="The fast model, or any that was changed."),
                io.Model.Input("base", tooltip="The model it was made from."),
                io.Int.Input(
                    "rank",
                    default=64,
                    min=1,
                    max=1024,
                    tooltip="Of the LoRA. The report tells what a rank leaves out.",
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="LORA_MODEL", tooltip="Distilled minus base: apply, combine, save."
                ),
                io.String.Output(
                    display_name="report", tooltip="Layers, and the relative error of the rank."
                ),
            ],
        )

    @classmethod
    def execute(cls, distilled, base, rank: int) -> io.NodeOutput:
        vector, report = extract(differences(distilled, base), rank, SEED, "distilled - base")
        return io.NodeOutput(to_wire(vector), report)
