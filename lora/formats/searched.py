"""Weights that Find LoRA Weights found: as text, and in a file's metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from . import facts

SEARCH = "lcm_lora_search"
"""The key of a search's figures in a file's metadata."""

_LINE = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?) x (.+?)\s*", re.ASCII | re.I)


def written(names: Sequence[str], weights: Sequence[float]) -> str:
    """Weights as text, one per line: "0.82 x sticker.safetensors"."""
    return "\n".join(f"{weight:g} x {name}" for weight, name in zip(weights, names, strict=True))


def read_weights(text: str, names: Sequence[str]) -> list[float]:
    """The weights of the vectors with these names, from lines of `written` in a longer text.

    If no name in the text matches a vector, or names are equal, the order of the lines counts.

    Raises:
        ValueError: the text does not hold one weight for each vector.
    """
    entries = [(match[2], float(match[1])) for line in text.splitlines()
               if (match := _LINE.fullmatch(line))]  # fmt: skip
    by_name = dict(entries)
    if len(set(names)) == len(names) and all(name in by_name for name in names):
        return [by_name[name] for name in names]
    in_order = by_name.keys().isdisjoint(names) or [name for name, _ in entries] == list(names)
    if len(entries) == len(names) and in_order:
        return [weight for _, weight in entries]
    raise ValueError(
        f"weights has {len(entries)} lines such as '0.8 x name' ({', '.join(by_name) or 'none'}), "
        f"but the vectors are {', '.join(names)}. Connect the weights that Find LoRA Weights gave "
        "for these vectors, or leave the input empty."
    )


def distilled_at(metadata: Mapping[str, str]) -> float:
    """The guidance that an acceleration was distilled with; the middle of a range; 0 if the
    metadata do not give it."""
    numbers = [
        float(n) for n in re.findall(r"\d+(?:\.\d+)?", metadata.get("lcm_lora.guidance", ""))
    ]
    return sum(numbers) / len(numbers) if numbers else 0.0


def lines(metadata: Mapping[str, str]) -> list[str]:
    """What a search found, for users; empty if the metadata hold no search of this pack."""
    try:
        values = json.loads(metadata.get(SEARCH, ""))
        return _lines(values)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return []


def _lines(values: Mapping[str, Any]) -> list[str]:
    reference, prompts = values["reference"], facts.plain(values["prompts_sha256"], 12)
    weights = [f"  {float(w):g} x {facts.plain(name, 80)}" for name, w in values["weights"]]
    made = [
        f"weights found by a search, for {int(values['steps'])} steps at cfg {values['cfg']:g}:",
        *weights,
        f"  on {int(values['prompts'])} prompts, sha256 {prompts}, "
        f"against {int(reference['steps'])} steps at guidance {reference['guidance']:g}",
    ]
    if values.get("better_on_held_out") is not None:
        percent = 100 * values["better_on_held_out"]
        where = "nearer" if percent >= 0 else "farther away"
        made.append(f"  {abs(percent):.1f} % {where} than the default on held-out prompts")
    if values.get("style_shown") is not None:
        made.append(f"  style at {100 * values['style_shown']:.0f} %")
    return made
