"""Modules that are more than a sum: whether one is whole, and the shape of the layer it is for."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .delta import Delta, Opaque
from .lycoris import has_core, product, rank_of, without_core

_GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")


def opaque(parts: Mapping[str, Tensor], alpha: float | None) -> Opaque:
    """A module of DoRA (arXiv 2402.09353), OFT or BOFT (2306.07280, 2311.06243), or GLoRA
    (2306.07967), by the parts that the host reads, of which alpha is one where it is known.

    Raises:
        ValueError: a part is missing, or shapes do not fit each other.
    """
    if any(part in parts for part in _GLORA):
        shape = _glora(parts)
    elif "oft_blocks" in parts or "rescale" in parts:
        shape = _oft(parts)
    else:
        shape = _base(parts)
        if has_core(parts):
            parts = without_core(parts, 1.0 if alpha is None else alpha / rank_of(parts))
            alpha = rank_of(parts)
    for part in ("dora_scale", "rescale"):
        count = parts[part].numel() if part in parts else shape[0]
        # LyCORIS can scale the inputs instead, one number for each, whatever the kernel.
        if count != shape[0] and (part == "rescale" or math.prod(shape[1:]) % max(1, count)):
            raise ValueError(
                f"its {part} has {count} numbers; expected one for each of the {shape[0]} outputs"
            )
    known = {} if alpha is None else {"alpha": torch.tensor(float(alpha))}
    return Opaque({**parts, **known}, shape)


def _base(parts: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Of what a DoRA scales: a LoRA, or a product of LyCORIS."""
    if any(part.startswith(("hada_", "lokr_")) for part in parts):
        return product(parts, None).shape
    missing = [part for part in ("lora_up.weight", "lora_down.weight") if part not in parts]
    if missing:
        raise ValueError(f"it has a magnitude (DoRA) and no {missing[0]} beside it")
    mid = parts.get("lora_mid.weight")
    return Delta(parts["lora_up.weight"], parts["lora_down.weight"], mid).shape


def _oft(parts: Mapping[str, Tensor]) -> tuple[int, ...]:
    blocks = parts.get("oft_blocks")
    if blocks is None or blocks.dim() not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        found = "none" if blocks is None else list(blocks.shape)
        raise ValueError(
            f"its oft_blocks are {found}; expected [blocks, n, n] (OFT) or [m, blocks, n, n] (BOFT)"
        )
    return (blocks.shape[-3] * blocks.shape[-1],)


def _glora(parts: Mapping[str, Tensor]) -> tuple[int, ...]:
    found = [parts.get(part) for part in _GLORA]
    if all(part is not None and part.dim() > 1 for part in found):
        a1, a2, b1, b2 = (part.flatten(1).shape for part in found)
        if b2[0] == b1[1] == a1[1] == a2[0]:
            return b1[0], b2[1]
        if b2[1] == b1[0] == a1[0] == a2[1]:  # as LyCORIS wrote it first
            return b2[0], b1[1]
    told = ", ".join(f"{n} {list(parts[n].shape) if n in parts else 'missing'}" for n in _GLORA)
    raise ValueError(f"its GLoRA factors are {told}; expected four matrices of one rank")
