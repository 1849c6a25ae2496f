"""The nodes for the LORA_STACK of other packs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.v0_0_2 import io

from ..lora.formats.wire import to_wire
from ..lora.stack import of_stack
from .host import lora_names, lora_path, weight_input

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
            inputs=[STACK.Input("lora_stack", tooltip="A stack from any pack's LoRA stacker.")],
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
    def execute(cls, lora_stack: Sequence[Any] | None) -> io.NodeOutput:
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
                weight_input("strength_model", "Weight on the model."),
                weight_input("strength_clip", "Weight on the text encoder."),
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
        cls,
        file_name: str,
        strength_model: float,
        strength_clip: float,
        lora_stack: Sequence[Any] | None = None,
    ) -> io.NodeOutput:
        if file_name not in lora_names():
            raise ValueError(
                f"There is no LoRA file {file_name!r}. Expected a name as LoRA loaders show it; "
                "connect the file name of Save LoRA Vector."
            )
        return io.NodeOutput([*(lora_stack or []), (file_name, strength_model, strength_clip)])
