"""A few-step run of the trained network, sampled as the finished file will be."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...samplers.families import Family
from ...samplers.lcm import Shares, kept_noise, lcm, variance_exploding
from ..data.bank import Tensors
from ..objectives.solver import Network, Process, Schedule

Noise = Callable[[int], torch.Tensor]


def few_steps(
    network: Network, schedule: Process, noise: Noise, steps: int, cond: Tensors, family: Family
) -> torch.Tensor:
    """Clean latents [B, C, h, w] of a network, sampled as its family requires (samplers/lcm.py).

    noise(0) [B, C, h, w] is the start at t = T - 1, noise(i) the fresh noise of step i.
    """
    start, timesteps = noise(0), schedule.run(family, steps)
    t = torch.tensor(timesteps, device=start.device)
    # samplers/lcm.py works in ComfyUI's scale: a flow model's own, or else x = z / alpha, whose
    # noise level is sigma / alpha.
    if isinstance(schedule, Schedule):
        levels, shares = (1 / schedule.alphas_cumprod - 1).sqrt(), variance_exploding
        scale = schedule.alpha
    else:
        levels, shares = schedule.sigma(torch.arange(schedule.T, device=t.device)).flatten(), _line
        scale = _unscaled

    sigmas = torch.cat([levels[t], torch.zeros(1, device=start.device)])
    remaining = iter(timesteps)

    def denoised(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        now = torch.full((len(x),), next(remaining), device=x.device)
        z = scale(now) * x
        x0, _ = schedule.predict(network, z, now, cond)
        return schedule.consistency(z, x0, now) if family.boundary else x0

    def earlier(sigmas: torch.Tensor, eta: float) -> torch.Tensor:
        if isinstance(schedule, Schedule):
            return levels[((1 - eta) * t[1:].float()).floor().long()]
        return sigmas * (1 - eta)

    kept = kept_noise(sigmas[:-1], family.eta, earlier, shares)
    return lcm(
        denoised, start / scale(t[:1]), sigmas,
        noise=lambda step: noise(step + 1), kept=[*kept, 0.0], signals=shares(sigmas)[0],
    )  # fmt: skip


def _unscaled(t: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(t), 1, 1, 1, device=t.device)


def _line(sigmas: torch.Tensor) -> Shares:
    """The shares of a flow model's x = (1 - sigma) x0 + sigma eps."""
    return (1 - sigmas).tolist(), sigmas.tolist()
