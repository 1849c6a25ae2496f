"""The loss of phased consistency (PCM, arXiv 2405.18407, section 3), one call a step.

The solver's grid is cut into segments, and the student at t predicts where the teacher's ODE is at
the lower edge of t's segment, not at 0. So a deterministic run (eta 0) from edge to edge follows
the teacher's path, where LCM has learned to leap to the end and must add fresh noise each time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...samplers.timesteps import timesteps
from ..adapter import Adapter
from .lcm import ORIGIN_STEPS, on_grid, step_loss, table
from .solver import Schedule


def edges(phases: int) -> list[int]:
    """The segments' lower edges, ascending: 0, 259, 499, 759 for 4 phases.

    They are where our sampler stops in a run of `phases` steps, so that each of its steps crosses
    one segment. (The paper's code has 0, 239, 499, 739: a step that begins at 759 would have
    learned to go to 739 only.) The lowest is the timestep 0, not the clean latent: there f is the
    identity, which is what ties the student to the data, and a sigma of 0.03 is left.
    Raises ValueError when phases is not in 1..50.
    """
    if not 1 <= phases <= ORIGIN_STEPS:
        raise ValueError(f"phases must be 1 to {ORIGIN_STEPS}, found {phases}.")
    return [0, *timesteps(phases)[:0:-1]]


def edge_below(t: torch.Tensor, phases: int) -> torch.Tensor:
    """The lower edge of the segment that t is in or on top of: int64 [B] -> [B], below t."""
    lower = table(tuple(edges(phases)), t.device)
    return lower[torch.searchsorted(lower, t) - 1]


def phased_loss(
    network: Callable[..., torch.Tensor], adapter: Adapter, schedule: Schedule,
    z0: torch.Tensor, eps: torch.Tensor, index: torch.Tensor,
    context: dict[str, torch.Tensor], uncond: dict[str, torch.Tensor], cfg: float | torch.Tensor,
    z_s: torch.Tensor | None = None, phases: int = 4,
) -> torch.Tensor:  # fmt: skip
    """The loss of phased consistency: f is one DDIM step to the edge below the student's t.

    At the edge itself, where the teacher's step may land, that step is the identity.
    """
    edge = edge_below(on_grid(index), phases)

    def f(z, t, x0, eps):
        return schedule.noised(x0, eps, edge)

    return step_loss(f, network, adapter, schedule, z0, eps, index, context, uncond, cfg, z_s)
