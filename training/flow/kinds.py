"""The flow models that can be distilled: ComfyUI's classes, and how to recognise their files.

A file is recognised by the names of weights that no other kind has, without loading it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# The classes of comfy.model_base that were tested, and what ComfyUI must know to tell the kind of
# a text encoder (comfy.sd.CLIPType). Z-Image is a Lumina2, and Wan draws a video of one frame.
FLOW_MODELS = {
    "SD3": "SD3", "Lumina2": "LUMINA2", "QwenImage": "QWEN_IMAGE", "Flux": "FLUX",
    "LongCatImage": "LONGCAT_IMAGE", "Chroma": "CHROMA", "Flux2": "FLUX2",
    "Anima": "STABLE_DIFFUSION", "WAN21": "WAN",
}  # fmt: skip
_GUIDANCE = "guidance_in.in_layer.weight"  # of Flux-dev and Flux2-dev
_FLUX = "double_blocks.0.img_attn.qkv.weight", "img_in.weight", "txt_in.weight"


@dataclass(frozen=True)
class Kind:
    """A kind of flow model, as the file of its network shows it.

    Attributes:
        name: of the architecture.
        marks: names of weights that it has, but no later kind in KINDS.
        text: the weight whose inputs are the text's features; if "", `width` is their number.
        tokens: of a short caption; if ComfyUI pads captions, the padded length.
        pooled: the number of features of the whole caption.
        resolution: the side in pixels of the pictures that it is made for.
        channels, shrink: of the latents; a latent cell is `shrink` pixels wide and high.
    """

    name: str
    marks: tuple[str, ...]
    text: str
    tokens: int
    pooled: int = 0
    width: int = 0
    resolution: int = 1024
    channels: int = 16
    shrink: int = 8

    def text_width(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        return shapes[self.text][1] if self.text else self.width


KINDS = (
    Kind(
        "Flux2", (*_FLUX, "double_stream_modulation_img.lin.weight"), "txt_in.weight", 512,
        channels=128, shrink=16,
    ),
    Kind("Chroma", (*_FLUX, "distilled_guidance_layer.in_proj.weight"), "txt_in.weight", 32),
    Kind("Flux", (*_FLUX, "vector_in.in_layer.weight"), "txt_in.weight", 256, pooled=768),
    Kind("LongCatImage", (*_FLUX, "time_in.in_layer.weight"), "txt_in.weight", 512),
    Kind(
        "SD3", ("joint_blocks.0.x_block.attn.qkv.weight", "context_embedder.weight"),
        "context_embedder.weight", 154, pooled=2048,
    ),
    Kind(
        "Qwen-Image", ("transformer_blocks.0.attn.add_q_proj.weight", "txt_in.weight"),
        "txt_in.weight", 32,
    ),
    Kind(
        "Z-Image", ("layers.0.attention.qkv.weight", "cap_embedder.1.weight", "cap_pad_token"),
        "cap_embedder.1.weight", 32,
    ),
    Kind(
        "Lumina2", ("layers.0.attention.qkv.weight", "cap_embedder.1.weight"),
        "cap_embedder.1.weight", 64,
    ),
    Kind(
        "Anima", ("blocks.0.self_attn.q_proj.weight", "llm_adapter.embed.weight"), "", 32,
        width=1024,
    ),
    # Made for 832 x 480 pixels.
    Kind(
        "Wan", ("blocks.0.self_attn.q.weight", "text_embedding.0.weight"),
        "text_embedding.0.weight", 512, resolution=640,
    ),
)  # fmt: skip


def kind_of(shapes: Mapping[str, tuple[int, ...]]) -> Kind | None:
    """The kind of a network with weights of these shapes, by their names in it."""
    return next((kind for kind in KINDS if all(mark in shapes for mark in kind.marks)), None)


def has_guidance(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the network has an input for the guidance scale."""
    return _GUIDANCE in shapes
