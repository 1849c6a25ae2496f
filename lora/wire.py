"""Between a dict of tensors, as files and the LORA_MODEL wire hold it, and a Vector."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .delta import Delta, Opaque, Vector, as_matrix
from .family import family_of, has_two_text_encoders
from .lycoris import Product, product
from .metadata import described
from .names import NOT_LINEAR, canonical_names, split_key, text_encoder_prefix, unknown_adapter
from .opaque import adapters_of, opaque, with_settled_magnitudes

logger = logging.getLogger("lcm_lora")

# diffusers keeps the adapter's configuration under this key of the file's header.
PEFT_METADATA = "lora_adapter_metadata"
# In practice a pattern is a module's path; a real regular expression could take for ever.
_PLAIN_PATTERN = re.compile(r"\^?[\w.-]+")


class LoraModel(dict[str, Tensor]):
    """The host's LORA_MODEL, a dict of tensors in kohya names, that knows where it came from."""

    def __init__(self, tensors: Mapping[str, Tensor], vector: Vector):
        super().__init__(tensors)
        self.metadata = dict(vector.metadata)
        self.source = vector.source
        self.sha256 = vector.sha256
        self.ignored = vector.ignored


def to_wire(vector: Vector) -> LoraModel:
    """A vector as tensors in kohya names; every LoRA gets its alpha written out."""
    vector = one_change(vector)
    tensors: dict[str, Tensor] = {}
    for module, delta in vector.deltas.items():
        parts = delta.wire() if isinstance(delta, Product) else _lora(delta)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    for module, parts in vector.opaque.items():
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    return LoraModel(tensors | vector.diffs, vector)


def one_change(vector: Vector) -> Vector:
    """The vector with one change of each weight, as the host's loader takes no more: a delta beside
    a full difference goes into that."""
    diffs = dict(vector.diffs)
    deltas = dict(vector.deltas)
    for key in diffs:
        module, _, part = key.rpartition(".")
        if part == "diff" and module in deltas:
            diffs[key] = diffs[key].float() + deltas.pop(module).matrix().reshape(diffs[key].shape)
    return replace(vector, deltas=deltas, diffs=diffs)


def _lora(delta: Delta) -> dict[str, Tensor]:
    parts = {"lora_up.weight": delta.up, "lora_down.weight": delta.down}
    if delta.mid is not None:
        parts["lora_mid.weight"] = delta.mid
    return parts | {"alpha": torch.tensor(float(delta.scale * delta.rank))}


def from_wire(tensors: Mapping[str, Tensor]) -> Vector:
    """A LORA_MODEL of any node as a vector on the CPU, where sums are computed. The host's trainer
    may leave its tensors on a device."""
    metadata, source = getattr(tensors, "metadata", {}), getattr(tensors, "source", "LORA_MODEL")
    vector = parse({key: t.detach().cpu() for key, t in tensors.items()}, metadata, source)
    ignored = (*getattr(tensors, "ignored", ()), *vector.ignored)
    return replace(vector, sha256=getattr(tensors, "sha256", ""), ignored=ignored)


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str) -> Vector:
    """Tensors in any known key dialect as a vector with canonical names.

    Raises:
        ValueError: no LoRA in them, an adapter that is not known here, or a module that is broken;
            the message names source and module.
    """
    if adapter := unknown_adapter(tensors):
        raise ValueError(
            f"{source} holds {adapter} weights, which these nodes do not read. The host's own Load "
            "LoRA node may be able to apply this file."
        )
    modules: dict[str, dict[str, Tensor]] = {}
    ignored = []
    for key, tensor in tensors.items():
        if split := split_key(key):
            modules.setdefault(split[0], {})[split[1]] = tensor.detach()
        else:
            ignored.append(key)
    if not any(parts.keys() - {"alpha"} for parts in modules.values()):
        raise ValueError(f"{source} holds no LoRA: {_what_it_looks_like(list(tensors))}.")
    modules = _joined(modules)
    config = _peft_config(metadata)
    deltas: dict[str, Delta] = {}
    diffs: dict[str, Tensor] = {}
    others: dict[str, Opaque] = {}
    for module, name in canonical_names(modules).items():
        parts = modules[module]
        if parts.keys() == {"alpha"}:
            ignored.append(f"{module}.alpha")
            continue
        if name in deltas or name in others or {f"{name}.diff", f"{name}.diff_b"} & diffs.keys():
            raise ValueError(f"{source} holds two LoRAs for the module {name}; expected one.")
        try:
            for part in ("diff", "diff_b"):
                if part in parts:
                    diffs[f"{name}.{part}"] = _diff(part, parts[part])
            if parts.keys() & NOT_LINEAR.keys():
                others[name] = _opaque(module, parts, _peft_alpha(config, module, parts))
            elif parts.keys() - {"alpha", "diff", "diff_b"}:
                deltas[name] = _delta(name, parts, _peft_alpha(config, module, parts))
                _require_same_layer(deltas[name], diffs.get(f"{name}.diff"))
        except ValueError as error:
            raise ValueError(f"{source}, module {name}: {error}.") from None

    if ignored:
        logger.warning("%s: %d keys are no part of a LoRA: %s", source, len(ignored), ignored[:10])
    found = Vector(
        deltas, diffs, {key: value for key, value in metadata.items() if key != PEFT_METADATA},
        source, tuple(ignored), with_settled_magnitudes(others),
    )  # fmt: skip
    return respelled(found, has_two_text_encoders(found.shapes))


def _joined(modules: Mapping[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The modules, with the parts of one module joined if the file spells its name in two ways, as
    diffusers does for DoRA's magnitudes. Spellings that share a part stay apart: two modules."""
    spellings: dict[str, list[str]] = {}
    for module, name in canonical_names(modules).items():
        spellings.setdefault(text_encoder_prefix(name, True), []).append(module)
    joined = {}
    for names in spellings.values():
        parts = [part for module in names for part in modules[module]]
        if len(parts) > len(set(parts)):
            joined |= {module: modules[module] for module in names}
        else:  # PEFT's configuration uses the spelling of the factors
            first = max(names, key=lambda module: "down" in modules[module])
            joined[first] = {part: t for module in names for part, t in modules[module].items()}
    return joined


def respelled(vector: Vector, two_encoders: bool) -> Vector:
    """The vector with the modules of its first text encoder spelled for one encoder, or for two."""

    def spelled(of: Mapping[str, Any]) -> dict[str, Any]:
        return {text_encoder_prefix(name, two_encoders): value for name, value in of.items()}

    return replace(
        vector, deltas=spelled(vector.deltas), diffs=spelled(vector.diffs),
        opaque=spelled(vector.opaque),
    )  # fmt: skip


def left_out(vector: Vector) -> str:
    """How many keys of its file are no part of it; empty where there are none."""
    count = len(vector.ignored)
    return f"{count} keys are no part of a LoRA and left out" if count else ""


def describe(vector: Vector) -> str:
    """What a vector holds, for people."""
    text = sum(name.startswith("lora_te") for name in vector.modules())
    scales = sorted({round(delta.scale, 4) for delta in vector.deltas.values()})
    lines = [
        f"{vector.source}: made for {family_of(vector.shapes) or 'an unknown base model'}",
        f"{len(vector.modules())} modules, {text} of them in text encoders",
        f"rank {vector.ranks()}, alpha / rank {', '.join(f'{scale:g}' for scale in scales[:5])}",
    ]
    if vector.ignored:
        lines.append(f"{left_out(vector)}: {', '.join(vector.ignored[:10])}")
    if vector.opaque:
        kinds = vector.opaque_kinds
        lines.append(f"{len(vector.opaque)} modules are {kinds}: it can be applied, not combined")
    return "\n".join(lines + described(vector.metadata))


def _opaque(module: str, parts: Mapping[str, Tensor], alpha: float | None) -> Opaque:
    """A module that is no sum, by the rest of its tensors' kohya keys."""
    spelled = {f"lora_{part}.weight" if part in ("up", "down", "mid") else part: tensor
               for part, tensor in parts.items() if part not in ("diff", "diff_b")}  # fmt: skip
    if (magnitude := spelled.pop("magnitude", None)) is not None:
        if "dora_scale" in spelled:
            raise ValueError("it has two magnitudes (DoRA); expected one")
        # One number for each output; PEFT has [1, out, 1, 1] for convolutions.
        of_outputs = "up" in parts and parts["up"].shape[:1] == (magnitude.numel(),)
        spelled["dora_scale"] = magnitude.flatten() if of_outputs else magnitude
    if "alpha" in spelled:
        alpha = _alpha(spelled["alpha"])
    if alpha is not None and "oft_blocks" in spelled and module.startswith("diffusion_model."):
        # The host's trainer uses this prefix. Its alpha is the limit itself, where LyCORIS' is the
        # limit divided by the number of outputs.
        alpha /= opaque(spelled, alpha).shape[0]
    return opaque(spelled, alpha)


def _diff(part: str, change: Tensor) -> Tensor:
    if not change.dim() or not change.numel() or not change.is_floating_point():
        raise ValueError(
            f"its {part} is {list(change.shape)} of {change.dtype}; expected one or more floating "
            "point numbers for each output"
        )
    return change


def _delta(name: str, parts: Mapping[str, Tensor], peft_alpha: float | None) -> Delta:
    alpha = _alpha(parts["alpha"]) if "alpha" in parts else peft_alpha
    spelled = ("lora_" if part in ("up", "down", "mid") else part for part in parts)
    if len(adapters := adapters_of(dict.fromkeys(spelled))) > 1:
        kinds = " and ".join(sorted(adapters))
        raise ValueError(f"it has parts of {kinds}; expected those of one adapter")
    if small := {k: part for k, part in parts.items() if k.startswith(("hada_", "lokr_"))}:
        return product(small, alpha, name)
    for part, other in (("up", "down"), ("down", "up")):
        if part not in parts:
            raise ValueError(f"it has no {part} factor beside its {other} or mid factor")
    return Delta(parts["up"], parts["down"], parts.get("mid"), alpha)


def _require_same_layer(delta: Delta, diff: Tensor | None) -> None:
    if diff is not None and as_matrix(delta.shape) != as_matrix(diff.shape):
        raise ValueError(
            f"its factors make {list(delta.shape)} and its full difference is {list(diff.shape)}; "
            "expected one shape"
        )


def _alpha(tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise ValueError(f"its alpha has {tensor.numel()} values; expected one")
    try:
        return float(tensor.item())
    except (TypeError, NotImplementedError):
        raise ValueError(f"its alpha is of {tensor.dtype}; expected a real number") from None


def _peft_alpha(
    config: Mapping[str, Any], module: str, parts: Mapping[str, Tensor]
) -> float | None:
    """A module's alpha from such a configuration, if it is there."""
    prefix = module.partition(".")[0] + "."
    if f"{prefix}lora_alpha" not in config:
        prefix = ""
    alpha = config.get(f"{prefix}lora_alpha")
    inner = module.removeprefix(prefix).removeprefix("base_model.model.")
    patterns = config.get(f"{prefix}alpha_pattern") or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if not _PLAIN_PATTERN.fullmatch(pattern):
            raise ValueError(
                f"its header gives alpha by the regular expression {pattern[:80]!r}; expected the "
                "name of a module"
            )
        # PEFT reads it as a regular expression for the end of the module's path, or all of it, and
        # the path is that within the UNet or text encoder.
        name = pattern.removeprefix("^")
        if inner == name or (name == pattern and inner.endswith(f".{name}")):
            alpha = value
            break
    if alpha is None or "down" not in parts or parts["down"].dim() == 0:
        return None
    if not isinstance(alpha, int | float):
        raise ValueError(f"its header has the alpha {str(alpha)[:80]!r}; expected a number")
    # rsLoRA (arXiv 2312.03732) scales by alpha / sqrt(rank) where LoRA has alpha / rank.
    rank_stabilized = config.get(f"{prefix}use_rslora", False)
    return alpha * parts["down"].shape[0] ** 0.5 if rank_stabilized else float(alpha)


def _peft_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The adapter's configuration that diffusers writes into a file's header; {} without one."""
    try:
        config = json.loads(metadata.get(PEFT_METADATA, "{}"))
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _what_it_looks_like(keys: list[str]) -> str:
    roots = {key.split(".")[0] for key in keys}
    if roots & {"model", "first_stage_model", "cond_stage_model", "conditioner"}:
        return "it looks like a whole checkpoint; load it with a checkpoint loader"
    if roots & {"down_blocks", "up_blocks", "input_blocks", "diffusion_model"}:
        return "it looks like a whole UNet; load it with a diffusion model loader"
    if roots & {"encoder", "decoder", "taesd_decoder", "taesd_encoder"}:
        return "it looks like a VAE; load it with a VAE loader"
    if not keys:
        return "it has no tensors at all"
    return f"its {len(keys)} keys are unknown, such as {', '.join(keys[:3])}"
