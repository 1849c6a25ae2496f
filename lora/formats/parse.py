"""Turns tensors in any dialect of keys into a Vector."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from ..architecture import has_two_text_encoders
from ..delta import NOT_LINEAR, Delta, Opaque, Vector, as_matrix
from ..opaque import adapters_of, opaque, with_settled_magnitudes
from ..slices import settled
from .key_endings import split_key, unknown_adapter
from .kinds import not_a_plain_lora, what_it_looks_like
from .lycoris import product
from .module_names import canonical_names, text_encoder_prefix
from .peft_config import PEFT_METADATA, PeftConfig, rank_in
from .spelling import respelled

logger = logging.getLogger("lcm_lora")

_EMBEDDING = {"embedding_A": "up", "embedding_B": "down"}
_FACTORS = ("up", "down", "mid")


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> Vector:
    """Tensors in any known dialect of keys as a vector with canonical names.

    Keys that are not part of a LoRA are logged, and listed in the vector.

    Raises:
        ValueError: the tensors hold no LoRA, or an adapter that is not supported, or a module is
            broken. The message names the source and the module.
    """
    if adapter := unknown_adapter(tensors):
        raise ValueError(
            f"{source} holds {adapter} weights, which these nodes do not support. ComfyUI's own "
            "Load LoRA node may be able to apply this file."
        )
    modules, ignored = _modules(tensors, source)
    if not any(parts.keys() - {"alpha"} for parts in modules.values()):
        raise ValueError(f"{source} holds no LoRA: {what_it_looks_like(tensors)}.")
    if kind := not_a_plain_lora(tensors):
        raise ValueError(f"{source} holds no LoRA for a model alone: it looks like {kind}.")
    names = canonical_names(modules)
    config = PeftConfig(metadata)
    deltas: dict[str, Delta] = {}
    diffs: dict[str, Tensor] = {}
    others: dict[str, Opaque] = {}
    for module, parts in _joined(modules, names).items():
        name = names[module]
        if parts.keys() == {"alpha"}:
            ignored.append(f"{module}.alpha")
            continue
        if name in deltas or name in others or {f"{name}.diff", f"{name}.diff_b"} & diffs.keys():
            raise ValueError(
                f"{source} holds two LoRAs for the module {name}; expected one. Get the original "
                "files and combine them with Combine LoRA Vectors."
            )
        try:
            for part in ("diff", "diff_b"):
                if part in parts:
                    diffs[f"{name}.{part}"] = _diff(part, parts[part])
            if parts.keys() & NOT_LINEAR.keys():
                others[name] = _opaque(module, parts, config.scale(module, parts))
            elif parts.keys() - {"alpha", "diff", "diff_b"}:
                deltas[name] = _delta(name, parts, config.scale(module, parts))
                _require_same_layer(deltas[name], diffs.get(f"{name}.diff"))
                if "up_bias" in parts:  # PEFT's lora_bias=True; it has the scale of the product
                    bias = _diff("up_bias", parts["up_bias"]).float() * deltas[name].scale
                    diffs[f"{name}.diff_b"] = bias + diffs.get(f"{name}.diff_b", 0)
        except ValueError as error:
            raise ValueError(f"{source}, module {name}: {error}.") from None

    if ignored:
        logger.warning(
            "%s: %d keys are not part of the LoRA: %s", source, len(ignored), ignored[:10]
        )
    vector = Vector(
        deltas,
        diffs,
        {key: value for key, value in metadata.items() if key != PEFT_METADATA},
        source,
        tuple(ignored),
        with_settled_magnitudes(others),
    )
    return settled([respelled(vector, has_two_text_encoders(vector.shapes))])[0]


def _modules(
    tensors: Mapping[str, Tensor], source: str
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """(the parts of each module, by the name that the file uses; the keys of no module)."""
    modules: dict[str, dict[str, Tensor]] = {}
    ignored = []
    for key, tensor in tensors.items():
        if not (split := split_key(key)):
            ignored.append(key)
            continue
        module, part = split
        if part in _EMBEDDING:  # PEFT's change of an embedding is the transpose of B A
            part, tensor = _EMBEDDING[part], tensor.transpose(0, -1)
        parts = modules.setdefault(module, {})
        if part in parts:
            raise ValueError(
                f"{source}, {key}: its module has two tensors for {part}; expected one."
            )
        parts[part] = tensor.detach()
    return modules, ignored


def _joined(
    modules: Mapping[str, dict[str, Tensor]], canonical: Mapping[str, str]
) -> dict[str, dict[str, Tensor]]:
    """The modules. If the file spells the name of one module in two ways, as diffusers does for
    DoRA's magnitudes, its parts are joined. Spellings that share a part stay two modules.

    canonical: the canonical name of each module.
    """
    spellings: dict[str, list[str]] = {}
    for module, name in canonical.items():
        spellings.setdefault(text_encoder_prefix(name, True), []).append(module)
    joined: dict[str, dict[str, Tensor]] = {}
    for names in spellings.values():
        parts = [part for module in names for part in modules[module]]
        if len(parts) > len(set(parts)):
            joined |= {module: modules[module] for module in names}
        else:  # PEFT's configuration uses the spelling of the factors
            first = max(names, key=lambda module: "down" in modules[module])
            joined[first] = {part: t for module in names for part, t in modules[module].items()}
    return joined


def _kohya_part(part: str) -> str:
    return f"lora_{part}.weight" if part in _FACTORS else part


def _delta(name: str, parts: Mapping[str, Tensor], peft_scale: float | None) -> Delta:
    """The delta of a module. peft_scale: the scale from PEFT's configuration, used if the module
    has no alpha of its own."""
    alpha = _alpha(parts["alpha"]) if "alpha" in parts else None
    if len(adapters := adapters_of([_kohya_part(part) for part in parts])) > 1:
        kinds = " and ".join(sorted(adapters))
        raise ValueError(f"it has parts of {kinds}; expected those of one adapter")
    if small := {k: part for k, part in parts.items() if k.startswith(("hada_", "lokr_"))}:
        delta: Delta = product(small, alpha, name)
    else:
        for part, other in (("up", "down"), ("down", "up")):
            if part not in parts:
                raise ValueError(f"it has no {part} factor beside its {other} or mid factor")
        delta = Delta(parts["up"], parts["down"], parts.get("mid"), alpha)
    return delta if "alpha" in parts or peft_scale is None else delta.scaled(peft_scale)


def _opaque(module: str, parts: Mapping[str, Tensor], peft_scale: float | None) -> Opaque:
    """A module that is not a sum, with its parts under kohya's names. module: as in the file."""
    if "up_bias" in parts:
        raise ValueError("it has a bias for its up factor (lora_bias); DoRA and OFT have none")
    kohya = {
        _kohya_part(part): tensor
        for part, tensor in parts.items()
        if part not in ("diff", "diff_b")
    }
    if (magnitude := kohya.pop("magnitude", None)) is not None:
        if "dora_scale" in kohya:
            raise ValueError("it has two magnitudes (DoRA); expected one")
        # One number for each output; PEFT has [1, out, 1, 1] for convolutions.
        of_outputs = "up" in parts and parts["up"].shape[:1] == (magnitude.numel(),)
        kohya["dora_scale"] = magnitude.flatten() if of_outputs else magnitude
    alpha = None
    if "alpha" in kohya:
        alpha = _alpha(kohya["alpha"])
    elif peft_scale is not None:
        alpha = peft_scale * (rank_in(parts) or 1)
    if alpha is not None and "oft_blocks" in kohya and module.startswith("diffusion_model."):
        # ComfyUI's trainer uses this prefix. Its alpha is the limit itself, where LyCORIS' is the
        # limit divided by the number of outputs.
        alpha /= opaque(kohya, alpha).shape[0]
    return opaque(kohya, alpha)


def _diff(part: str, change: Tensor) -> Tensor:
    """A full difference, checked."""
    if not change.dim() or not change.numel() or not change.is_floating_point():
        raise ValueError(
            f"its {part} is {list(change.shape)} of {change.dtype}; expected one or more floating "
            "point numbers for each output"
        )
    return change


def _require_same_layer(delta: Delta, diff: Tensor | None) -> None:
    if diff is not None and as_matrix(delta.shape) != as_matrix(diff.shape):
        raise ValueError(
            f"its factors make {list(delta.shape)} and its full difference is {list(diff.shape)}; "
            "expected one shape"
        )


def _alpha(tensor: Tensor) -> float:
    """The number in an alpha."""
    if tensor.numel() != 1:
        raise ValueError(f"its alpha has {tensor.numel()} values; expected one")
    try:
        return float(tensor.item())
    except (TypeError, NotImplementedError):
        raise ValueError(f"its alpha is of {tensor.dtype}; expected a real number") from None
