"""Sums of vectors. A sum of low-rank deltas is exactly one low-rank delta of the summed rank."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .delta import Delta, Vector
from .family import family_of, has_two_text_encoders
from .names import text_encoder_prefix

RECIPE = "lcm_lora_recipe"


def exact(vectors: Sequence[Vector], weights: Sequence[float]) -> tuple[Vector, str]:
    """`sum_i weight_i * vector_i` without any error but rounding (LCM-LoRA 2311.05556, eq. 3).

    The factors are stacked and `weight * alpha / rank` goes into the up factor, so a module's rank
    is the sum of its ranks. Adding up factors to up factors would give cross terms instead.
    A vector of weight 0 is left out. Works in float32.

    Returns:
        The sum, and a report for people.

    Raises:
        ValueError: nothing is left to add, a weight is not finite, or the vectors are made for
            different base models.
    """
    if bad := [w for w in weights if not math.isfinite(w)]:
        raise ValueError(f"A weight is {bad[0]}; expected a finite number.")
    terms = [(v, w) for v, w in zip(vectors, weights, strict=True) if w != 0]
    if not terms:
        raise ValueError("All weights are 0, so the sum is empty; set at least one of them.")
    for vector, _ in terms:
        if vector.opaque:
            raise ValueError(
                f"{vector.source} holds {vector.opaque_kinds} weights. What they do depends on the "
                "weights they are added to, so that no sum of vectors is their sum. Apply it "
                "alone, with Apply LoRA Vector, and add the others after it."
            )
    terms = _same_spelling(terms)
    _require_one_family([vector for vector, _ in terms])

    deltas = {}
    for name in dict.fromkeys(name for vector, _ in terms for name in vector.deltas):
        holders = [(vector, weight) for vector, weight in terms if name in vector.deltas]
        _require_one_shape(name, [(v.source, v.deltas[name].shape) for v, _ in holders])
        deltas[name] = _stack([(v.deltas[name], weight) for v, weight in holders])
    combined = Vector(deltas, _sum_diffs(terms), _metadata(terms), _source(terms))
    return combined, _report(terms, combined)


def _stack(parts: Sequence[tuple[Delta, float]]) -> Delta:
    plain = [(delta.plain(), weight) for delta, weight in parts]
    # Some tools keep a convolution's factors as matrices, others with their kernel: keep a kernel.
    columns = max((delta.down.shape[1:] for delta, _ in plain), key=len)
    kernel = [1] * (len(columns) - 1)
    ups = [d.up.float().flatten(1) * (weight * d.scale) for d, weight in plain]
    downs = [d.down.float().flatten(1) for d, _ in plain]
    up, down = torch.cat(ups, dim=1), torch.cat(downs, dim=0)
    rank = down.shape[0]
    return Delta(up.reshape(*up.shape, *kernel), down.reshape(rank, *columns), None, float(rank))


def _sum_diffs(terms: Sequence[tuple[Vector, float]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for vector, weight in terms:
        for key, diff in vector.diffs.items():
            sum_so_far = total.get(key, torch.zeros_like(diff, dtype=torch.float32))
            _require_one_shape(key, [("the others", sum_so_far.shape), (vector.source, diff.shape)])
            total[key] = sum_so_far + diff.float() * weight
    return total


def _same_spelling(terms: Sequence[tuple[Vector, float]]) -> list[tuple[Vector, float]]:
    """The first text encoder's prefix depends on the family, which a file of text encoder modules
    alone does not tell; the other files do."""
    two = any(has_two_text_encoders(vector.deltas) for vector, _ in terms)

    def respell(vector: Vector) -> Vector:
        deltas = {text_encoder_prefix(name, two): d for name, d in vector.deltas.items()}
        diffs = {text_encoder_prefix(name, two): d for name, d in vector.diffs.items()}
        return replace(vector, deltas=deltas, diffs=diffs)

    return [(respell(vector), weight) for vector, weight in terms]


def _require_one_family(vectors: Sequence[Vector]) -> None:
    known = [(v.source, kind) for v in vectors if (kind := family_of(v.deltas))]
    for source, kind in known[1:]:
        if kind.width != known[0][1].width:
            raise ValueError(
                f"{known[0][0]} was made for {known[0][1]} and {source} for {kind}; vectors add up "
                "only within one family of models."
            )


def _require_one_shape(name: str, shapes: Sequence[tuple[str, Sequence[int]]]) -> None:
    # Compared as matrices: 1x1 convolutions are kept as [out, in] by some tools.
    if len({(shape[0], math.prod(shape[1:])) for _, shape in shapes}) > 1:
        found = ", ".join(f"{list(shape)} in {source}" for source, shape in shapes)
        raise ValueError(
            f"The module {name} has different shapes: {found}. These LoRAs were made for "
            "different base models and cannot be added."
        )


def _source(terms: Sequence[tuple[Vector, float]]) -> str:
    return " + ".join(f"{weight:g} x ({vector.source})" for vector, weight in terms)


def _metadata(terms: Sequence[tuple[Vector, float]]) -> dict[str, str]:
    """What all files agree on (the base model, say), and how the sum was made."""
    first, *others = (vector.metadata for vector, _ in terms)
    agreed = {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}
    recipe = [{"source": vector.source, "weight": weight} for vector, weight in terms]
    return agreed | {RECIPE: json.dumps(recipe)}


def _report(terms: Sequence[tuple[Vector, float]], combined: Vector) -> str:
    lines = [
        f"{weight:g} x {vector.source}: {len(vector.modules())} modules, rank {vector.ranks()}"
        for vector, weight in terms
    ]
    shared = [n for n in combined.modules() if sum(n in v.modules() for v, _ in terms) > 1]
    lines.append(
        f"Sum: {len(combined.modules())} modules, rank {combined.ranks()}; {len(shared)} in more "
        f"than one vector, {len(combined.modules()) - len(shared)} in one only."
    )
    return "\n".join(lines)
