"""Adds a LoRA vector to ComfyUI's models, and reports what did not fit."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import comfy.lora
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from torch import Tensor

from .agree import require_numbers
from .architecture import DOUBT, SDXL_TYPE, Architecture, Shapes, architecture_of
from .combine import one_for_each
from .delta import Delta, Vector, as_matrix
from .formats.kinds import left_out_because
from .formats.module_names import UNET, is_text
from .formats.places import places
from .formats.spelling import for_host, renamed
from .formats.transformers import called, flat, is_known
from .formats.wire import to_wire
from .live import fits
from .opaque import misfit
from .slices import settled
from .weights.host import Layers, Merge, bias_of, detect, input_scale

logger = logging.getLogger("lcm_lora")

NAMES_SHOWN = 10
Target = str | tuple[Any, ...]
"""What ComfyUI patches: the key of a weight, or (key, (dim, start, length), ...) for a part."""


@dataclass(frozen=True)
class Coverage:
    """Which modules of a vector a model took.

    Attributes:
        source: what the vector is called.
        applied: the modules that were patched.
        total: the number of modules in the vector.
        skipped: the number of modules left out on purpose: those of text encoders if no CLIP is
            connected, and those of a part whose strength is 0.
        left_over: the modules that do not fit the model, each with the reason.
        doubt: (what the vector was made for, what the model is), if they are only relatives.
    """

    source: str
    applied: frozenset[str]
    total: int
    skipped: int
    left_over: tuple[str, ...]
    doubt: tuple[str, str] | None = None

    @property
    def taken(self) -> int:
        """The number of modules that were patched."""
        return len(self.applied)

    def __str__(self) -> str:
        text = f"{self.source}: {self.taken} of {self.total} modules applied"
        if self.skipped:
            text += f", {self.skipped} not used here (no CLIP connected, or strength 0)"
        if self.left_over:
            text += f"; {len(self.left_over)} left over: {_some(self.left_over)}"
        doubt = f" {DOUBT.format(made=self.doubt[0], actual=self.doubt[1])}" if self.doubt else ""
        return f"{text}.{doubt}"


def apply(
    model: ModelPatcher,
    clip: CLIP | None,
    vector: Vector,
    strength_model: float,
    strength_clip: float,
) -> tuple[ModelPatcher, CLIP | None, Coverage]:
    """Clones of model and clip with the vector added, and how much of it they took.

    A part whose strength is 0 stays unpatched. Modules that do not fit are logged as a warning.

    Raises:
        ValueError: the vector was made for another architecture, none of its modules fits, or it
            contains NaN or infinity.
    """
    require_numbers(vector)
    model, clip = model.clone(), clip.clone() if clip is not None else None
    layers = Layers(model)
    made_for, actual = architecture_of(vector.shapes), detect(model, layers)
    networks = []
    if strength_model != 0:
        _require_architecture(vector.source, made_for, actual)
        keys = comfy.lora.model_lora_keys_unet(model.model, {})
        networks.append(_Network(layers, keys, strength_model))
    if clip is not None and strength_clip != 0:
        keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
        networks.append(_Network(Layers(clip.patcher), keys, strength_clip))

    vector = for_host(settled([vector], called(actual.name) if actual else ())[0])
    for network in networks:
        vector = one_for_each(network.spelled(vector), network.targets)
    modules = vector.modules()
    strengths = {True: 0.0 if clip is None else strength_clip, False: strength_model}
    wanted = {module for module in modules if strengths[is_text(module)] != 0}
    sums = to_wire(replace(vector, diffs={}, opaque={}))
    applied: set[str] = set()
    reasons = {key: left_out_because(key) for key in vector.ignored}
    for network in networks:
        taken, refused = network.patch(vector, sums, wanted)
        applied |= taken
        reasons |= refused
    for module in wanted - applied:
        reasons.setdefault(module, "not in the model")

    left_over = tuple(f"{name} ({reason})" for name, reason in sorted(reasons.items()))
    if not applied and (wanted or (strength_model != 0 and clip is None)):
        raise ValueError(_nothing_taken(vector, made_for, actual, left_over))
    doubt = _doubt(made_for, actual) if strength_model != 0 else None
    coverage = Coverage(
        vector.source, frozenset(applied), len(modules), len(modules - wanted), left_over, doubt
    )
    if left_over or doubt:
        logger.warning("%s", coverage)
    return model, clip, coverage


def beside(model: ModelPatcher, vector: Vector) -> dict[str, Delta] | None:
    """The deltas of a vector by the model's layers, for live.py, without its text encoder part.
    None if anything but a plain delta on a plain layer is among them. Does not report what does not
    fit the model; `apply` does. Raises ValueError if the vector contains NaN or infinity."""
    require_numbers(vector)
    layers = Layers(model)
    network = _Network(layers, comfy.lora.model_lora_keys_unet(model.model, {}), 1.0)
    kind = detect(model, layers)
    vector = for_host(settled([vector], called(kind.name) if kind else ())[0])
    vector = one_for_each(network.spelled(vector), network.targets)
    targets, _ = network._match(vector, {name for name in vector.modules() if not is_text(name)})
    deltas: dict[str, Delta] = {}
    for module, target in targets.items():
        layer, _, part = str(target).rpartition(".")
        if (
            not isinstance(target, str)
            or part != "weight"
            or vector.only([module]).diffs
            or module not in vector.deltas
            or input_scale(model, target) is not None
            or not fits(model.model.get_submodule(layer), vector.deltas[module])
        ):
            return None
        deltas[layer] = vector.deltas[module]
    return deltas


class _Network:
    """The UNet or the text encoders of a model, to which a vector is added.

    targets: the weight that each module changes, by every name that a vector may use for it.
    """

    def __init__(self, layers: Layers, keys: Mapping[str, Target], strength: float):
        """keys: ComfyUI's own map from module names to targets."""
        self.patcher, self.layers, self.strength = layers.patcher, layers, strength
        self.targets = places(keys)

    def spelled(self, vector: Vector) -> Vector:
        """The vector, with ComfyUI's names for modules that it knows under another prefix."""
        known = {}
        for name in vector.modules() - self.targets.keys():
            if not is_text(name) and (own := UNET + flat(name)) in self.targets:
                known[name] = own
        # Of a layer under two such names, neither is surely right; apply reports both.
        taken = vector.modules() | {
            own for own, uses in Counter(known.values()).items() if uses > 1
        }
        return renamed(vector, {n: own for n, own in known.items() if own not in taken})

    def patch(
        self, vector: Vector, sums: dict[str, Tensor], modules: Collection[str]
    ) -> tuple[Set[str], dict[str, str]]:
        """Adds the modules that fit. -> (their names, and why others of this network do not fit).

        sums: the tensors of the vector's deltas, as ComfyUI's loader reads them.
        """
        targets, reasons = self._match(vector, modules)
        patches = comfy.lora.load_lora(sums, targets, log_missing=False)
        for module in vector.deltas.keys() & targets.keys():
            if targets[module] not in patches:
                reasons[module] = "ComfyUI's loader does not read it"
                del targets[module]
        # Added one kind after the other, because one weight may have several kinds.
        for kind in (patches, self._diffs(vector, targets), _merges(vector, targets)):
            if kind:  # with an empty dict, the host would still build a state dict
                self.patcher.add_patches(_on_scaled_inputs(kind, self.patcher), self.strength)
        return targets.keys(), reasons

    def _match(
        self, vector: Vector, modules: Collection[str]
    ) -> tuple[dict[str, Target], dict[str, str]]:
        """The target of each module that fits, and why other modules of this network do not."""
        targets: dict[str, Target] = {}
        reasons: dict[str, str] = {}
        owners: dict[Target, str] = {}
        shapes = vector.shapes
        for module in sorted(self.targets.keys() & modules):
            target = self.targets[module]
            if _weight_of(target) not in self.layers:
                continue
            if reason := self._misfit(vector, shapes, module, target):
                reasons[module] = reason
            elif (owner := owners.setdefault(target, module)) != module:
                reasons[module] = f"the same layer as {owner}, which is applied"
            else:
                targets[module] = target
        return targets, reasons

    def _misfit(self, vector: Vector, shapes: Shapes, module: str, target: Target) -> str:
        """Why a module cannot be added to its target; empty if it can.

        Checked before patching, because ComfyUI notices it only while sampling, and then only logs
        it. shapes: `vector.shapes`, which the caller computes once.
        """
        key = _weight_of(target)
        changes = [(shapes[module], target)] if module in shapes else []
        changes += [(diff.shape, place) for diff, place in _changes(vector, module, target)]
        for shape, place in changes:
            name = _weight_of(place)
            if name not in self.layers:
                return f"the model has no {name}"
            if reason := self.layers.unpatchable(name):
                return reason
            actual = self._shape(place)
            if reason := self._outside(place):
                return reason
            if module in vector.opaque and len(shape) == 1:
                actual = actual[:1]
            # ComfyUI reshapes, so [out, in] is as good as [out, in, 1, 1].
            if as_matrix(shape) != as_matrix(actual):
                return f"shape {list(shape)}, the model has {list(actual)}"
        if module not in vector.opaque:
            return ""
        if input_scale(self.patcher, key) is not None:
            return "the layer multiplies its inputs by a scale, which only plain LoRAs allow for"
        return misfit(vector.opaque[module], self._shape(target))

    def _diffs(self, vector: Vector, targets: Mapping[str, Target]) -> dict[Target, Any]:
        """Patches for the full differences, in the shapes of the weights. ComfyUI would skip a
        difference of another shape and only log it."""
        return {
            place: ("diff", (diff.reshape(self._shape(place)),))
            for module, target in targets.items()
            for diff, place in _changes(vector, module, target)
        }

    def _outside(self, target: Target) -> str:
        """Why a target lies outside its weight, as when ComfyUI's table is for a larger model;
        empty if it does not."""
        if isinstance(target, str) or target[1] is None:
            return ""
        (dim, begin, size), shape = target[1], self.layers.shape(_weight_of(target))
        if begin + size <= shape[dim]:
            return ""
        return f"rows {begin} to {begin + size}, the model has {shape[dim]}"

    def _shape(self, target: Target) -> tuple[int, ...]:
        """The shape of a weight, or of a part of it."""
        shape = self.layers.shape(_weight_of(target))
        if isinstance(target, str) or target[1] is None:
            return shape
        dim, _, size = target[1]
        return (*shape[:dim], size, *shape[dim + 1 :])


def _changes(vector: Vector, module: str, target: Target) -> list[tuple[Tensor, Target]]:
    """The module's full differences, of its weight and its bias, each with its own target."""
    bias: Target = bias_of(_weight_of(target))
    places = (
        ("diff", target),
        ("diff_b", bias if isinstance(target, str) else (bias, *target[1:])),
    )
    return [
        (vector.diffs[key], place)
        for part, place in places
        if (key := f"{module}.{part}") in vector.diffs
    ]


def _merges(vector: Vector, targets: Mapping[str, Target]) -> dict[Target, Merge]:
    """Patches for the modules whose change depends on the weight."""
    return {key: Merge.of(vector.opaque[m]) for m, key in targets.items() if m in vector.opaque}


def _on_scaled_inputs(patches: Mapping[Target, Any], patcher: ModelPatcher) -> dict[Target, Any]:
    """The patches, with D / s instead of D if a layer multiplies its inputs by a scale s first:
    W (s x). ComfyUI takes the function as the third item of a key; the second is a slice."""

    def divided_by(scale: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda change: change / scale.to(change)

    scaled: dict[Target, Any] = {}
    for key, patch in patches.items():
        # No layer that ComfyUI patches in parts has such a scale.
        scale = None
        if isinstance(key, str) and key.endswith(".weight"):
            scale = input_scale(patcher, key)
        scaled[key if scale is None else (key, None, divided_by(scale))] = patch
    return scaled


def _weight_of(target: Target) -> str:
    """The key of the target's weight."""
    return target if isinstance(target, str) else target[0]


def _require_architecture(
    source: str, made_for: Architecture | None, actual: Architecture | None
) -> None:
    if made_for and actual and not made_for.fits(actual) and _is_certain(made_for, actual):
        raise ValueError(
            f"{source} was made for {made_for}, but the model is {actual}. Choose a LoRA made for "
            f"{actual.name}, or another checkpoint: {made_for.name}."
        )


def _is_certain(made_for: Architecture, actual: Architecture) -> bool:
    """Whether this pack would recognise files for the model. Unknown models share layer names with
    known ones, so a LoRA for them may look like one for a known model."""
    return made_for.is_unet or actual.is_unet or is_known(actual.name)


def _doubt(
    made_for: Architecture | None, actual: Architecture | None
) -> tuple[str, str] | None:  # fmt: skip
    if not made_for or not actual or not _is_certain(made_for, actual):
        return None
    is_one = made_for.is_surely(actual) or made_for.name == SDXL_TYPE
    return None if is_one else (made_for.name, actual.name)


def _nothing_taken(
    vector: Vector,
    made_for: Architecture | None,
    actual: Architecture | None,
    left_over: tuple[str, ...],
) -> str:
    if not left_over:
        return (
            f"{vector.source} holds text encoder modules only, so it changes nothing in the model. "
            "Use it with a CLIP connected."
        )
    return (
        f"The model takes none of the {len(vector.modules())} modules of {vector.source}. It was "
        f"made for {made_for or 'an unknown architecture'}, the model is "
        f"{actual or 'of another kind'}. Left over: {_some(left_over)}."
    )


def _some(names: tuple[str, ...]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
