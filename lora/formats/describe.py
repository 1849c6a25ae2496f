"""What a vector holds and how it was made, in lines for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..architecture import architecture_of
from ..delta import Vector
from .kinds import left_out_because
from .metadata import METHOD, RECIPE
from .names import is_text

SHOWN, RECIPE_SHOWN = 120, 2000  # characters of a value, and of the recipe, for people
_RECIPE_READ = 100_000  # a longer one is not of this pack


def describe(vector: Vector) -> str:
    """What a vector holds, for people."""
    text = sum(map(is_text, vector.modules()))
    scales = sorted({round(delta.scale, 4) for delta in vector.deltas.values()})
    lines = [
        f"{vector.source}: made for {architecture_of(vector.shapes) or 'an unknown base model'}",
        f"{len(vector.modules())} modules, {text} of them in text encoders",
        f"rank {vector.ranks()}, alpha / rank {', '.join(f'{scale:g}' for scale in scales[:5])}",
    ]
    if vector.ignored:
        keys = [f"{key} ({left_out_because(key)})" for key in vector.ignored[:10]]
        lines.append(f"{left_out(vector)}: {', '.join(keys)}")
    if vector.opaque:
        kinds = vector.opaque_kinds
        lines.append(f"{len(vector.opaque)} modules are {kinds}: it can be applied, not combined")
    return "\n".join(lines + described(vector.metadata))


def left_out(vector: Vector) -> str:
    """How many keys of its file are no part of it; empty where there are none."""
    count = len(vector.ignored)
    return f"{count} keys are no part of a LoRA and left out" if count else ""


def described(metadata: Mapping[str, str]) -> list[str]:
    """The metadata in lines for people: first how the vector was made, with all its sources."""
    told = dict(sorted(metadata.items()))
    lines = []
    if RECIPE in told:
        recipe, method = told.pop(RECIPE), told.pop(METHOD, "")
        try:
            short = len(recipe) <= _RECIPE_READ
            made = "\n".join(_made(json.loads(recipe), method)) if short else recipe
        except (ValueError, RecursionError):  # of a file that somebody else wrote
            made = recipe
        lines.append(made if len(made) <= RECIPE_SHOWN else f"{made[:RECIPE_SHOWN]} ...")
    return lines + [f"{key}: {value[:SHOWN]}" for key, value in told.items()]


def _made(recipe: Any, method: Any) -> list[str]:
    """A recipe in lines; those of a source that was made itself are below it."""
    if not isinstance(recipe, list) or not all(isinstance(term, dict) for term in recipe):
        raise ValueError("of a file that somebody else wrote")
    lines = [f"made of ({method}):" if method else "made of:"]
    for term in recipe:
        sha256 = f", sha256 {term['sha256']}" if "sha256" in term else ""
        lines.append(f"  {term.get('weight')} x {term.get('source')}{sha256}")
        if "recipe" in term:
            lines += [f"    {line}" for line in _made(term["recipe"], term.get("method", ""))]
    return lines
