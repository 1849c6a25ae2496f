"""LoRA vectors on ComfyUI's models: applied to them, and taken out of two of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from torch import Tensor

from .architecture import SDXL_TYPE, Architecture, Shapes, architecture, architecture_of
from .combine import one_for_each
from .delta import Vector, as_matrix
from .extract import Layer
from .formats.kinds import left_out_because
from .formats.names import canonical_names, is_text, places
from .formats.spelling import for_host
from .formats.wire import to_wire
from .opaque import misfit
from .weights.host import Layers, Merge, input_scale, stored, with_patches

logger = logging.getLogger("lcm_lora")

NAMES_SHOWN = 10
Target = str | tuple
"""What the host patches: the key of a weight, or (key, (dim, start, length), ...) for a part."""


@dataclass(frozen=True)
class Coverage:
    """How much of a vector a model took.

    Attributes:
        source: what the vector is called.
        taken: number of modules that were patched.
        total: number of modules in the vector.
        skipped: number of modules left out on purpose: of text encoders where no CLIP is
            connected, or of a part whose strength is 0.
        left_over: modules that have no place in the model, each with the reason.
        doubt: a sentence where the families differ in depth only, else empty.
        applied: the modules that were patched.
    """

    source: str
    taken: int
    total: int
    skipped: int
    left_over: tuple[str, ...]
    doubt: str = ""
    applied: frozenset[str] = frozenset()

    def __str__(self) -> str:
        text = f"{self.source}: {self.taken} of {self.total} modules applied"
        if self.skipped:
            text += f", {self.skipped} not used here (no CLIP connected, or strength 0)"
        if self.left_over:
            text += f"; {len(self.left_over)} left over: {_some(self.left_over)}"
        return f"{text}. {self.doubt}".rstrip()


def apply(
    model: ModelPatcher,
    clip: CLIP | None,
    vector: Vector,
    strength_model: float,
    strength_clip: float,
) -> tuple[ModelPatcher, CLIP | None, Coverage]:
    """Clones of model and clip with the vector's weights added, and how much of it they took.

    Left-over modules are logged as a warning. Where a strength is 0 that part stays unpatched.

    Raises:
        ValueError: the vector was made for another family, or none of its modules fits.
    """
    model, clip = model.clone(), clip.clone() if clip is not None else None
    made_for, found = architecture_of(vector.shapes), detect(model)
    parts = []
    if strength_model != 0:
        _require_architecture(vector.source, made_for, found)
        keys = places(comfy.lora.model_lora_keys_unet(model.model, {}))
        parts.append((model, keys, strength_model))
    if clip is not None and strength_clip != 0:
        keys = places(comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}))
        parts.append((clip.patcher, keys, strength_clip))

    vector = for_host(vector)
    for _, keys, _ in parts:
        vector = one_for_each(vector, keys)
    shapes, modules = vector.shapes, vector.modules()
    skipped = {m for m in modules if is_text(m) and (clip is None or strength_clip == 0)}
    skipped |= {m for m in modules if not is_text(m) and strength_model == 0}
    deltas = to_wire(replace(vector, diffs={}, opaque={}))
    taken: set[str] = set()
    reasons = {key: left_out_because(key) for key in vector.ignored}
    for patcher, keys, strength in parts:
        layers = Layers(patcher)
        chosen: dict[str, Target] = {}
        owners: dict[Target, str] = {}
        for module in sorted(modules - skipped):
            if module not in keys or _weight_of(keys[module]) not in layers:
                continue
            key = keys[module]
            if wrong := _misfit(vector, shapes, module, key, layers):
                reasons[module] = wrong
            elif (other := owners.setdefault(key, module)) != module:
                reasons[module] = f"the same layer as {other}, which is applied"
            else:
                chosen[module] = key
        sums = comfy.lora.load_lora(deltas, chosen, log_missing=False)
        for module in [m for m, key in chosen.items() if m in vector.deltas and key not in sums]:
            reasons[module] = "ComfyUI's loader does not read it"
            del chosen[module]
        # Apart, for one weight may have several.
        for patches in (sums, _diffs(vector, chosen, layers), _merges(vector, chosen)):
            patcher.add_patches(_on_scaled_inputs(patches, patcher), strength)
        taken |= chosen.keys()

    for module in modules - skipped - taken:
        reasons.setdefault(module, "not in the model")
    left_over = tuple(f"{name} ({reason})" for name, reason in sorted(reasons.items()))
    if not taken and (modules - skipped or (strength_model != 0 and clip is None)):
        raise ValueError(_nothing_taken(vector, made_for, found, left_over))
    doubt = _doubt(made_for, found) if strength_model != 0 else ""
    coverage = Coverage(
        vector.source, len(taken), len(modules), len(skipped), left_over, doubt, frozenset(taken)
    )  # fmt: skip
    if left_over or doubt:
        logger.warning("%s", coverage)
    return model, clip, coverage


def _diffs(vector: Vector, chosen: dict[str, Target], layers: Layers) -> dict[Target, tuple]:
    """Patches for the full differences, in the shapes of the weights: the host skips any other
    shape, with a line in its log."""
    patches: dict[Target, tuple] = {}
    for module, target in chosen.items():
        for part, place in (("diff", target), ("diff_b", _bias(_weight_of(target)))):
            if (diff := vector.diffs.get(f"{module}.{part}")) is not None:
                patches[place] = "diff", (diff.reshape(_shape(layers, place)),)
    return patches


def _merges(vector: Vector, chosen: dict[str, Target]) -> dict[Target, Merge]:
    """Patches for the modules that are more than a sum."""
    return {key: Merge.of(vector.opaque[m]) for m, key in chosen.items() if m in vector.opaque}


def _on_scaled_inputs(patches: dict[Target, Any], patcher: ModelPatcher) -> dict[Target, Any]:
    """The patches with D / s in place of D where a layer multiplies its inputs by a scale s first,
    W (s x). The host takes the function as the third item of a key; the second is a slice."""

    def divided_by(scale: Tensor):
        return lambda change: change / scale.to(change)

    # No layer that the host knows parts of has such a scale.
    weights = [key for key in patches if isinstance(key, str) and key.endswith(".weight")]
    scales = {key: input_scale(patcher, key) for key in weights}
    return {
        key if scales.get(key) is None else (key, None, divided_by(scales[key])): patch
        for key, patch in patches.items()
    }


def differences(distilled: ModelPatcher, base: ModelPatcher) -> Iterator[Layer]:
    """`distilled` minus `base`, layer by layer, in float32 on the CPU. Patches of the graph count,
    also while the host holds the models on a device. Packed weights are unpacked.

    Raises:
        ValueError: the models are of different families, or a layer of them has different shapes
            or is packed in a way that is not the host's.
    """
    kinds = detect(distilled), detect(base)
    if kinds[0] != kinds[1] or kinds[1] is None:
        raise ValueError(
            f"The distilled model is {kinds[0] or 'of another kind'} and the base model is "
            f"{kinds[1] or 'of another kind'}; expected two Stable Diffusion models of the "
            "same architecture."
        )
    keys = [model.model.state_dict().keys() for model in (distilled, base)]
    paths = comfy.utils.unet_to_diffusers(base.model.model_config.unet_config)
    # Some native names have two paths, in an order of chance, but one canonical name.
    of = {native: path for path, native in paths.items() if native.endswith(".weight")}
    both = keys[0] & keys[1]
    for native in watched(list(of)):
        (name,) = canonical_names([f"unet.{of[native].removesuffix('.weight')}"]).values()
        weight = f"diffusion_model.{native}"
        if weight in both:
            bias = _difference(distilled, base, _bias(weight)) if _bias(weight) in both else None
            yield name, _difference(distilled, base, weight), bias


def _difference(distilled: ModelPatcher, base: ModelPatcher, key: str) -> Tensor | None:
    models = {"distilled": distilled, "base": base}
    if stored(distilled, key) is stored(base, key) and not any(
        key in model.patches for model in models.values()
    ):
        return None  # one tensor, which two models share
    one, other = (with_patches(model, key, called) for called, model in models.items())
    if one.shape != other.shape:
        raise ValueError(
            f"{key} is {list(one.shape)} in the distilled model and {list(other.shape)} in the "
            "base model; expected two models of the same layout."
        )
    return one - other


def device() -> torch.device:
    """Where whole changes are computed: on the host's device if it is CUDA or ROCm, else on the
    CPU, because other devices lack float64 or decompositions."""
    there = comfy.model_management.get_torch_device()
    return there if there.type == "cuda" else torch.device("cpu")


def watched(names: Sequence[str]) -> Iterator[str]:
    """The names one by one, with a progress bar on the node; raises where the user interrupts."""
    bar = comfy.utils.ProgressBar(len(names))
    for name in names:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield name
        bar.update(1)


def detect(model: ModelPatcher) -> Architecture | None:
    """The family of a model, or None where it has no cross-attention as the SD types have."""
    config: dict[str, Any] = model.model.model_config.unet_config
    if "num_res_blocks" not in config:
        return None
    return architecture(config.get("context_dim"), config["transformer_depth"][-1])


def _weight_of(target: Target) -> str:
    return target if isinstance(target, str) else target[0]


def _misfit(
    vector: Vector, shapes: Shapes, module: str, target: Target, layers: Layers
) -> str:  # fmt: skip
    """Why a module cannot be added to its target; empty where it can.

    Asked before patching, for the host notices at sampling only and then merely logs it. shapes:
    the vector's, which are worked out once.
    """
    key = _weight_of(target)
    if not isinstance(target, str) and f"{module}.diff_b" in vector.diffs:
        return f"ComfyUI adds no bias to a part of {key}"
    changes: list[tuple[tuple[int, ...], Target]] = []
    if module in shapes:
        changes.append((shapes[module], target))
    for part, place in (("diff", target), ("diff_b", _bias(key))):
        if (diff := vector.diffs.get(f"{module}.{part}")) is not None:
            changes.append((tuple(diff.shape), place))
    for shape, place in changes:
        name = _weight_of(place)
        if name not in layers:
            return f"the model has no {name}"
        if wrong := layers.unpatchable(name):
            return wrong
        there = _shape(layers, place)
        if module in vector.opaque and len(shape) == 1:
            there = there[:1]
        # The host reshapes, so [out, in] is as good as [out, in, 1, 1].
        if as_matrix(shape) != as_matrix(there):
            return f"shape {list(shape)}, the model has {list(there)}"
    if module not in vector.opaque:
        return ""
    if input_scale(layers.patcher, key) is not None:
        return "the layer multiplies its inputs by a scale, which only plain LoRAs allow for"
    return misfit(vector.opaque[module], _shape(layers, target))


def _shape(layers: Layers, target: Target) -> tuple[int, ...]:
    """The shape of a weight, or of a part of it."""
    shape = layers.shape(_weight_of(target))
    if isinstance(target, str) or target[1] is None:
        return shape
    dim, _, size = target[1]
    return (*shape[:dim], size, *shape[dim + 1 :])


def _bias(weight: str) -> str:
    """The key of the bias beside a weight."""
    return weight.removesuffix(".weight") + ".bias"


def _require_architecture(
    source: str, made_for: Architecture | None, found: Architecture | None
) -> None:
    if made_for and found and made_for.width != found.width:
        raise ValueError(
            f"{source} was made for {made_for}, but the model is {found}. Choose a LoRA made for "
            f"{found.name}, or a checkpoint of type {made_for.name}."
        )


def _doubt(made_for: Architecture | None, found: Architecture | None) -> str:
    if made_for and found and made_for.name not in (found.name, SDXL_TYPE):
        return f"It seems made for {made_for.name}, the model is {found.name}: expect less of it."
    return ""


def _nothing_taken(
    vector: Vector,
    made_for: Architecture | None,
    found: Architecture | None,
    left_over: tuple[str, ...],
) -> str:
    if not left_over:
        return (
            f"{vector.source} holds text encoder modules only, so it does nothing to the model "
            "alone; use it where a CLIP is connected."
        )
    return (
        f"The model takes none of the {len(vector.modules())} modules of {vector.source}. It was "
        f"made for {made_for or 'an unknown family'}, the model is {found or 'of another kind'}. "
        f"Left over: {_some(left_over)}."
    )


def _some(names: tuple[str, ...]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
