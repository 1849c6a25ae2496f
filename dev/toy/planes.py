"""Weights in few bits: how git holds the demo model.

A matrix is cut into runs of 64 numbers along its input side. A run keeps one float16 step and, for
each number, the nearest of 2**bits levels: (level - (2**bits - 1) / 2) * step. Levels are stored as
bit planes, so any number of bits packs without gaps. Biases, norms and rows that 64 does not divide
stay float16.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from . import pack as runs

RUN = 64


def packable(tensor: torch.Tensor) -> bool:
    return runs.packable(tensor, RUN)


def rounded(tensor: torch.Tensor, bits: int) -> torch.Tensor:
    """The tensor as it will be after packing, with the gradient of the original."""
    return runs.rounded(tensor, bits, RUN)


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
        level, step = runs.levels(tensor, bits, RUN)
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
