"""The place and kind of a module in its model, and weights for them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches

from .delta import Vector
from .family import forgotten, scaled
from .formats.metadata import recipe
from .formats.module_names import UNET, in_doubt, is_text, is_unet
from .formats.transformers import flat
from .slices import own_paths

# By the beginning of a canonical name, or by a part of it. The first match counts.
_PLACES = (
    ("middle", re.compile(rf"{UNET}mid(dle)?_block")),
    ("output", re.compile(rf"{UNET}(up_blocks|output_blocks|conv_out|conv_norm_out)")),
    (
        "input",
        re.compile(rf"{UNET}(down_blocks|input_blocks|conv_in|time_embedding|add_embedding)"),
    ),
)
_KINDS = (
    ("feed_forward", re.compile(r".*(_ff_net_|_mlp_)")),
    ("attention", re.compile(r".*(_attn[12]_|_attentions_|_self_attn_|put_blocks_\d+_1_[pn])")),
    ("resnet", re.compile(r".*(_resnets_|samplers_\d+_conv|conv_in|conv_out|put_blocks_\d+_)")),
)
# The same for transformers, by the authors' paths. Flux' linear1 is both kinds, so it matches none.
_OWN_PLACE = re.compile(r"(\w*?(?:blocks|layers|refiner))_\d+_")
_OWN_KINDS = (
    ("attention", re.compile(r".*(_attn\d?_|attention_)")),
    ("feed_forward", re.compile(r".*(_mlp[XC]?_|_ffn?_|feed_forward_)")),
)
REST, TEXT = "rest", "text"
NAMES = (TEXT, *(name for name, _ in (*_PLACES, *_KINDS)))
_OWN_NAME = re.compile(r"(mid_block|\w*?(blocks|layers|refiner))(_\w+)?")
# The names of a vector's blocks, such as up_blocks_0_attentions_1 or double_blocks_3.
_BLOCK = re.compile(
    rf"{UNET}((?:(?:down|up)_blocks_\d+|mid_block)_[a-z]+_\d+"
    r"|\w*?(?:blocks|layers|refiner)_\d+)_"
)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)

PRESETS = {
    "all": "",
    "attention only": f"attention=1, {REST}=0",
    "without feed-forward": "feed_forward=0",
    "output blocks only": f"output=1, {REST}=0",
    "without input blocks": "input=0",
    # B-LoRA, arXiv 2403.14572, section 4: the blocks that learn an image's style and its content.
    "SDXL style": f"up_blocks_0_attentions_1=1, {REST}=0",
    "SDXL content": f"up_blocks_0_attentions_0=1, {REST}=0",
}
"""Texts for `parse_weights` that are often useful, by their names."""


def place_of(module: str) -> str:
    """ "input", "middle", "output", "text", or "other" for a canonical module name; for a
    transformer's module, the name of its blocks, such as "double_blocks"."""
    if is_text(module):
        return TEXT
    if place := next((name for name, pattern in _PLACES if pattern.match(module)), ""):
        return place
    match = _OWN_PLACE.match(flat(module))
    return match[1] if match else "other"


def kind_of(module: str) -> str:
    """ "attention", "feed_forward", "resnet" or "other" for a canonical module name."""
    if is_text(module) or is_unet(module) or not _OWN_PLACE.match(flat(module)):
        return next((name for name, pattern in _KINDS if pattern.match(module)), "other")
    return next(
        (name for name, pattern in _OWN_KINDS if pattern.match(f"_{flat(module)}_")), "other"
    )


def block_of(module: str) -> str:
    """The name of the module's block, such as "down_blocks_1_attentions_0" or "double_blocks_3";
    its place if it is in no block."""
    match = _BLOCK.match(module)
    return match[1] if match else place_of(module)


def group_of(module: str) -> str:
    """The place and the kind as text: "output attention"."""
    return f"{place_of(module)} {kind_of(module)}"


@dataclass(frozen=True)
class Weights:
    """The weight of a module, by its canonical name: the product of all named weights that fit it,
    or `rest` if none does."""

    named: Mapping[str, float]
    rest: float

    def __call__(self, module: str) -> float:
        blocks = [name for name in self.named if _OWN_NAME.fullmatch(name)]
        if blocks and in_doubt(module):
            raise ValueError(
                f"The block number in {module} can mean two different blocks, so it is not known "
                f"whether {blocks[0]} holds it. Use weights for input, middle and output instead."
            )
        fitting = [value for name, value in self.named.items() if _fits(name, module)]
        return math.prod(fitting) if fitting else self.rest

    def of(self, vector: Vector) -> Callable[[str], float]:
        """The weights of a vector's modules, whose blocks have the names of the model's authors."""
        paths = own_paths(vector)
        return lambda module: self(paths[module])

    def idle(self, vector: Vector) -> list[str]:
        """The names that fit none of the vector's modules."""
        modules = set(own_paths(vector).values())
        return [name for name in self.named if not any(_fits(name, module) for module in modules)]

    def require_blocks(self, vector: Vector) -> None:
        """Raises ValueError if a block's own name fits no module of the vector, because it may be
        misspelt. Places and kinds cannot be misspelt, and a LoRA may lack one."""
        modules = own_paths(vector).values()
        for name in self.idle(vector):
            if name not in NAMES:
                blocks = sorted({match[1] for module in modules if (match := _BLOCK.match(module))})
                near = get_close_matches(name, blocks, 3, 0.0)
                has = f"its nearest blocks are {', '.join(near)}" if near else "it has no blocks"
                raise ValueError(
                    f"{name} fits no module of {vector.source}; {has}. Correct the name, or leave "
                    "it out."
                )


def _fits(name: str, module: str) -> bool:
    is_place_or_kind = name in (place_of(module), kind_of(module))
    return is_place_or_kind or f"{module}_".startswith(f"{UNET}{name}_")


def parse_weights(text: str) -> Weights:
    """Weights from a text such as "input=1, middle=0.5, feed_forward=0".

    A name is a place (input, middle, output, text), a kind (attention, feed_forward, resnet), the
    beginning of blocks' own names (down_blocks_1, up_blocks_0_attentions_1, double_blocks_3), or
    `rest`, whose weight is 1 if it is not in the text.

    Raises:
        ValueError: an entry is not `name=number`, its name is unknown, or a name appears twice.
    """
    weights: dict[str, float] = {}
    for entry in filter(None, (part.strip() for part in re.split(r"[,;\n]", text))):
        name, _, value = (part.strip() for part in entry.partition("="))
        if not _OWN_NAME.fullmatch(name) and name not in (*NAMES, REST):
            raise ValueError(
                f"{entry!r} names no part of a model. Expected one of {', '.join(NAMES)}, {REST}, "
                "or a block such as down_blocks_1, up_blocks_0_attentions_1 or double_blocks_3, "
                "then = and a number."
            )
        if not _NUMBER.fullmatch(value) or not math.isfinite(float(value)):
            raise ValueError(
                f"{entry!r} has no weight; expected a finite number, such as {name}=0.5."
            )
        if name in weights:
            raise ValueError(f"{name} has two weights; expected one. Remove the other.")
        weights[name] = float(value)
    rest = weights.pop(REST, 1.0)
    return Weights(weights, rest)


def weighted(vector: Vector, weight: Callable[[str], float], description: str) -> Vector:
    """The vector with each module's change multiplied by its weight. Weight 0 leaves a module out.

    description: the weights as text, for the name and the recipe of the result.

    Raises:
        ValueError: a weight is not finite, a module that cannot be scaled (DoRA, OFT, GLoRA) has a
            weight other than 0 or 1, or nothing is left.
    """
    weights = {module: weight(module) for module in vector.modules()}
    if bad := [name for name, value in weights.items() if not math.isfinite(value)]:
        raise ValueError(
            f"The weight of {bad[0]} in {vector.source} is {weights[bad[0]]}; expected a finite "
            "number."
        )
    if bad := [name for name in vector.opaque if weights[name] not in (0.0, 1.0)]:
        raise ValueError(
            f"{vector.source} holds {vector.opaque_kinds} weights, which cannot be scaled: give "
            f"{bad[0]} the weight 0 or 1, found {weights[bad[0]]:g}."
        )
    if not any(weights.values()):
        raise ValueError(
            f"No module of {vector.source} has a weight other than 0; give at least one part a "
            "weight other than 0."
        )
    metadata = {**vector.metadata, **recipe([(vector, 1.0)], f"by blocks, {description}")}
    # An acceleration works in the UNet. Without a positive weight there, the vector is none.
    in_unet = {value for name, value in weights.items() if place_of(name) != TEXT}
    if not any(value > 0 for value in in_unet):
        metadata = forgotten(metadata)
    elif len(in_unet) == 1:
        metadata = scaled(metadata, *in_unet)
    diffs = {key: (diff, weights[key.rpartition(".")[0]]) for key, diff in vector.diffs.items()}
    return replace(
        vector,
        deltas={n: delta.scaled(weights[n]) for n, delta in vector.deltas.items() if weights[n]},
        diffs={key: diff.float() * factor for key, (diff, factor) in diffs.items() if factor},
        opaque={name: parts for name, parts in vector.opaque.items() if weights[name]},
        metadata=metadata,
        source=f"{vector.source} [{description}]",
        sha256="",  # the recipe keeps the file's hash
    )
