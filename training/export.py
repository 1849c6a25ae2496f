"""The trained adapter as a LoRA vector in the names of the official LCM-LoRA files."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..lora.delta import Vector
from ..lora.wire import parse
from .adapter import Adapter


def vector(adapter: Adapter, metadata: Mapping[str, str], source: str) -> Vector:
    """Every layer's factors and alpha under its canonical kohya name, as float32 copies."""
    tensors: dict[str, torch.Tensor] = {}
    for name, up, down in adapter.tensors():
        module = f"diffusion_model.{name}"
        tensors[f"{module}.lora_up.weight"] = up.float().cpu().clone()
        tensors[f"{module}.lora_down.weight"] = down.float().cpu().clone()
        tensors[f"{module}.alpha"] = torch.tensor(adapter.alpha)
    return parse(tensors, metadata, source)
