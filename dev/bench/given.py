"""What both subjects of the cost bench share: data, schedule, first factors, and a clock."""

from __future__ import annotations

import math
import time
import zlib

import torch
from torch import nn

PICTURES, CFG, SEED = 8, 7.5, 0


def acp() -> torch.Tensor:
    """alphas_cumprod of Stable Diffusion, [1000] float32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def start_factor(factor: torch.Tensor, name: str) -> None:
    """A LoRA's first factor of the layer of this name (in the original UNet's naming)."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    bound = 1 / math.sqrt(factor[0].numel())
    nn.init.uniform_(factor, -bound, bound, generator=generator)


class Clock:
    """Seconds and calls inside networks, forward and backward. One in a process, for it times every
    backward: in a step that is the loss's alone, which leads through the network.
    """

    def __init__(self, *networks: nn.Module):
        self.calls, self.seconds, self._begun = 0, 0.0, 0.0
        for network in networks:
            network.register_forward_pre_hook(self._enter)
            network.register_forward_hook(self._leave)
        backward = torch.Tensor.backward

        def timed(*args, **kwargs):
            begun = time.perf_counter()
            backward(*args, **kwargs)
            self.seconds += time.perf_counter() - begun

        torch.Tensor.backward = timed

    def _enter(self, *_) -> None:
        self._begun = time.perf_counter()

    def _leave(self, *_) -> None:
        self.calls += 1
        self.seconds += time.perf_counter() - self._begun

    def taken(self) -> tuple[int, float]:
        """Calls and seconds since it was last asked."""
        found = self.calls, self.seconds
        self.calls, self.seconds = 0, 0.0
        return found
