"""Several vectors become one: their exact sum, or the merge of a rule."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from .addition import stacked
from .agree import require_finite, require_one_shape, require_sum
from .architecture import require_one_architecture
from .compare import Grams
from .delta import Vector, as_matrix
from .elementwise.rule import Rule
from .family import FAMILY, SEVERAL, joined, scaled
from .formats.describe import left_out
from .formats.metadata import agreed, recipe
from .formats.spelling import in_one_spelling
from .nearest import nearest
from .slices import own_paths
from .truncation import Truncation


def exact(vectors: Sequence[Vector], weights: Sequence[float]) -> tuple[Vector, str]:
    """`sum_i weight_i * vector_i`, exact except for rounding (arXiv 2311.05556, equation 3).

    The factors are stacked, and `weight * alpha / rank` goes into the up factor. The rank of a
    module is therefore the sum of its ranks. Adding up factors to up factors would give cross terms
    instead. Works in float32.

    Returns:
        The sum, and a report for users.

    Raises:
        ValueError: all weights are 0, a weight is not finite, or the vectors cannot be added.
    """
    return summed(vectors, weights)[:2]


def summed(vectors: Sequence[Vector], weights: Sequence[float]) -> tuple[Vector, str, Grams]:
    """As `exact`, and the inner products of the terms. A term is a vector times its weight, if that
    is not 0."""
    terms = _terms(vectors, weights)
    deltas, grams, holders_of = {}, Grams(len(terms)), _holders(terms)
    # From all terms together, because one vector alone may not show which model it is for.
    paths = own_paths(Vector({n: terms[held[0]][0].deltas[n] for n, held in holders_of.items()}))
    for name, holders in holders_of.items():
        deltas[name] = stacked([(terms[i][0].deltas[name], terms[i][1]) for i in holders])
        ranks = [terms[i][0].deltas[name].rank for i in holders]
        inner = grams.add(paths[name], deltas[name], holders, ranks)
        if not inner.isfinite().all():
            require_finite(name, [terms[i][0] for i in holders])
    metadata = _metadata(terms, "exact")
    combined = Vector(deltas, _sum_diffs(terms), metadata, _source(terms))
    return combined, f"{_report(terms, combined)}\n{grams}".rstrip(), grams


def elementwise(
    vectors: Sequence[Vector],
    weights: Sequence[float],
    rule: Rule,
    density: float,
    rank: int,
    seed: int,
    device: torch.device,
    watch: Callable[[list[str]], Iterable[str]] = iter,
) -> tuple[Vector, str]:
    """The vectors merged value by value with `rule`, and then reduced to a rank, layer by layer.

    Changes without factors (norms, biases) are added. A seed gives the same result on every device.

    Args:
        density: the share of values that the rule keeps, above 0 to 1.
        rank: the highest rank of a module; 0 means the sum of the ranks.
        device: where the full changes are computed; results come back to the CPU.
        watch: goes through the names of the modules; it may show progress, or raise.

    Returns:
        The merged vector, and a report for users.

    Raises:
        ValueError: as `exact`, or density or rank is out of range.
    """
    if not 0 < density <= 1 or rank < 0:
        raise ValueError(
            f"density must be above 0 and at most 1 and rank 0 or more, found {density:g} and "
            f"{rank}."
        )
    terms = _terms(vectors, weights)
    holders = _holders(terms)
    deltas, energies, ranks = {}, {}, {}
    for name in watch(list(holders)):
        parts = [(terms[i][0].deltas[name], terms[i][1]) for i in holders[name]]
        shape = max((delta.shape for delta, _ in parts), key=len)
        # Multiplied there, because the factors are smaller than their product.
        changes = torch.stack([weight * d.on(device).matrix().view(shape) for d, weight in parts])
        if not changes.isfinite().all():
            require_finite(name, [terms[i][0] for i in holders[name]])
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        merged = rule.merge(changes, density, generator)
        before = sum(delta.rank for delta, _ in parts)
        deltas[name], lost = nearest(merged, rank or before, seed)
        energies[name] = lost, float(merged.square().sum())
        ranks[name] = before, deltas[name].rank
    metadata = _metadata(terms, f"{rule.name}, density {density:g}, rank {rank}, seed {seed}")
    combined = Vector(deltas, _sum_diffs(terms), metadata, f"{rule.name} of {_source(terms)}")
    report = _report(terms, combined)
    return combined, f"{report}\n{Truncation(energies, ranks)}" if deltas else report


def one_for_each(vector: Vector, target_of: Mapping[str, Hashable]) -> Vector:
    """The vector with one module per weight of a model. Adds modules that change the same weight;
    only the model can show that. DoRA, OFT and GLoRA modules, and modules of different shapes, stay
    as they are.

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
            deltas[first] = stacked(terms)
        for part in ("diff", "diff_b"):
            if any(f"{name}.{part}" in diffs for name in others):
                keys = [key for name in names if (key := f"{name}.{part}") in diffs]
                shared = [diffs.pop(key).float() for key in keys]
                diffs[f"{first}.{part}"] = reduce(torch.add, shared)
    return replace(vector, deltas=deltas, diffs=diffs)


def _terms(vectors: Sequence[Vector], weights: Sequence[float]) -> list[tuple[Vector, float]]:
    """The vectors with a weight other than 0, checked and in one spelling, with their weights."""
    if bad := [w for w in weights if not math.isfinite(w)]:
        raise ValueError(f"A weight is {bad[0]}; expected a finite number.")
    terms = [(v, w) for v, w in zip(vectors, weights, strict=True) if w != 0]
    if not terms:
        raise ValueError("All weights are 0, so the sum is empty; set at least one of them.")
    for vector, _ in terms:
        require_sum(vector)
    respelled = in_one_spelling([vector for vector, _ in terms])
    terms = [(vector, weight) for vector, (_, weight) in zip(respelled, terms, strict=True)]
    require_one_architecture((vector.source, vector.shapes) for vector, _ in terms)
    return terms


def _holders(terms: Sequence[tuple[Vector, float]]) -> dict[str, list[int]]:
    """The indices of the terms that have a delta for a module, by the module's name. Raises
    ValueError if their shapes differ."""
    holders: dict[str, list[int]] = {}
    for index, (vector, _) in enumerate(terms):
        for name in vector.deltas:
            holders.setdefault(name, []).append(index)
    for name, indices in holders.items():
        changes = [(terms[i][0], terms[i][0].deltas[name].shape) for i in indices]
        # A full difference of the same weight is added to the deltas.
        key = f"{name}.diff"
        changes += [(v, tuple(v.diffs[key].shape)) for v, _ in terms if key in v.diffs]
        require_one_shape(name, changes)
    return holders


def _sum_diffs(terms: Sequence[tuple[Vector, float]]) -> dict[str, Tensor]:
    """The weighted sum of the full differences, in float32."""
    total: dict[str, Tensor] = {}
    for vector, weight in terms:
        for key, diff in vector.diffs.items():
            require_one_shape(key, [(v, v.diffs[key].shape) for v, _ in terms if key in v.diffs])
            sum_so_far = total.get(key, torch.zeros_like(diff, dtype=torch.float32))
            total[key] = sum_so_far + diff.float() * weight
    return total


def _metadata(terms: Sequence[tuple[Vector, float]], method: str) -> dict[str, str]:
    """The metadata that all vectors share, the family of their accelerations, and the recipe."""
    vectors = [vector for vector, _ in terms]
    family = joined([scaled(vector.metadata, weight) for vector, weight in terms if weight > 0])
    return agreed(vectors) | family | recipe(terms, method)


def _source(terms: Sequence[tuple[Vector, float]]) -> str:
    return " + ".join(f"{weight:g} x ({vector.source})" for vector, weight in terms)


def _report(terms: Sequence[tuple[Vector, float]], combined: Vector) -> str:
    lines = [
        f"{weight:g} x {vector.source}: {len(vector.modules())} modules, rank {vector.ranks()}"
        + (f"; {ignored}" if (ignored := left_out(vector)) else "")
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
            f"The accelerations are of different families ({families}). Load LCM-LoRA will ask "
            "which of them to use for sampling."
        )
    return "\n".join(lines)
