"""Weights in few bits: how git holds the toy (4 bits for the UNet, 8 for the VAE).

A matrix is cut into runs of 32 numbers along its input side; a run keeps one float16 step and, for
each number, which of the 2**bits levels (level - (2**bits - 1) / 2) * step is nearest. Biases,
norms and rows that 32 does not divide stay float16.
"""

from __future__ import annotations

import torch

RUN = 32


def packable(tensor: torch.Tensor, run: int = RUN) -> bool:
    return tensor.dim() >= 2 and tensor[0].numel() % run == 0


def levels(tensor: torch.Tensor, bits: int, run: int = RUN) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, ...] -> (levels 0..2**bits - 1 [runs, run], steps [runs, 1] exact in float16)."""
    runs = tensor.detach().float().reshape(-1, run)
    middle = (2**bits - 1) / 2
    # With few levels, cutting off the largest numbers costs less than coarse steps.
    reach = (0.85 if bits < 4 else 1.0) / middle
    step = (runs.abs().amax(1, keepdim=True) * reach).clamp(min=2**-14).half().float()
    return (runs / step + middle).round().clamp(0, 2**bits - 1), step


def rounded(tensor: torch.Tensor, bits: int, run: int = RUN) -> torch.Tensor:
    """The tensor as it will be after packing, with the gradient of the original."""
    level, step = levels(tensor, bits, run)
    value = ((level - (2**bits - 1) / 2) * step).reshape(tensor.shape)
    return tensor + (value - tensor).detach()


def pack(state: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """A state dict -> what is written to git: `name` (uint8) and `name.step` (float16) a matrix."""
    packed = {}
    for name, tensor in state.items():
        if not packable(tensor):
            packed[name] = tensor.detach().half().contiguous()
            continue
        level, step = levels(tensor, bits)
        level = level.to(torch.uint8).reshape(tensor.shape[0], -1)
        packed[name] = level[:, ::2] | (level[:, 1::2] << 4) if bits == 4 else level
        packed[name + ".step"] = step.half().reshape(tensor.shape[0], -1)
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def unpack(
    packed: dict[str, torch.Tensor], shapes: dict[str, torch.Size]
) -> dict[str, torch.Tensor]:
    """The inverse of `pack`, float16; the shapes show whether it is 4 bits or 8."""
    state = {}
    for name, shape in shapes.items():
        tensor = packed[name]
        if tensor.dtype != torch.uint8:
            state[name] = tensor.reshape(shape)
            continue
        half = tensor.numel() * 2 == shape.numel()
        level = torch.stack([tensor & 15, tensor >> 4], -1) if half else tensor
        middle = 7.5 if half else 127.5
        step = packed[name + ".step"].float().reshape(-1, 1)
        state[name] = ((level.reshape(-1, RUN).float() - middle) * step).reshape(shape).half()
    return state
