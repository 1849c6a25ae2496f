"""Which base model a LoRA was made for, told by its names and shapes, to say so in messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Shapes = Mapping[str, Sequence[int]]
"""Of each module's change, by its canonical name: [out, in, ...]"""

# Cross-attention width: the text features' size, the input of every attn2.to_k.
_BY_WIDTH = {768: "SD1.5", 1024: "SD2", 1280: "SDXL refiner"}
SDXL_TYPE = "SDXL type"
_BLOCKS = ("down_blocks_1", "down_blocks_2", "mid_block", "up_blocks_0", "up_blocks_1")
# The SDXL type differs in how many transformer blocks each attention of its blocks holds.
_SDXL_TYPES = {
    name: {
        f"{block}_attentions_{place}": depth
        for block, depths in zip(_BLOCKS, layout, strict=True) for place, depth in enumerate(depths)
    }
    for name, layout in {
        "SDXL": ((2, 2), (10, 10), (10,), (10, 10, 10), (2, 2, 2)),
        "SSD-1B": ((2, 2), (4, 4), (), (4, 4, 10), (2, 1, 1)),
        "Segmind Vega": ((1, 1), (2, 2), (), (2, 2, 2), (1, 1, 1)),
        "KOALA-1B": ((2,), (6,), (6,), (6, 6), (2, 2)),
        "KOALA-700M": ((2,), (5,), (), (5, 5), (2, 2)),
    }.items()
}  # fmt: skip

_CROSS_ATTENTION = re.compile(r"lora_unet_.*_attn2_to_[kv]")
_TRANSFORMER_BLOCK = re.compile(r"lora_unet_(\w+?_attentions_\d+)_transformer_blocks_(\d+)_.*")


@dataclass(frozen=True)
class Family:
    """A kind of UNet: `name` for people, `width` of its cross-attention (768, 1024, 2048, ...)."""

    name: str
    width: int

    def __str__(self) -> str:
        return f"{self.name} (cross-attention width {self.width})"


def family(width: int | None, depth: int | None = None) -> Family | None:
    """Family of a UNet with this cross-attention width and this many transformer blocks in its
    deepest down block; None where the width is unknown or belongs to no such UNet."""
    if width == 2048:
        of = {depths["down_blocks_2_attentions_0"]: name for name, depths in _SDXL_TYPES.items()}
        return Family(of.get(depth, SDXL_TYPE), width)
    return Family(_BY_WIDTH[width], width) if width in _BY_WIDTH else None


def cross_attention_width(shapes: Shapes) -> int | None:
    """Columns of the first cross-attention key or value projection, or None where there is none."""
    widths = (s[1] for name, s in shapes.items() if _CROSS_ATTENTION.fullmatch(name) and s[1:])
    return next(widths, None)


def family_of(shapes: Shapes) -> Family | None:
    """Family that the modules were made for, or None where they do not tell.

    All that a relative of SDXL has, SDXL has too: so a relative is it only where every attention
    is as deep as there, and else SDXL, or of the SDXL type, where a part may be left out.
    """
    width = cross_attention_width(shapes)
    if width != 2048:
        return family(width)
    depths: dict[str, int] = {}
    for name in shapes:
        if match := _TRANSFORMER_BLOCK.fullmatch(name):
            depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    for name, layout in _SDXL_TYPES.items():
        if depths == layout:
            return Family(name, width)
    holding = [
        name for name, layout in _SDXL_TYPES.items()
        if all(depth <= layout.get(attention, 0) for attention, depth in depths.items())
    ]  # fmt: skip
    return Family("SDXL" if holding == ["SDXL"] else SDXL_TYPE, width)


def require_one_family(made_for: Iterable[tuple[str, Shapes]]) -> None:
    """Raises ValueError where two of the vectors, (what it is called, its shapes), are known to be
    made for different base models."""
    known = [(source, kind) for source, shapes in made_for if (kind := family_of(shapes))]
    for source, kind in known[1:]:
        if kind.width != known[0][1].width:
            raise ValueError(
                f"{known[0][0]} was made for {known[0][1]} and {source} for {kind}. Only "
                "vectors for the same architecture can be added."
            )


def has_two_text_encoders(shapes: Shapes) -> bool:
    """Whether the modules belong to a model with two text encoders, as the SDXL type has."""
    return cross_attention_width(shapes) == 2048 or any(map(is_second_encoder, shapes))


def is_second_encoder(module: str) -> bool:
    """Whether a module belongs to a text encoder beside the first."""
    return module.startswith(("lora_te2_", "lora_te3_", "lora_te4_"))
