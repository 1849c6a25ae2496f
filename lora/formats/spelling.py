"""Renames the modules of vectors: to ComfyUI's names, or to the same names in several vectors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from ..architecture import has_two_text_encoders
from ..delta import Vector
from ..slices import settled
from .module_names import in_doubt, numbered, res_blocks, text_encoder_prefix
from .places import host_name

Value = TypeVar("Value")


def for_host(vector: Vector) -> Vector:
    """The vector with ComfyUI's names for modules whose kohya names its loader does not know."""
    shapes = {key.rpartition(".")[0]: tuple(diff.shape) for key, diff in vector.diffs.items()}
    shapes |= vector.shapes
    return _renamed(vector, lambda name: host_name(name, shapes[name][-1]))


def respelled(vector: Vector, two_encoders: bool) -> Vector:
    """The vector with the prefix of its first text encoder for a model with one encoder, or with
    two."""
    return _renamed(vector, lambda name: text_encoder_prefix(name, two_encoders))


def in_one_spelling(vectors: Sequence[Vector]) -> list[Vector]:
    """The vectors, with the same name for the same layer in all of them. One file alone may not
    show how many text encoders its model has, or how many blocks per level; the others may.

    Raises:
        ValueError: two files number the blocks differently, and none shows which blocks are equal.
    """
    two_encoders = any(has_two_text_encoders(vector.shapes) for vector in vectors)
    possible = res_blocks(name for vector in vectors for name in vector.modules())

    def spelled(name: str) -> str:
        return text_encoder_prefix(numbered(name, possible), two_encoders)

    renamed = [_renamed(vector, spelled) for vector in vectors]
    unclear = [
        (vector.source, name)
        for vector in renamed
        for name in sorted(filter(in_doubt, vector.modules()))
    ]
    others = [
        vector.source
        for vector in renamed
        if any("_down_blocks_" in name or "_up_blocks_" in name for name in vector.modules())
    ]
    if unclear and others:
        source, name = unclear[0]
        raise ValueError(
            f"The block number in {name} of {source} can mean two different blocks, and "
            f"{others[0]} numbers its blocks in another way. Neither shows how many blocks each "
            "level of the model has. Apply them one after the other with Apply LoRA Vector, which "
            "looks at the model."
        )
    return settled(renamed)


def renamed(vector: Vector, names: Mapping[str, str]) -> Vector:
    """The vector with other names for some of its modules. Raises ValueError if two get the same
    name."""
    return _renamed(vector, lambda name: names.get(name, name)) if names else vector


def _renamed(vector: Vector, spell: Callable[[str], str]) -> Vector:
    """The vector with other names for its modules. Raises ValueError if two get the same name."""
    names = {name: spell(name) for name in vector.modules()}
    name, uses = Counter(names.values()).most_common(1)[0] if names else ("", 0)
    if uses > 1:
        raise ValueError(
            f"{vector.source} holds two LoRAs for the module {name}; expected one. Get the "
            "original files and combine them with Combine LoRA Vectors."
        )

    def with_names(values: Mapping[str, Value]) -> dict[str, Value]:
        return {names[name]: value for name, value in values.items()}

    diffs = {}
    for key, diff in vector.diffs.items():
        name, _, part = key.rpartition(".")
        diffs[f"{names[name]}.{part}"] = diff
    return replace(
        vector, deltas=with_names(vector.deltas), diffs=diffs, opaque=with_names(vector.opaque)
    )
