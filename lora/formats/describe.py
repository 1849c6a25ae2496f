"""What a vector holds and how it was made, as text for users."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..architecture import architecture_of
from ..delta import Vector
from . import facts, searched
from .kinds import left_out_because
from .metadata import METHOD, RECIPE
from .module_names import is_text

SHOWN, RECIPE_SHOWN = 120, 2000  # characters of a value, and of the recipe
_MOST_KEYS = 200
_RECIPE_READ = 100_000  # this pack does not write a longer recipe


def describe(vector: Vector) -> str:
    """What a vector holds, as text for users."""
    text = sum(map(is_text, vector.modules()))
    scales = sorted({round(delta.scale, 4) for delta in vector.deltas.values()})
    lines = [
        f"{vector.source}: made for {architecture_of(vector.shapes) or 'an unknown architecture'}",
        f"{len(vector.modules())} modules, {text} of them in text encoders",
        f"rank {vector.ranks()}, alpha / rank {', '.join(f'{scale:g}' for scale in scales[:5])}",
    ]
    if vector.ignored:
        keys = [f"{key} ({left_out_because(key)})" for key in vector.ignored[:10]]
        lines.append(f"{left_out(vector)}: {', '.join(keys)}")
    if vector.opaque:
        kinds = vector.opaque_kinds
        lines.append(f"{len(vector.opaque)} modules are {kinds}: it can be applied, not combined")
    return "\n".join(
        lines + facts.lines(facts.of_metadata(vector.metadata)) + described(vector.metadata)
    )


def left_out(vector: Vector) -> str:
    """How many keys of its file are not part of a vector; empty if there are none."""
    count = len(vector.ignored)
    return f"{count} keys are not part of the LoRA and were left out" if count else ""


def described(metadata: Mapping[str, str]) -> list[str]:
    """The metadata in lines: first how the vector was made, with all its sources."""
    values = dict(sorted(metadata.items()))
    lines = []
    if RECIPE in values:
        recipe, method = values.pop(RECIPE), values.pop(METHOD, "")
        try:
            is_ours = len(recipe) <= _RECIPE_READ
            text = "\n".join(_made_of(json.loads(recipe), method)) if is_ours else recipe
        except (ValueError, RecursionError):  # another program wrote it
            text = recipe
        lines.append(text if len(text) <= RECIPE_SHOWN else f"{text[:RECIPE_SHOWN]} ...")
    if found := searched.lines(values):
        del values[searched.SEARCH]
        lines.append("\n".join(found))
    shown = {facts.plain(key, 80): facts.plain(value, SHOWN) for key, value in values.items()}
    return lines + facts.lines(shown)


def public(vector: Vector, name: str) -> dict[str, Any]:
    """What a file holds, for the page: facts, how it was made, and its other metadata.

    name: the file's name, with its folders as the user sees them.
    """
    recipe = {key: vector.metadata[key] for key in (RECIPE, METHOD) if key in vector.metadata}
    made_of = described(recipe)[0].splitlines() if RECIPE in recipe else []
    others = sorted(vector.metadata.keys() - recipe.keys())[:_MOST_KEYS]
    return {
        "name": name,
        "facts": facts.facts(vector, name),
        "made_of": [facts.plain(line) for line in made_of],
        "metadata": {facts.plain(key, 80): facts.plain(vector.metadata[key]) for key in others},
    }


def _made_of(recipe: Any, method: Any) -> list[str]:
    """A recipe in lines. If a source has a recipe of its own, its lines are indented below it."""
    if not isinstance(recipe, list) or not all(isinstance(term, dict) for term in recipe):
        raise ValueError("another program wrote this recipe")
    lines = [f"made of ({method}):" if method else "made of:"]
    for term in recipe:
        sha256 = f", sha256 {term['sha256']}" if "sha256" in term else ""
        lines.append(f"  {term.get('weight')} x {term.get('source')}{sha256}")
        if "recipe" in term:
            lines += [f"    {line}" for line in _made_of(term["recipe"], term.get("method", ""))]
    return lines
