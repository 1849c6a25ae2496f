"""The nodes that weight the blocks of a vector, and that protect an acceleration from a style."""

from __future__ import annotations

import math

from comfy_api.v0_0_2 import io

from ..lora.blocks import NAMES, PRESETS, parse_weights, weighted
from ..lora.formats.wire import Tensors, from_wire, to_wire
from ..lora.protect import protected
from ..samplers.report import Line
from .host import weight_input
from .texts import as_ui


class LCMLoRABlocks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMLoRABlocks",
            display_name="Weight LoRA Blocks",
            category="LCM-LoRA",
            description=(
                "Gives each part of a LoRA vector its own weight: input, middle and output blocks, "
                "attention and feed-forward, the text encoder. Use it when a style should change "
                "the look and not the composition, or the other way round."
            ),
            search_aliases=["lora block weight", "lbw", "block weights", "b-lora", "layer weights"],
            inputs=[
                io.LoraModel.Input(
                    "vector", tooltip="A vector from Load LoRA Vector or Combine LoRA Vectors."
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="all",
                    tooltip=(
                        "Weights that are often useful. SDXL style and SDXL content keep only the "
                        "block that holds the style or the content, according to B-LoRA."
                    ),
                ),
                io.String.Input(
                    "weights",
                    default="",
                    multiline=True,
                    tooltip=(
                        "Your own weights, multiplied with the preset's: output=0.8, "
                        f"feed_forward=0.5, down_blocks_1=0. Names: {', '.join(NAMES)}, a block's "
                        "own name, and rest for everything that no other name matches. If several "
                        "names match, their weights are multiplied."
                    ),
                ),
                weight_input("text_encoder", "Weight of the text encoder part; 0 leaves it out."),
            ],
            outputs=[
                io.LoraModel.Output(display_name="LORA_MODEL", tooltip="The weighted vector.")
            ],
        )

    @classmethod
    def execute(
        cls, vector: Tensors, preset: str, weights: str, text_encoder: float
    ) -> io.NodeOutput:
        text = f"text={text_encoder:g}" if text_encoder != 1 else ""
        texts = [part for part in (PRESETS[preset], weights.strip(), text) if part]
        lora = from_wire(vector)
        factors = [parse_weights(part) for part in texts]
        parse_weights(weights).require_blocks(lora)
        of_lora = [factor.of(lora) for factor in factors]

        def weight(module: str) -> float:
            return math.prod(factor(module) for factor in of_lora)

        result = weighted(lora, weight, "; ".join(texts) or "all")
        # Names from presets, and "text", may match no module. That is no error, so only show them.
        idle = [name for factor in factors for name in factor.idle(lora)]
        values = {"source": lora.source, "names": ", ".join(idle)}
        lines = [Line("{source} has no modules for {names}.", values)] if idle else []
        return io.NodeOutput(to_wire(result), ui=as_ui(*lines))


class LCMLoRAProtect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LCMLoRAProtect",
            display_name="Protect Acceleration",
            category="LCM-LoRA",
            description=(
                "Removes the part of a style LoRA that acts on the main directions of the "
                "LCM-LoRA. Few-step pictures then break up less when the two are combined. Put it "
                "between the style and Combine LoRA Vectors."
            ),
            search_aliases=["np-lora", "null space", "orthogonal", "lora conflict", "project"],
            inputs=[
                io.LoraModel.Input("style", tooltip="The style's vector."),
                io.LoraModel.Input(
                    "acceleration", tooltip="The LCM-LoRA's vector; it is not changed."
                ),
                io.Float.Input(
                    "share",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "How much of the interfering part to remove: 0 leaves the style as it is, "
                        "1 removes all of it. More makes few-step pictures cleaner and the style "
                        "weaker."
                    ),
                ),
            ],
            outputs=[
                io.LoraModel.Output(display_name="LORA_MODEL", tooltip="The changed style."),
                io.String.Output(
                    display_name="report", tooltip="How much of the style was removed."
                ),
            ],
        )

    @classmethod
    def execute(cls, style: Tensors, acceleration: Tensors, share: float) -> io.NodeOutput:
        vector, report = protected(from_wire(style), from_wire(acceleration), share)
        return io.NodeOutput(to_wire(vector), report)
