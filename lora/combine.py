"""Vectors into one: their exact sum, which is one of the summed rank, or a rule's merge."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .acceleration import FAMILY, SEVERAL, joined
from .agree import require_finite, require_one_shape, require_sum
from .architecture import require_one_architecture
from .blocks import place_of
from .compare import Grams
from .delta import Delta, Vector, as_matrix
from .elementwise.rule import Rule
from .formats.describe import left_out
from .formats.metadata import agreed, recipe
from .formats.spelling import in_one_spelling
from .nearest import nearest
from .truncation import Truncation


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
    terms = _terms(vectors, weights)
    deltas, grams = {}, Grams(len(terms))
    for name, holders in _holders(terms).items():
        deltas[name] = _stack([(terms[i][0].deltas[name], terms[i][1]) for i in holders])
        ranks = [terms[i][0].deltas[name].rank for i in holders]
        inner = grams.add(place_of(name), deltas[name], holders, ranks)
        if not inner.isfinite().all():
            require_finite(name, [terms[i][0] for i in holders])
    metadata = _metadata(terms, "exact")
    combined = Vector(deltas, _sum_diffs(terms), metadata, _source(terms))
    return combined, f"{_report(terms, combined)}\n{grams}".rstrip()


def elementwise(
    vectors: Sequence[Vector], weights: Sequence[float], rule: Rule, density: float, rank: int,
    seed: int, device: torch.device, watch: Callable[[list[str]], Iterable[str]] = iter,
) -> tuple[Vector, str]:  # fmt: skip
    """The vectors merged number by number by `rule`, and then brought to a rank, layer by layer.

    What has no factors (norms, biases) is added. The same seed draws the same on every device.

    Args:
        density: the share of numbers that the rule keeps, above 0 to 1.
        rank: the most a module may have; 0 for the sum of the ranks, as the exact sum has.
        device: where the whole changes are worked on; results come back to the CPU.
        watch: goes through the names of the modules, and may tell of it or raise.

    Raises:
        ValueError: as exact does, or density or rank are out of range.
    """
    if not 0 < density <= 1 or rank < 0:
        raise ValueError(
            f"density must be above 0 and at most 1 and rank 0 or more, found {density:g} and "
            f"{rank}."
        )
    terms = _terms(vectors, weights)
    of = _holders(terms)
    deltas, energies, ranks = {}, {}, {}
    for name in watch(list(of)):
        parts = [(terms[i][0].deltas[name], terms[i][1]) for i in of[name]]
        shape = max((delta.shape for delta, _ in parts), key=len)
        changes = torch.stack([weight * d.matrix().view(shape) for d, weight in parts]).to(device)
        if not changes.isfinite().all():
            require_finite(name, [terms[i][0] for i in of[name]])
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        merged = rule.merge(changes, density, generator)
        before = sum(delta.rank for delta, _ in parts)
        deltas[name], left_out = nearest(merged, rank or before, seed)
        energies[name] = left_out, float(merged.square().sum())
        ranks[name] = before, deltas[name].rank
    metadata = _metadata(terms, f"{rule.name}, density {density:g}, rank {rank}, seed {seed}")
    combined = Vector(deltas, _sum_diffs(terms), metadata, f"{rule.name} of {_source(terms)}")
    report = _report(terms, combined)
    return combined, f"{report}\n{Truncation(energies, ranks)}" if deltas else report


def one_for_each(vector: Vector, target_of: Mapping[str, Hashable]) -> Vector:
    """The vector with one module per weight of a model. Two modules that change the same weight are
    added; only the model shows that they do. DoRA, OFT and GLoRA modules, and modules of different
    shapes, stay as they are.

    target_of: the weight that a module changes, by the module's name.
    """
    sharing: dict[Hashable, list[str]] = {}
    for name in sorted(vector.modules() - vector.opaque.keys()):
        if name in target_of:
            sharing.setdefault(target_of[name], []).append(name)
    deltas, diffs, shapes = dict(vector.deltas), dict(vector.diffs), vector.shapes
    for names in sharing.values():
        if len({as_matrix(shapes[name]) for name in names if name in shapes}) > 1:
            continue
        first, *others = names
        if any(name in deltas for name in others):
            terms = [(deltas.pop(name), 1.0) for name in names if name in deltas]
            deltas[first] = _stack(terms)
        for part in ("diff", "diff_b"):
            if any(f"{name}.{part}" in diffs for name in others):
                keys = [key for name in names if (key := f"{name}.{part}") in diffs]
                diffs[f"{first}.{part}"] = sum(diffs.pop(key).float() for key in keys)
    return replace(vector, deltas=deltas, diffs=diffs)


def _terms(vectors: Sequence[Vector], weights: Sequence[float]) -> list[tuple[Vector, float]]:
    """What is to be added, checked."""
    if bad := [w for w in weights if not math.isfinite(w)]:
        raise ValueError(f"A weight is {bad[0]}; expected a finite number.")
    terms = [(v, w) for v, w in zip(vectors, weights, strict=True) if w != 0]
    if not terms:
        raise ValueError("All weights are 0, so the sum is empty; set at least one of them.")
    for vector, _ in terms:
        require_sum(vector)
    alike = in_one_spelling([vector for vector, _ in terms])
    terms = [(vector, weight) for vector, (_, weight) in zip(alike, terms, strict=True)]
    require_one_architecture((vector.source, vector.shapes) for vector, _ in terms)
    return terms


def _holders(terms: Sequence[tuple[Vector, float]]) -> dict[str, list[int]]:
    """The places of the terms that have a delta for each module, whose shapes agree."""
    found: dict[str, list[int]] = {}
    for place, (vector, _) in enumerate(terms):
        for name in vector.deltas:
            found.setdefault(name, []).append(place)
    for name, places in found.items():
        changes = [(terms[i][0], terms[i][0].deltas[name].shape) for i in places]
        # A full difference of the same weight is added to it.
        key = f"{name}.diff"
        changes += [(v, v.diffs[key].shape) for v, _ in terms if key in v.diffs]
        require_one_shape(name, changes)
    return found


def _stack(parts: Sequence[tuple[Delta, float]]) -> Delta:
    plain = [(delta.plain(), weight) for delta, weight in parts]
    # Some tools keep a convolution's factors as matrices, others with their kernel: keep a kernel.
    columns = max((delta.down.shape[1:] for delta, _ in plain), key=len)
    kernel = [1] * (len(columns) - 1)
    rank = sum(delta.rank for delta, _ in plain)
    first = plain[0][0]
    # Written into place, for time and memory go into copies here.
    up = first.up.new_empty(first.up.shape[0], rank, dtype=torch.float32)
    down = first.down.new_empty(rank, math.prod(columns), dtype=torch.float32)
    begin = 0
    for delta, weight in plain:
        rows = slice(begin, begin := begin + delta.rank)
        up[:, rows] = delta.up.flatten(1)
        up[:, rows] *= weight * delta.scale
        down[rows] = delta.down.flatten(1)
    return Delta(up.reshape(*up.shape, *kernel), down.reshape(rank, *columns), None, float(rank))


def _sum_diffs(terms: Sequence[tuple[Vector, float]]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for vector, weight in terms:
        for key, diff in vector.diffs.items():
            require_one_shape(key, [(v, v.diffs[key].shape) for v, _ in terms if key in v.diffs])
            sum_so_far = total.get(key, torch.zeros_like(diff, dtype=torch.float32))
            total[key] = sum_so_far + diff.float() * weight
    return total


def _metadata(terms: Sequence[tuple[Vector, float]], method: str) -> dict[str, str]:
    """What all agree on, the acceleration that one of them brings, and how it was made of them."""
    vectors = [vector for vector, _ in terms]
    brought = joined([v.metadata for v, weight in terms if weight > 0])
    return agreed(vectors) | brought | recipe(terms, method)


def _source(terms: Sequence[tuple[Vector, float]]) -> str:
    return " + ".join(f"{weight:g} x ({vector.source})" for vector, weight in terms)


def _report(terms: Sequence[tuple[Vector, float]], combined: Vector) -> str:
    lines = [
        f"{weight:g} x {vector.source}: {len(vector.modules())} modules, rank {vector.ranks()}"
        + (f"; {told}" if (told := left_out(vector)) else "")
        for vector, weight in terms
    ]
    holders = Counter(module for vector, _ in terms for module in vector.modules())
    shared = sum(count > 1 for count in holders.values())
    lines.append(
        f"Sum: {len(holders)} modules, rank {combined.ranks()}; {shared} in more than one vector, "
        f"{len(holders) - shared} in one only."
    )
    if SEVERAL in (families := combined.metadata.get(FAMILY, "")):
        lines.append(
            f"Accelerations of different kinds ({families}): Load LCM-LoRA will ask as which of "
            "them to sample."
        )
    return "\n".join(lines)
