"""LoRA vectors on ComfyUI's models. The only file of this folder that knows the host."""

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

from .combine import one_for_each
from .delta import Vector, as_matrix
from .extract import Layer
from .family import SDXL_TYPE, Family, Shapes, family, family_of
from .kinds import left_out_because
from .names import canonical_names, is_text, places
from .wire import for_host, to_wire

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
    made_for, found = family_of(vector.shapes), detect(model)
    parts = []
    if strength_model != 0:
        _require_family(vector.source, made_for, found)
        keys = places(comfy.lora.model_lora_keys_unet(model.model, {}))
        parts.append((model, model.model.state_dict(), keys, strength_model))
    if clip is not None and strength_clip != 0:
        keys = places(comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}))
        parts.append((clip, clip.cond_stage_model.state_dict(), keys, strength_clip))

    vector = for_host(vector)
    for _, _, keys, _ in parts:
        vector = one_for_each(vector, keys)
    shapes, modules = vector.shapes, vector.modules()
    skipped = {m for m in modules if is_text(m) and (clip is None or strength_clip == 0)}
    skipped |= {m for m in modules if not is_text(m) and strength_model == 0}
    # Apart, for the host's reader keeps one patch a module and a sum may hold both kinds.
    only = [{"deltas": vector.deltas}, {"diffs": vector.diffs}, {"opaque": vector.opaque}]
    nothing = {"deltas": {}, "diffs": {}, "opaque": {}}
    wires = [to_wire(replace(vector, **nothing | each)) for each in only]
    taken: set[str] = set()
    reasons = {key: left_out_because(key) for key in vector.ignored}
    for target, weights, keys, strength in parts:
        chosen: dict[str, Target] = {}
        layers: dict[Target, str] = {}
        for module in sorted(modules - skipped):
            if module not in keys or _weight_of(keys[module]) not in weights:
                continue
            key = keys[module]
            if wrong := _misfit(vector, shapes, module, key, weights):
                reasons[module] = wrong
            elif (other := layers.setdefault(key, module)) != module:
                reasons[module] = f"the same layer as {other}, which is applied"
            else:
                chosen[module] = key
        read = [comfy.lora.load_lora(tensors, chosen, log_missing=False) for tensors in wires]
        for patches in read:
            target.add_patches(patches, strength)
        known = {key for patches in read for key in patches}
        for module, key in chosen.items():
            if known & {key, _bias(_weight_of(key))}:
                taken.add(module)
            else:
                reasons[module] = "ComfyUI's loader does not read it"

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


def differences(distilled: ModelPatcher, base: ModelPatcher) -> Iterator[Layer]:
    """What `distilled` has more than `base`, layer by layer: patches of the graph count, models
    that the host holds on a device too. Float32 on the CPU.

    Raises:
        ValueError: the models are of different families, or a layer of them has different shapes.
    """
    kinds = detect(distilled), detect(base)
    if kinds[0] != kinds[1] or kinds[1] is None:
        raise ValueError(
            f"The distilled model is {kinds[0] or 'of another kind'} and the base model is "
            f"{kinds[1] or 'of another kind'}; expected two models of one Stable Diffusion family."
        )
    there = [model.get_key_patches("diffusion_model.") for model in (distilled, base)]
    paths = comfy.utils.unet_to_diffusers(base.model.model_config.unet_config)
    # Some native names have two paths, in an order of chance, but one canonical name.
    of = {native: path for path, native in paths.items() if native.endswith(".weight")}
    for native in watched(list(of)):
        (name,) = canonical_names([f"unet.{of[native].removesuffix('.weight')}"]).values()
        weight = f"diffusion_model.{native}"
        if weight in there[0] and weight in there[1]:
            yield name, _difference(*there, weight), _difference(*there, _bias(weight))


def _difference(ours: dict[str, list], theirs: dict[str, list], key: str) -> Tensor | None:
    if key not in ours or key not in theirs:
        return None
    (a, *patches_a), (b, *patches_b) = ours[key], theirs[key]
    if a[0] is b[0] and not patches_a and not patches_b:
        return None  # one tensor, which two models share
    one, other = (_weight(each, key) for each in (ours[key], theirs[key]))
    if one.shape != other.shape:
        raise ValueError(
            f"{key} is {list(one.shape)} in the distilled model and {list(other.shape)} in the "
            "base model; expected two models of the same layout."
        )
    return one - other


def _weight(entry: list, key: str) -> Tensor:
    """A weight with its patches, from what ModelPatcher.get_key_patches tells of it."""
    (weight, convert), *patches = entry
    whole = convert(weight.to("cpu", torch.float32, copy=True), inplace=True)
    return comfy.lora.calculate_weight(patches, whole, key)


def device() -> torch.device:
    """Where the host computes."""
    return comfy.model_management.get_torch_device()


def watched(names: Sequence[str]) -> Iterator[str]:
    """The names one by one, with a progress bar on the node; raises where the user interrupts."""
    bar = comfy.utils.ProgressBar(len(names))
    for name in names:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield name
        bar.update(1)


def detect(model: ModelPatcher) -> Family | None:
    """The family of a model, or None where it has no cross-attention as the SD types have."""
    config: dict[str, Any] = model.model.model_config.unet_config
    if "num_res_blocks" not in config:
        return None
    return family(config.get("context_dim"), config["transformer_depth"][-1])


def _weight_of(target: Target) -> str:
    return target if isinstance(target, str) else target[0]


def _misfit(
    vector: Vector, shapes: Shapes, module: str, target: Target, weights: dict[str, Any]
) -> str:  # fmt: skip
    """Why a module cannot be added to its target; empty where it can.

    Asked before patching, for the host notices at sampling only and then merely logs it. shapes:
    the vector's, which are worked out once.
    """
    key = _weight_of(target)
    part_of_a_weight = None if isinstance(target, str) else target[1]
    if part_of_a_weight and f"{module}.diff_b" in vector.diffs:
        return f"ComfyUI adds no bias to a part of {key}"
    changes = [(shapes[module], key)] if module in shapes else []
    for part, name in (("diff", key), ("diff_b", _bias(key))):
        if (diff := vector.diffs.get(f"{module}.{part}")) is not None:
            changes.append((tuple(diff.shape), name))
    for shape, name in changes:
        if name not in weights:
            return f"the model has no {name}"
        there = tuple(weights[name].shape)
        if part_of_a_weight:
            dim, _, size = part_of_a_weight
            there = (*there[:dim], size, *there[dim + 1 :])
        if module in vector.opaque and len(shape) == 1:
            there = there[:1]
        # The host reshapes, so [out, in] is as good as [out, in, 1, 1].
        if as_matrix(shape) != as_matrix(there):
            return f"shape {list(shape)}, the model has {list(there)}"
    return ""


def _bias(weight: str) -> str:
    """The key of the bias beside a weight."""
    return weight.removesuffix(".weight") + ".bias"


def _require_family(source: str, made_for: Family | None, found: Family | None) -> None:
    if made_for and found and made_for.width != found.width:
        raise ValueError(
            f"{source} was made for {made_for}, but the model is {found}. Choose a LoRA made for "
            f"{found.name}, or a checkpoint of type {made_for.name}."
        )


def _doubt(made_for: Family | None, found: Family | None) -> str:
    if made_for and found and made_for.name not in (found.name, SDXL_TYPE):
        return f"It seems made for {made_for.name}, the model is {found.name}: expect less of it."
    return ""


def _nothing_taken(
    vector: Vector, made_for: Family | None, found: Family | None, left_over: tuple[str, ...]
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
