"""The architecture of a base model (SD1.5, Flux, ...), recognised by layer names and shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .formats.module_names import is_text, is_unet
from .formats.transformers import recognised

Shapes = Mapping[str, Sequence[int]]
"""The shape of each module's change, [out, in, ...], by the module's canonical name."""

# By the width of the text features: the number of inputs of every attn2.to_k.
_BY_WIDTH = {768: "SD1.5", 1024: "SD2", 1280: "SDXL refiner"}
DOUBT = "It seems made for {made}; on {actual} its effect may be weaker."
SDXL_TYPE = "SDXL type"
_BLOCKS = ("down_blocks_1", "down_blocks_2", "mid_block", "up_blocks_0", "up_blocks_1")
# Models of the SDXL type differ in the number of transformer blocks in each attention.
_SDXL_TYPES = {
    name: {
        f"{block}_attentions_{place}": depth
        for block, depths in zip(_BLOCKS, layout, strict=True)
        for place, depth in enumerate(depths)
    }
    for name, layout in {
        "SDXL": ((2, 2), (10, 10), (10,), (10, 10, 10), (2, 2, 2)),
        "SSD-1B": ((2, 2), (4, 4), (), (4, 4, 10), (2, 1, 1)),
        "Segmind Vega": ((1, 1), (2, 2), (), (2, 2, 2), (1, 1, 1)),
        "KOALA-1B": ((2,), (6,), (6,), (6, 6), (2, 2)),
        "KOALA-700M": ((2,), (5,), (), (5, 5), (2, 2)),
    }.items()
}

OR = " or "
# Models whose LoRAs mostly fit each other.
_KIN = {name: SDXL_TYPE for name in _SDXL_TYPES} | {"Chroma": "Flux"}
_CROSS_ATTENTION = re.compile(r"lora_unet_.*_attn2_to_[kv]")
_TRANSFORMER_BLOCK = re.compile(r"lora_unet_(\w+?_attentions_\d+)_transformer_blocks_(\d+)_.*")


@dataclass(frozen=True)
class Architecture:
    """The kind of a model.

    Attributes:
        name: for people, such as "SD1.5". Several names, joined by "or", if the modules fit several
            architectures.
        width: of a UNet's cross-attention, or of a transformer's layers. None if the modules do not
            show it.
        is_unet: whether it is a UNet of a Stable Diffusion type.
    """

    name: str
    width: int | None
    is_unet: bool = True

    @property
    def kin(self) -> frozenset[str]:
        """The groups of related models that it may belong to."""
        return frozenset(_KIN.get(name, name) for name in self.name.split(OR))

    def fits(self, other: Architecture) -> bool:
        """Whether a LoRA for one may be added to the other, at least in part."""
        widths = {self.width, other.width} - {None}
        return len(widths) < 2 and not self.kin.isdisjoint(other.kin)

    def is_surely(self, other: Architecture) -> bool:
        """Whether `other` is one of the kinds that this may be."""
        return other.name in self.name.split(OR)

    def __str__(self) -> str:
        if self.width is None:
            return self.name
        what = "cross-attention width" if self.is_unet else "width"
        return f"{self.name} ({what} {self.width})"


def architecture(width: int | None, depth: int | None = None) -> Architecture | None:
    """The architecture with this cross-attention width and this number of transformer blocks in its
    deepest down block. None if the width is unknown or belongs to none of these UNets."""
    if width == 2048:
        depths = {layout["down_blocks_2_attentions_0"]: n for n, layout in _SDXL_TYPES.items()}
        return Architecture(depths.get(depth or 0, SDXL_TYPE), width)
    return Architecture(_BY_WIDTH[width], width) if width in _BY_WIDTH else None


def cross_attention_width(shapes: Shapes) -> int | None:
    """The columns of a UNet's first cross-attention key or value. None if there is none."""
    widths = (
        shape[1]
        for name, shape in shapes.items()
        if _CROSS_ATTENTION.fullmatch(name) and shape[1:] and is_unet(name)
    )
    return next(widths, None)


def architecture_of(shapes: Shapes) -> Architecture | None:
    """The architecture that the modules were made for. None if they do not show it.

    SDXL has every layer that its relatives have. Modules therefore belong to a relative only if
    every attention is exactly as deep as in the relative. Otherwise they belong to SDXL, or to
    "SDXL type" if they could also be a part of a relative's modules.
    """
    if not any(map(is_unet, shapes)):
        return _transformer({name: shape for name, shape in shapes.items() if not is_text(name)})
    width = cross_attention_width(shapes)
    if width != 2048:
        return architecture(width)
    depths: dict[str, int] = {}
    for name in shapes:
        if match := _TRANSFORMER_BLOCK.fullmatch(name):
            depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    for name, layout in _SDXL_TYPES.items():
        if depths == layout:
            return Architecture(name, width)
    possible = [
        name
        for name, layout in _SDXL_TYPES.items()
        if all(depth <= layout.get(attention, 0) for attention, depth in depths.items())
    ]
    return Architecture("SDXL" if possible == ["SDXL"] else SDXL_TYPE, width)


def _transformer(shapes: Shapes) -> Architecture | None:
    kinds, width = recognised(shapes)
    name = OR.join(kind.name for kind in kinds)
    return Architecture(name, width, is_unet=False) if kinds else None


def require_one_architecture(vectors: Iterable[tuple[str, Shapes]]) -> None:
    """Raises ValueError if two vectors were made for different architectures.

    vectors: the source and the shapes of each.
    """
    recognised = [(source, kind) for source, shapes in vectors if (kind := architecture_of(shapes))]
    for source, kind in recognised[1:]:
        first_source, first_kind = recognised[0]
        if not kind.fits(first_kind):
            raise ValueError(
                f"{first_source} was made for {first_kind} and {source} for {kind}. Only "
                "vectors for the same architecture can be added."
            )


def has_two_text_encoders(shapes: Shapes) -> bool:
    """Whether the modules belong to a model with two text encoders, such as SDXL."""
    return cross_attention_width(shapes) == 2048 or any(map(is_second_encoder, shapes))


def is_second_encoder(module: str) -> bool:
    """Whether a module belongs to the second, third or fourth text encoder."""
    return module.startswith(("lora_te2_", "lora_te3_", "lora_te4_"))
