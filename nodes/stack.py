"""To and from the LORA_STACK of other packs, whose entries are a file name and two strengths."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..lora.stack import of_stack
from ..lora.wire import to_wire
from .host import lora_names, lora_path

STACK = io.Custom("LORA_STACK")


class LCMLoRAFromStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMLoRAFromStack",
            display_name="LoRA Vector from Stack",
            category="LCM-LoRA",
            description=(
                "Adds up the LoRAs of another pack's LoRA stack, exactly, with their strengths. "
                "The result does the same as applying these LoRAs one after the other."
            ),
            search_aliases=["lora stack", "lora stacker", "unpack stack"],
            inputs=[
                STACK.Input("lora_stack", tooltip="A stack from any pack's LoRA stacker."),
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="LORA_MODEL",
                    tooltip=(
                        "The weighted sum of the stack's LoRAs. Combine it with the LCM-LoRA's "
                        "vector."
                    ),
                ),
                io.String.Output(display_name="report", tooltip="What was added up."),
            ],
        )

    @classmethod
    def execute(cls, lora_stack) -> io.NodeOutput:
        vector, report = of_stack(lora_stack, lora_path)
        return io.NodeOutput(to_wire(vector), report)


class LCMLoRAToStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMLoRAToStack",
            display_name="LoRA Stack from Saved Vector",
            category="LCM-LoRA",
            description=(
                "Puts a LoRA file, such as one that Save LoRA Vector has just written, into a "
                "LoRA stack for the nodes of other packs."
            ),
            search_aliases=["lora stack", "lora stacker", "pack stack"],
            inputs=[
                io.String.Input(
                    "file_name",
                    default="",
                    tooltip=(
                        "The file's name as LoRA loaders show it. Connect the file name of Save "
                        "LoRA Vector."
                    ),
                ),
                io.Float.Input(
                    "strength_model", default=1.0, min=-10.0, max=10.0, step=0.01,
                    tooltip="Weight on the model.",
                ),
                io.Float.Input(
                    "strength_clip", default=1.0, min=-10.0, max=10.0, step=0.01,
                    tooltip="Weight on the text encoder.",
                ),
                STACK.Input(
                    "lora_stack", optional=True, tooltip="A stack to append the file to."
                ),
            ],
            outputs=[
                STACK.Output(display_name="LORA_STACK", tooltip="The stack, with this file last.")
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, file_name: str, strength_model: float, strength_clip: float, lora_stack=None
    ) -> io.NodeOutput:
        if file_name not in lora_names():
            raise ValueError(
                f"There is no LoRA file {file_name!r}. Expected a name as LoRA loaders show it; "
                "connect the file name of Save LoRA Vector."
            )
        return io.NodeOutput([*(lora_stack or []), (file_name, strength_model, strength_clip)])
