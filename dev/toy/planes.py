"""Weights in few bits: how git holds the demo model.

A matrix is cut into runs of 64 numbers along its input side. A run keeps one float16 step and, for
each number, the nearest of 2**bits levels: (level - (2**bits - 1) / 2) * step. Levels are stored as
bit planes, so any number of bits packs without gaps. Biases, norms and rows that 64 does not divide
stay float16.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

RUN = 64


def packable(tensor: torch.Tensor) -> bool:
    return tensor.dim() >= 2 and tensor[0].numel() % RUN == 0


def levels(tensor: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, ...] -> (levels 0..2**bits - 1 [runs, RUN], steps [runs, 1] exact in float16)."""
    runs = tensor.detach().float().reshape(-1, RUN)
    middle = (2**bits - 1) / 2
    # With few levels, cutting off the largest numbers costs less than coarse steps.
    reach = (0.85 if bits < 4 else 1.0) / middle
    step = (runs.abs().amax(1, keepdim=True) * reach).clamp(min=2**-14).half().float()
    return (runs / step + middle).round().clamp(0, 2**bits - 1), step


def rounded(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """The tensor as it will be after packing, with the gradient of the original."""
    level, step = levels(tensor, bits)
    value = ((level - (2**bits - 1) / 2) * step).reshape(tensor.shape)
    return tensor + (value - tensor).detach()


def pack(
    state: dict[str, torch.Tensor], bits_of: Callable[[torch.Tensor], int]
) -> dict[str, torch.Tensor]:
    """A state dict -> what git holds: `name` (uint8 [bits, numbers / 8]), `name.step` (float16)."""
    packed = {}
    for name, tensor in state.items():
        if not packable(tensor):
            packed[name] = tensor.detach().half().cpu().contiguous()
            continue
        bits = bits_of(tensor)
        level, step = levels(tensor, bits)
        level = level.to(torch.uint8).cpu().numpy().reshape(-1)
        planes = [np.packbits((level >> bit) & 1) for bit in range(bits)]
        packed[name] = torch.from_numpy(np.stack(planes))
        packed[name + ".step"] = step.half().cpu().reshape(-1)
    return packed


def unpack(
    packed: dict[str, torch.Tensor], shapes: dict[str, torch.Size]
) -> dict[str, torch.Tensor]:
    """The inverse of `pack`, float16."""
    state = {}
    for name, shape in shapes.items():
        tensor = packed[name]
        if tensor.dtype != torch.uint8:
            state[name] = tensor.reshape(shape)
            continue
        bits = len(tensor)
        level = sum(
            np.unpackbits(plane).astype(np.float32) * 2**bit
            for bit, plane in enumerate(tensor.numpy())
        )
        steps = torch.from_numpy(level).reshape(-1, RUN) - (2**bits - 1) / 2
        state[name] = (steps * packed[name + ".step"].float().view(-1, 1)).reshape(shape).half()
    return state


def pack_lora(file: Path, packed: Path, bits: int) -> None:
    """A LoRA file with kohya's names -> what git holds. Its `lora_up` factors are packed across."""
    with safe_open(file, framework="pt") as reader:
        state = {name: reader.get_tensor(name) for name in reader.keys()}
        metadata = reader.metadata() or {}
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    for name, tensor in state.items():
        if name.endswith("lora_up.weight"):
            state[name] = tensor.flatten(1).T.contiguous()
    metadata["packed.shapes"] = json.dumps(shapes, separators=(",", ":"))
    save_file(pack(state, lambda _: bits), packed, metadata)


def unpack_lora(packed: Path, file: Path) -> None:
    """The inverse of `pack_lora`: an ordinary LoRA file in float16."""
    with safe_open(packed, framework="pt") as reader:
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}
        metadata = reader.metadata()
    shapes = json.loads(metadata.pop("packed.shapes"))
    stored = {
        name: torch.Size([shape[1], shape[0]] if name.endswith("lora_up.weight") else shape)
        for name, shape in shapes.items()
    }
    state = unpack(tensors, stored)
    for name, shape in shapes.items():
        if name.endswith("lora_up.weight"):
            state[name] = state[name].T.reshape(shape)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, metadata)
