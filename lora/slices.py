"""Vectors for transformers, with one name for each layer or part of a layer.

diffusers splits some layers that the models' authors keep whole (formats/transformers.py), so two
files may change the same numbers under different names. The change of a part equals a change of the
whole layer with zeros in all other rows, so their sum is exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from .addition import stacked
from .delta import Delta, Vector, as_matrix
from .formats.module_names import UNET, is_text, is_unet
from .formats.transformers import Place, Transformer, flat, recognised

Kinds = Sequence[Transformer]
COPIED = 0.01  # share of a change by which a copy of it may differ; bf16 rounds by 0.004


def own_paths(vector: Vector) -> dict[str, str]:
    """The path of each module's layer in the authors' code, as a kohya name, by the module's name.
    Modules of UNets, text encoders and unknown models keep their names."""
    places = _places(vector, _kinds(vector))
    return {name: UNET + places[name].path if name in places else name for name in vector.modules()}


def settled(vectors: Sequence[Vector], kind: Kinds = ()) -> list[Vector]:
    """The vectors, with the same name for the same layer in all of them.

    Layers get kohya's names with the authors' paths, which ComfyUI knows for every model. Parts of
    layers get diffusers' names. If one of the vectors changes the whole layer, or if ComfyUI does
    not know the parts, they become changes of the whole layer. Several modules for one layer are
    added, but copies of one change count once. Modules of UNets, text encoders and unknown models
    keep their names.

    kind: of the model, if it is known; else the vectors show it.
    """
    kinds = [kind for _ in vectors] if kind else _shared([_kinds(vector) for vector in vectors])
    all_places = [_places(vector, k) for vector, k in zip(vectors, kinds, strict=True)]
    vectors = [
        _without_copies(vector, places) for vector, places in zip(vectors, all_places, strict=True)
    ]
    whole = {
        place.path
        for vector, places, some in zip(vectors, all_places, kinds, strict=True)
        for name, place in places.items()
        if (place.is_whole and (name in vector.deltas or f"{name}.diff" in vector.diffs))
        or not (place.is_whole or any(one.has_parts for one in some))
    }
    spelled = _unplaced(vectors, all_places)
    return [
        _settled(vector, places, whole, spelled) if places or spelled else vector
        for vector, places in zip(vectors, all_places, strict=True)
    ]


def _kinds(vector: Vector) -> Kinds:
    modules = vector.modules()
    if any(map(is_unet, modules)) or all(map(is_text, modules)):
        return ()
    return recognised({n: shape for n, shape in vector.shapes.items() if not is_text(n)})[0]


def _shared(kinds: Sequence[Kinds]) -> list[Kinds]:
    """The kinds of transformer that each vector may be for, reduced to those that all share."""
    possible = [set(of_vector) for of_vector in kinds if of_vector]
    common = set.intersection(*possible) if possible else set()
    return [[kind for kind in of_vector if kind in common] or of_vector for of_vector in kinds]


def _places(vector: Vector, kinds: Kinds) -> dict[str, Place]:
    """The place that each module changes. Modules are missing if the kinds disagree about it."""
    shapes, places = vector.shapes, {}
    for name in vector.modules() if kinds else ():
        if is_text(name):
            continue
        # If a module changes only the bias, the bias shows the number of rows.
        bias = vector.diffs.get(f"{name}.diff_b")
        shape = shapes.get(name) or (() if bias is None else tuple(bias.shape))
        candidates = {kind.place(flat(name), shape) for kind in kinds}
        if len(candidates) == 1 and (place := candidates.pop()):
            places[name] = place
    return places


def _without_copies(vector: Vector, places: Mapping[str, Place]) -> Vector:
    """The vector without changes that it holds under another name too.

    Some files have both spellings, for programs that know one of them: Z-Image-Fun's distilled
    LoRAs have `attention_qkv` beside `attention_to_q`, ... (huggingface/diffusers #13203).
    """
    of_layer: dict[str, list[str]] = defaultdict(list)
    for name in sorted(vector.deltas.keys() & places.keys()):
        of_layer[places[name].path].append(name)
    copies = set()
    for names in of_layer.values():
        kept: list[str] = []
        for name in sorted(names, key=lambda name: places[name].rows is not None):
            if any(_is_copy(vector, places, name, other) for other in kept):
                copies.add(name)
            else:
                kept.append(name)
    deltas = {name: delta for name, delta in vector.deltas.items() if name not in copies}
    return replace(vector, deltas=deltas) if copies else vector


def _is_copy(vector: Vector, places: Mapping[str, Place], name: str, other: str) -> bool:
    """Whether a module's change is in the change of another one, which is not smaller."""
    place, whole = places[name], places[other]
    one, two = vector.deltas[name], vector.deltas[other]
    if (
        whole.rows not in (None, place.rows)
        or as_matrix(one.shape)[1] != as_matrix(two.shape)[1]
        or one.up.is_meta  # products, which no such file has, and shapes without numbers
        or two.up.is_meta
    ):
        return False
    one, two = _unswapped(one, place), _unswapped(two, whole)
    if whole.rows is None and place.rows is not None:
        first, count, _ = place.rows
        two = replace(two, up=two.up[first : first + count])
    if len(one.up) != len(two.up):
        return False
    sizes = one.inner(one), two.inner(two)
    # Both were rounded on the way, to half precision at worst.
    return sizes[0] + sizes[1] - 2 * one.inner(two) <= COPIED**2 * max(sizes)


def _unswapped(delta: Delta, place: Place) -> Delta:
    """A delta with its rows in the layer's order."""
    plain = delta.plain()
    return replace(plain, up=in_whole(plain.up, replace(place, rows=None)))


def _unplaced(
    vectors: Sequence[Vector], all_places: Sequence[Mapping[str, Place]]
) -> dict[str, str]:
    """One spelling for each name without a place, if the vectors spell it in several ways."""
    spellings: dict[str, set[str]] = defaultdict(set)
    for vector, places in zip(vectors, all_places, strict=True):
        for name in vector.modules() - places.keys():
            if not is_text(name) and not is_unet(name):
                spellings[flat(name)].add(name)
    # Most models that ComfyUI knows take diffusers' prefix.
    best = {path: min(names, key=_unusual) for path, names in spellings.items()}
    return {n: best[path] for path, names in spellings.items() if len(names) > 1 for n in names}


def _unusual(name: str) -> tuple[bool, bool, str]:
    return not name.startswith("transformer."), not name.startswith(UNET), name


def _settled(
    vector: Vector, places: Mapping[str, Place], whole: set[str], spelled: Mapping[str, str]
) -> Vector:
    deltas: dict[str, list[Delta]] = defaultdict(list)
    diffs: dict[str, list[Tensor]] = defaultdict(list)
    opaque = {}

    def name_of(module: str) -> str:
        place = places.get(module)
        if place is None:
            return spelled.get(module, module)
        return UNET + place.path if place.is_whole else place.name

    def widened(module: str) -> Place | None:
        """The place of a part whose whole layer is changed too; None for any other module."""
        place = places.get(module)
        return place if place and not place.is_whole and place.path in whole else None

    for module, delta in vector.deltas.items():
        if place := widened(module):
            plain = delta.plain()
            wide = replace(plain, up=in_whole(plain.up, place))
            deltas[UNET + place.path].append(wide)
        else:
            deltas[name_of(module)].append(delta)
    for key, diff in vector.diffs.items():
        module, _, part = key.rpartition(".")
        place = places.get(module)
        # ComfyUI's loader cannot add a bias to a part.
        if place and not place.is_whole and (part == "diff_b" or widened(module)):
            diffs[f"{UNET}{place.path}.{part}"].append(in_whole(diff, place))
        else:
            diffs[f"{name_of(module)}.{part}"].append(diff)
    for module, parts in vector.opaque.items():
        name = name_of(module)
        is_taken = name in opaque or name in deltas
        opaque[module if is_taken else name] = parts
    return replace(
        vector,
        deltas={name: _sum(same) for name, same in deltas.items()},
        diffs={
            key: same[0] if len(same) == 1 else reduce(torch.add, [diff.float() for diff in same])
            for key, same in diffs.items()
        },
        opaque=opaque,
    )


def _sum(same: Sequence[Delta]) -> Delta:
    return same[0] if len(same) == 1 else stacked([(delta, 1.0) for delta in same])


def in_whole(change: Tensor, place: Place) -> Tensor:
    """The rows of a part, in the order of its whole layer, with zeros in all other rows."""
    if place.swapped:
        change = torch.cat(change.chunk(2)[::-1])
    if place.rows is None:
        return change
    first, count, total = place.rows
    whole = change.new_zeros(total, *change.shape[1:])
    whole[first : first + count] = change
    return whole
