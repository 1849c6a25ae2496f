"""Turns trained layers into a LoRA vector with the names of the official LCM-LoRA files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..lora.combine import exact
from ..lora.delta import Vector
from ..lora.family import FAMILY, STEPS
from ..lora.formats.parse import parse
from .objectives.table import family_of
from .spec import Spec


def family_metadata(spec: Spec) -> dict[str, str]:
    """The metadata that tell a sampler how to sample the LoRA of a job."""
    steps = {STEPS: str(spec.phases)} if spec.objective == "phased" else {}
    family = family_of(spec)
    objective = {} if spec.objective == family else {"lcm_lora.objective": spec.objective}
    return {FAMILY: family, **objective, **steps}


def vector(
    layers: Mapping[str, torch.Tensor], alpha: float, metadata: Mapping[str, str], source: str
) -> Vector:
    """Every layer's factors and alpha under its kohya name, as float32 copies on the CPU.

    layers: as in Adapter.state() and in a checkpoint. source: the vector's name in messages.
    """
    tensors: dict[str, torch.Tensor] = {}
    for key, factor in layers.items():
        name, _, kind = key.rpartition(".")
        module = f"diffusion_model.{name}"
        tensors[f"{module}.lora_{kind}.weight"] = factor.detach().float().cpu().clone()
        tensors[f"{module}.alpha"] = torch.tensor(float(alpha))
    return parse(tensors, metadata, source)


def with_styles(trained: Vector, styles: Sequence[tuple[Vector, float]]) -> Vector:
    """The exact sum with the style LoRAs that were baked into the teacher, at their strengths, so
    that one file holds an accelerated style. Keeps the name and metadata of `trained`."""
    if not styles:
        return trained
    vectors, strengths = zip(*styles, strict=True)
    total, _ = exact([trained, *vectors], [1.0, *strengths])
    return replace(total, metadata={**total.metadata, **trained.metadata}, source=trained.source)
