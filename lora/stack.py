"""The LORA_STACK of many packs: a list of (file name, model strength, CLIP strength)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from .agree import require_sum
from .blocks import weighted
from .combine import exact
from .delta import Vector
from .formats.files import read_named
from .formats.module_names import is_text


def of_stack(stack: Sequence[Any] | None, path_of: Callable[[str], Path]) -> tuple[Vector, str]:
    """The sum of a stack's LoRAs, each with its two strengths, and a report for users.

    path_of: the path of a LoRA file, by its name.

    Raises:
        ValueError: the stack is empty, an entry is not valid, or its LoRAs cannot be added.
        FileNotFoundError: path_of raises it for a file that is gone.
    """
    entries = [_entry(entry) for entry in stack or ()]
    entries = [(name, model, clip) for name, model, clip in entries if name != "None"]
    if not any(model or clip for _, model, clip in entries):
        raise ValueError("The LoRA stack is empty, or all its strengths are 0; add a LoRA to it.")
    return added([(read_named(path_of(name), name), model, clip) for name, model, clip in entries])


def added(loras: Sequence[tuple[Vector, float, float]]) -> tuple[Vector, str]:
    """The sum of vectors, each with its strengths on the model and on the text encoders, and a
    report for users. Raises ValueError if they cannot be added, or if all strengths are 0."""
    vectors = terms(loras)
    return exact(vectors, [1.0] * len(vectors))


def terms(loras: Sequence[tuple[Vector, float, float]]) -> list[Vector]:
    """The vectors times their strengths, as `added` adds them. Leaves out those with strength 0."""
    vectors = []
    for vector, model, clip in loras:
        strengths = {name: clip if is_text(name) else model for name in vector.modules()}
        if any(strengths[module] for module in vector.opaque):
            require_sum(vector)
        if any(strengths.values()):
            description = f"model {model:g}, CLIP {clip:g}"
            vectors.append(weighted(vector, strengths.__getitem__, description))
    return vectors


def _entry(entry: Any) -> tuple[str, float, float]:
    """An entry of a stack, checked."""
    is_named = isinstance(entry, list | tuple) and len(entry) == 3 and isinstance(entry[0], str)
    if not is_named or not all(isinstance(value, Real) for value in entry[1:]):
        raise ValueError(
            f"The LoRA stack holds {entry!r}; expected (file name, model strength, CLIP strength)."
        )
    if not all(map(math.isfinite, entry[1:])):
        raise ValueError(
            f"{entry[0]} has the strengths {entry[1]} and {entry[2]} in the LoRA stack; expected "
            "finite numbers."
        )
    return entry[0], float(entry[1]), float(entry[2])
