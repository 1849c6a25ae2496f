"""Converts a Vector to a LORA_MODEL, the type that goes from node to node, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..delta import Delta, Vector
from .lycoris import Product
from .parse import parse
from .spelling import for_host

Tensors = Mapping[str, Tensor]
"""A LORA_MODEL from any node."""


class LoraModel(dict[str, Tensor]):
    """ComfyUI's LORA_MODEL, a dict of tensors with kohya names, and a Vector's other attributes."""

    def __init__(self, tensors: Tensors, vector: Vector):
        super().__init__(tensors)
        self.metadata = dict(vector.metadata)
        self.source = vector.source
        self.sha256 = vector.sha256
        self.ignored = vector.ignored


def to_wire(vector: Vector) -> LoraModel:
    """A vector as tensors with kohya names. Every delta gets an alpha."""
    vector = one_change(for_host(vector))
    tensors: dict[str, Tensor] = {}
    for module, delta in vector.deltas.items():
        parts = delta.wire() if isinstance(delta, Product) else _lora(delta)
        tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    for module, opaque in vector.opaque.items():
        tensors |= {f"{module}.{part}": tensor for part, tensor in opaque.items()}
    return LoraModel({**tensors, **vector.diffs}, vector)


def one_change(vector: Vector) -> Vector:
    """The vector with one change per weight, because ComfyUI's loader reads only one. A delta is
    added to the full difference of the same weight."""
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


def from_wire(tensors: Tensors) -> Vector:
    """A LORA_MODEL from any node as a vector on the CPU, where sums are computed. ComfyUI's trainer
    may leave its tensors on a device.

    Raises:
        ValueError: a value is not a tensor, or `parse` raises it.
    """
    metadata, source = getattr(tensors, "metadata", {}), getattr(tensors, "source", "LORA_MODEL")
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{source} has a {type(value).__name__} under {key}; expected a tensor."
            )
    vector = parse({key: t.detach().cpu() for key, t in tensors.items()}, metadata or {}, source)
    ignored = (*getattr(tensors, "ignored", ()), *vector.ignored)
    return replace(vector, sha256=getattr(tensors, "sha256", ""), ignored=ignored)
