"""The inputs of one training step, and its timesteps on the solver's grid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ...samplers.families import ORIGIN_STEPS
from ...samplers.timesteps import grid

GRID = tuple(grid(ORIGIN_STEPS))
SKIP = 1000 // ORIGIN_STEPS  # the k of the LCM paper: how many timesteps a solver step covers
Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """B pictures of one training step, all tensors on the device of the network.

    Attributes:
        z0: clean latents [B, C, H, W] at diffusion scale. eps: their noise, of the same shape.
        index: int64 [B], the point of `starts` where the noise is added.
        cond, uncond: the network's inputs with and without the caption; uncond is empty if the
            guidance is one of the inputs.
        cfg: the usual guidance scale, a number or [B, 1, 1, 1].
        starts, skip: of the process; here the grid 19, 39, ..., 999 of Stable Diffusion.
        edges: timesteps that no step of the solver crosses, ascending; see phased.py.
    """

    z0: torch.Tensor
    eps: torch.Tensor
    index: torch.Tensor
    cond: Inputs
    uncond: Inputs
    cfg: float | torch.Tensor
    starts: tuple[int, ...] = GRID
    skip: int = SKIP
    edges: tuple[int, ...] = (0,)

    @property
    def t(self) -> torch.Tensor:
        """The timesteps where the solver's step begins, int64 [B]."""
        return table(self.starts, self.index.device)[self.index]

    @property
    def s(self) -> torch.Tensor:
        """The timesteps where it ends, int64 [B]."""
        return torch.maximum(self.t - self.skip, edge_below(self.t, self.edges))


def edge_below(t: torch.Tensor, edges: tuple[int, ...]) -> torch.Tensor:
    """The highest edge below each timestep, or the lowest one: int64 [B] -> [B]."""
    lower = table(edges, t.device)
    return lower[(torch.searchsorted(lower, t) - 1).clamp(min=0)]


@cache
def table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Integers as int64 [N] on a device. Cached, because each copy makes the device wait."""
    return torch.tensor(values, device=device)
