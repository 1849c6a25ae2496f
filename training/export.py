"""Trained layers as a LoRA vector in the names of the official LCM-LoRA files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..lora.combine import exact
from ..lora.delta import Vector
from ..lora.formats.parse import parse


def vector(
    layers: Mapping[str, torch.Tensor], alpha: float, metadata: Mapping[str, str], source: str
) -> Vector:
    """Every layer's factors and alpha under its canonical kohya name, as float32 copies.

    layers: as Adapter.state() gives them and a checkpoint keeps them.
    """
    tensors: dict[str, torch.Tensor] = {}
    for key, factor in layers.items():
        name, _, kind = key.rpartition(".")
        module = f"diffusion_model.{name}"
        tensors[f"{module}.lora_{kind}.weight"] = factor.detach().float().cpu().clone()
        tensors[f"{module}.alpha"] = torch.tensor(float(alpha))
    return parse(tensors, metadata, source)


def with_styles(made: Vector, styles: Sequence[tuple[Vector, float]]) -> Vector:
    """The exact sum with the LoRAs that were baked into the teacher, at their strengths, under the
    same name and metadata: an accelerated style in one file."""
    if not styles:
        return made
    vectors, strengths = zip(*styles, strict=True)
    whole, _ = exact([made, *vectors], [1.0, *strengths])
    return replace(whole, metadata={**whole.metadata, **made.metadata}, source=made.source)
