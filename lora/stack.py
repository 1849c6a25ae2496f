"""The LORA_STACK that many packs pass on: a list of (file name, model strength, CLIP strength)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from .agree import require_sum
from .blocks import place_of, weighted
from .combine import exact
from .delta import Vector
from .formats.files import read_named


def of_stack(stack: Sequence[Any], path_of: Callable[[str], Path]) -> tuple[Vector, str]:
    """The sum of a stack's LoRAs, each with its two strengths, and a report.

    Raises:
        ValueError: the stack is empty or of another make, a strength is not finite, or its LoRAs
            cannot be added.
        FileNotFoundError: what path_of raises for a file that is gone.
    """
    entries = [_entry(each) for each in stack or ()]
    entries = [(name, model, clip) for name, model, clip in entries if name != "None"]
    if not any(model or clip for _, model, clip in entries):
        raise ValueError("The LoRA stack is empty, or all its strengths are 0; add a LoRA to it.")
    vectors = []
    for name, model, clip in entries:
        vector = read_named(path_of(name), name)
        of = {module: clip if place_of(module) == "text" else model for module in vector.modules()}
        if any(of[module] for module in vector.opaque):
            require_sum(vector)
        if any(of.values()):
            vectors.append(weighted(vector, of.__getitem__, f"model {model:g}, CLIP {clip:g}"))
    return exact(vectors, [1.0] * len(vectors))


def _entry(entry: Any) -> tuple[str, float, float]:
    fine = isinstance(entry, list | tuple) and len(entry) == 3 and isinstance(entry[0], str)
    if not fine or not all(isinstance(value, Real) for value in entry[1:]):
        raise ValueError(
            f"The LoRA stack holds {entry!r}; expected (file name, model strength, CLIP strength)."
        )
    if not all(map(math.isfinite, entry[1:])):
        raise ValueError(
            f"{entry[0]} has the strengths {entry[1]} and {entry[2]} in the LoRA stack; expected "
            "finite numbers."
        )
    return entry[0], float(entry[1]), float(entry[2])
