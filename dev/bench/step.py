"""The training step that both subjects of `bench distill` take, and what they count in it."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

PICTURES, CFG, SEED = 8, 7.5, 0


@dataclass(frozen=True)
class Case:
    """Steps on a network with random weights.

    host: the folder of ComfyUI. folder: for the subjects' files. config, diffusers: the network as
    ComfyUI and diffusers describe it. names: diffusers' names of its weights -> ComfyUI's.
    side: of the latents. recompute: blocks run again in backward, to save memory. objective: as in
    Spec; of dmd, from the first step on.
    """

    host: Path
    folder: Path
    architecture: str
    config: dict[str, Any]
    side: int
    dtype: str = "fp32"
    rank: int = 64  # as the released LCM-LoRAs have it
    recompute: bool = False
    diffusers: dict[str, Any] | None = None
    names: dict[str, str] | None = None
    batch: int = 1
    device: str = "cpu"
    objective: str = "lcm"

    @property
    def weights(self) -> Path:
        return self.folder / "weights.safetensors"

    @property
    def bank(self) -> Path:
        return self.folder / "bank.safetensors"


@dataclass(frozen=True)
class Step:
    """seconds: of the calls of the network, forward and backward."""

    loss: float
    calls: int
    seconds: float


class Clock:
    """Counts the calls of the networks and their seconds, forward and backward.

    Backward reaches the network at its output and ends with the last gradient of the parameters.
    On CUDA, the seconds are those of the device.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *networks: nn.Module, device: str = "cpu"
    ) -> None:
        self._calls, self._cuda = 0, device == "cuda"
        self._begun: Any = None
        self._pairs: list[tuple[Any, Any]] = []
        for network in networks:
            network.register_forward_pre_hook(self._enter)
            network.register_forward_hook(self._leave_forward)
        torch.autograd.graph.register_multi_grad_hook(list(parameters), self._leave)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _enter(self, *_: Any) -> None:
        self._begun = self._now()

    def _leave(self, *_: Any) -> None:
        self._pairs.append((self._begun, self._now()))

    def _leave_forward(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._leave()
        self._calls += 1
        output = getattr(output, "sample", output)
        if output.requires_grad:
            output.register_hook(self._enter)

    def step(self, loss: float) -> Step:
        """What was counted since the last step."""
        if self._cuda:
            torch.cuda.synchronize()
            seconds = sum(begun.elapsed_time(ended) for begun, ended in self._pairs) / 1000
        else:
            seconds = sum(ended - begun for begun, ended in self._pairs)
        step = Step(loss, self._calls, seconds)
        self._calls = 0
        self._pairs.clear()
        return step


def alphas_cumprod() -> torch.Tensor:
    """Stable Diffusion's, [1000] float32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float()


def start_factor(factor: torch.Tensor, name: str) -> None:
    """Fills the first factor of a layer's LoRA; name: as ComfyUI calls the layer."""
    generator = torch.Generator(factor.device).manual_seed(zlib.crc32(name.encode()))
    bound = 1 / math.sqrt(factor[0].numel())
    nn.init.uniform_(factor, -bound, bound, generator=generator)
