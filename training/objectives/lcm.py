"""The distillation loss of LCM-LoRA, one call a step (2310.04378, algorithm 1; 2311.05556)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from ...samplers.consistency import consistency
from ...samplers.timesteps import grid
from ..adapter import Adapter
from .solver import Schedule, teacher

ORIGIN_STEPS = 50
SKIP = 1000 // ORIGIN_STEPS  # the k of the paper: how far one solver step goes


def pseudo_huber(prediction: torch.Tensor, target: torch.Tensor, c: float = 0.001) -> torch.Tensor:
    """mean(sqrt((prediction - target)^2 + c^2) - c), in the precision of the schedule's table."""
    difference = prediction - target
    return ((difference.square() + c * c).sqrt() - c).mean()


def lcm_loss(
    network: Callable[..., torch.Tensor], adapter: Adapter, schedule: Schedule,
    z0: torch.Tensor, eps: torch.Tensor, index: torch.Tensor,
    context: dict[str, torch.Tensor], uncond: dict[str, torch.Tensor], cfg: float | torch.Tensor,
    z_s: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The loss of latent consistency (equation 9): f leaps from any t to the clean latent."""

    def f(z, t, x0, eps):
        return consistency(z, x0, t.to(x0.dtype))

    return step_loss(f, network, adapter, schedule, z0, eps, index, context, uncond, cfg, z_s)


def step_loss(
    f: Callable[..., torch.Tensor],
    network: Callable[..., torch.Tensor], adapter: Adapter, schedule: Schedule,
    z0: torch.Tensor, eps: torch.Tensor, index: torch.Tensor,
    context: dict[str, torch.Tensor], uncond: dict[str, torch.Tensor], cfg: float | torch.Tensor,
    z_s: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The scalar loss for one batch of clean latents; the adapter is on when it returns.

    f(z, t, x0, eps) -> where the student says z goes, which is to be the same from t as from the
    teacher's step below. network(z, t, **context) -> raw output, t being int64 [B]; z0, eps:
    [B, C, H, W]; index: int64 [B] in 0..49, the place on the grid 19, 39, ..., 999; cfg: the usual
    scale; z_s: the teacher's step of this batch where it is known. The adapter must still be on at
    backward: checkpointing runs the forward again there.
    """

    def student(z, t):
        return f(z, t, *schedule.split(network(z, t, **context), z, t))

    if z_s is None:
        z_s = teacher_step(network, adapter, schedule, z0, eps, index, context, uncond, cfg)
    t, s = solver_times(index)
    with torch.no_grad():
        # 4. The target is the student itself at s: a LoRA needs no moving average.
        target = student(z_s, s)
    # 5. The student at t.
    return pseudo_huber(student(schedule.noised(z0, eps, t), t), target)


@torch.no_grad()
def teacher_step(
    network: Callable[..., torch.Tensor], adapter: Adapter, schedule: Schedule,
    z0: torch.Tensor, eps: torch.Tensor, index: torch.Tensor,
    context: dict[str, torch.Tensor], uncond: dict[str, torch.Tensor], cfg: float | torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """z_s: where a guided DDIM step of the teacher leads from the noised latents, [B, C, H, W]."""
    # 1. Noise the latents at t, one solver step above s.
    t, s = solver_times(index)
    z_t = schedule.noised(z0, eps, t)
    # 2, 3. The teacher, which is the network without the adapter, takes a DDIM step to s.
    with adapter.off():
        x0, eps_t = teacher(network, schedule, z_t, t, context, uncond, cfg)
    return schedule.noised(x0, eps_t, s)


def solver_times(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(t, s): where a solver step from this place of the grid begins and ends, int64 [B]."""
    t = on_grid(index)
    return t, (t - SKIP).clamp(min=0)


def on_grid(index: torch.Tensor) -> torch.Tensor:
    """The timesteps at these places of the grid: 0..49 -> 19, 39, ..., 999."""
    return table(tuple(grid(ORIGIN_STEPS)), index.device)[index]


@cache
def table(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Whole numbers as int64 [N] on a device, copied there once: each copy makes it wait."""
    return torch.tensor(values, device=device)
