"""Between a dict of tensors, as files and the LORA_MODEL wire hold it, and a Vector."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .delta import Delta, Opaque, Vector, as_matrix
from .family import family_of, has_two_text_encoders
from .kinds import left_out_because, not_a_plain_lora, what_it_looks_like
from .lycoris import Product, product
from .metadata import described
from .names import (
    NOT_LINEAR,
    canonical_names,
    host_name,
    in_doubt,
    is_text,
    numbered,
    res_blocks,
    split_key,
    text_encoder_prefix,
    unknown_adapter,
)
from .opaque import adapters_of, opaque, with_settled_magnitudes
from .peft_config import PEFT_METADATA, PeftConfig, rank_in

logger = logging.getLogger("lcm_lora")

_EMBEDDING = {"embedding_A": "up", "embedding_B": "down"}


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
    vector = one_change(for_host(vector))
    tensors: dict[str, Tensor] = {}
    for module, delta in vector.deltas.items():
        parts = delta.wire() if isinstance(delta, Product) else _lora(delta)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    for module, parts in vector.opaque.items():
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    return LoraModel(tensors | vector.diffs, vector)


def for_host(vector: Vector) -> Vector:
    """The vector with names that the host's own loader knows, where it does not know kohya's."""
    shapes = {key.rpartition(".")[0]: diff.shape for key, diff in vector.diffs.items()}
    shapes |= vector.shapes
    return _renamed(vector, lambda name: host_name(name, shapes[name][-1]))


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
    if odd := [key for key, value in tensors.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"{source} has a {type(tensors[odd[0]]).__name__} under {odd[0]}; expected a tensor."
        )
    vector = parse({key: t.detach().cpu() for key, t in tensors.items()}, metadata or {}, source)
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
            _put(modules.setdefault(split[0], {}), split[1], tensor.detach(), f"{source}, {key}")
        else:
            ignored.append(key)
    if not any(parts.keys() - {"alpha"} for parts in modules.values()):
        raise ValueError(f"{source} holds no LoRA: {what_it_looks_like(tensors)}.")
    if kind := not_a_plain_lora(tensors):
        raise ValueError(f"{source} holds no LoRA for a model alone: it looks like {kind}.")
    names = canonical_names(modules)
    modules = _joined(modules, names)
    config = PeftConfig(metadata)
    deltas: dict[str, Delta] = {}
    diffs: dict[str, Tensor] = {}
    others: dict[str, Opaque] = {}
    for module, parts in modules.items():
        name = names[module]
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
                others[name] = _opaque(module, parts, config.scale(module, parts))
            elif parts.keys() - {"alpha", "diff", "diff_b"}:
                deltas[name] = _delta(name, parts, config.scale(module, parts))
                _require_same_layer(deltas[name], diffs.get(f"{name}.diff"))
                if "up_bias" in parts:  # PEFT's lora_bias=True: scaled as the product is
                    bias = _diff("up_bias", parts["up_bias"]).float() * deltas[name].scale
                    diffs[f"{name}.diff_b"] = bias + diffs.get(f"{name}.diff_b", 0)
        except ValueError as error:
            raise ValueError(f"{source}, module {name}: {error}.") from None

    if ignored:
        logger.warning("%s: %d keys are no part of a LoRA: %s", source, len(ignored), ignored[:10])
    found = Vector(
        deltas, diffs, {key: value for key, value in metadata.items() if key != PEFT_METADATA},
        source, tuple(ignored), with_settled_magnitudes(others),
    )  # fmt: skip
    return respelled(found, has_two_text_encoders(found.shapes))


def _joined(
    modules: Mapping[str, dict[str, Tensor]], canonical: Mapping[str, str]
) -> dict[str, dict[str, Tensor]]:
    """The modules, with the parts of one module joined if the file spells its name in two ways, as
    diffusers does for DoRA's magnitudes. Spellings that share a part stay apart: two modules.

    canonical: the canonical name of each module.
    """
    spellings: dict[str, list[str]] = {}
    for module, name in canonical.items():
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
    return _renamed(vector, lambda name: text_encoder_prefix(name, two_encoders))


def in_one_spelling(vectors: Sequence[Vector]) -> list[Vector]:
    """The vectors, with the same name for the same layer in all of them. One file alone may not
    show how many text encoders, or how many blocks a level, its model has; the others may.

    Raises:
        ValueError: the blocks are numbered in two ways, and no file shows which are the same.
    """
    two = any(has_two_text_encoders(vector.shapes) for vector in vectors)
    possible = res_blocks(name for vector in vectors for name in vector.modules())

    def spelled(name: str) -> str:
        return text_encoder_prefix(numbered(name, possible), two)

    alike = [_renamed(vector, spelled) for vector in vectors]
    unclear = [
        (vector.source, name)
        for vector in alike
        for name in sorted(filter(in_doubt, vector.modules()))
    ]
    others = [
        vector.source
        for vector in alike
        if any("_down_blocks_" in name or "_up_blocks_" in name for name in vector.modules())
    ]
    if unclear and others:
        source, name = unclear[0]
        raise ValueError(
            f"The block number in {name} of {source} can mean two different blocks, and "
            f"{others[0]} numbers its blocks in another way. Neither shows how many blocks each "
            "level of the model has. Apply them one after the other with Apply LoRA Vector, which "
            "looks at the model."
        )
    return alike


def _renamed(vector: Vector, spell: Callable[[str], str]) -> Vector:
    """The vector with other names of its modules; raises ValueError where two become one."""
    names = {name: spell(name) for name in vector.modules()}
    name, uses = Counter(names.values()).most_common(1)[0] if names else ("", 0)
    if uses > 1:
        raise ValueError(f"{vector.source} holds two LoRAs for the module {name}; expected one.")

    def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
        return {names[name]: value for name, value in values.items()}

    diffs = {}
    for key, diff in vector.diffs.items():
        name, _, part = key.rpartition(".")
        diffs[f"{names[name]}.{part}"] = diff
    return replace(
        vector, deltas=renamed(vector.deltas), diffs=diffs, opaque=renamed(vector.opaque)
    )


def left_out(vector: Vector) -> str:
    """How many keys of its file are no part of it; empty where there are none."""
    count = len(vector.ignored)
    return f"{count} keys are no part of a LoRA and left out" if count else ""


def describe(vector: Vector) -> str:
    """What a vector holds, for people."""
    text = sum(map(is_text, vector.modules()))
    scales = sorted({round(delta.scale, 4) for delta in vector.deltas.values()})
    lines = [
        f"{vector.source}: made for {family_of(vector.shapes) or 'an unknown base model'}",
        f"{len(vector.modules())} modules, {text} of them in text encoders",
        f"rank {vector.ranks()}, alpha / rank {', '.join(f'{scale:g}' for scale in scales[:5])}",
    ]
    if vector.ignored:
        keys = [f"{key} ({left_out_because(key)})" for key in vector.ignored[:10]]
        lines.append(f"{left_out(vector)}: {', '.join(keys)}")
    if vector.opaque:
        kinds = vector.opaque_kinds
        lines.append(f"{len(vector.opaque)} modules are {kinds}: it can be applied, not combined")
    return "\n".join(lines + described(vector.metadata))


def _put(parts: dict[str, Tensor], part: str, tensor: Tensor, key: str) -> None:
    """Puts a tensor among the parts of its module; raises ValueError where one is there."""
    if part in _EMBEDDING:  # PEFT's change of an embedding is the transpose of B A
        part, tensor = _EMBEDDING[part], tensor.transpose(0, -1)
    if part in parts:
        raise ValueError(f"{key}: its module has two tensors for {part}; expected one.")
    parts[part] = tensor


def _opaque(module: str, parts: Mapping[str, Tensor], peft_scale: float | None) -> Opaque:
    """A module that is no sum, by the rest of its tensors' kohya keys."""
    if "up_bias" in parts:
        raise ValueError("it has a bias for its up factor (lora_bias); DoRA and OFT have none")
    spelled = {f"lora_{part}.weight" if part in ("up", "down", "mid") else part: tensor
               for part, tensor in parts.items() if part not in ("diff", "diff_b")}  # fmt: skip
    if (magnitude := spelled.pop("magnitude", None)) is not None:
        if "dora_scale" in spelled:
            raise ValueError("it has two magnitudes (DoRA); expected one")
        # One number for each output; PEFT has [1, out, 1, 1] for convolutions.
        of_outputs = "up" in parts and parts["up"].shape[:1] == (magnitude.numel(),)
        spelled["dora_scale"] = magnitude.flatten() if of_outputs else magnitude
    alpha = None
    if "alpha" in spelled:
        alpha = _alpha(spelled["alpha"])
    elif peft_scale is not None:
        alpha = peft_scale * (rank_in(parts) or 1)
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


def _delta(name: str, parts: Mapping[str, Tensor], peft_scale: float | None) -> Delta:
    alpha = _alpha(parts["alpha"]) if "alpha" in parts else None
    spelled = ("lora_" if part in ("up", "down", "mid") else part for part in parts)
    if len(adapters := adapters_of(dict.fromkeys(spelled))) > 1:
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
