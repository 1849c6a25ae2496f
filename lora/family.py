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
# The SDXL type differs in how many transformer blocks its deepest down block holds.
_SDXL_BY_DEPTH = {2: "Segmind Vega", 4: "SSD-1B", 5: "KOALA-700M", 6: "KOALA-1B", 10: "SDXL"}

_CROSS_ATTENTION = re.compile(r"lora_unet_.*_attn2_to_[kv]")
_DEEPEST_BLOCK = re.compile(r"lora_unet_down_blocks_2_attentions_\d+_transformer_blocks_(\d+)_.*")


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
        return Family(_SDXL_BY_DEPTH.get(depth, SDXL_TYPE), width)
    return Family(_BY_WIDTH[width], width) if width in _BY_WIDTH else None


def cross_attention_width(shapes: Shapes) -> int | None:
    """Columns of the first cross-attention key or value projection, or None where there is none."""
    widths = (s[1] for name, s in shapes.items() if _CROSS_ATTENTION.fullmatch(name) and s[1:])
    return next(widths, None)


def family_of(shapes: Shapes) -> Family | None:
    """Family that the modules were made for, or None where they do not tell."""
    blocks = [int(m[1]) for name in shapes if (m := _DEEPEST_BLOCK.fullmatch(name))]
    return family(cross_attention_width(shapes), max(blocks) + 1 if blocks else None)


def require_one_family(made_for: Iterable[tuple[str, Shapes]]) -> None:
    """Raises ValueError where two of the vectors, (what it is called, its shapes), are known to be
    made for different base models."""
    known = [(source, kind) for source, shapes in made_for if (kind := family_of(shapes))]
    for source, kind in known[1:]:
        if kind.width != known[0][1].width:
            raise ValueError(
                f"{known[0][0]} was made for {known[0][1]} and {source} for {kind}; vectors add up "
                "only within one family of models."
            )


def has_two_text_encoders(shapes: Shapes) -> bool:
    """Whether the modules belong to a model with two text encoders, as the SDXL type has."""
    return cross_attention_width(shapes) == 2048 or any(map(is_second_encoder, shapes))


def is_second_encoder(module: str) -> bool:
    return module.startswith("lora_te2_")
