"""The few-step sampling loop, in the scale x = x0 + sigma eps (VE)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch


def kept_noise(
    sigmas: torch.Tensor,
    eta: float,
    timestep: Callable[[torch.Tensor], torch.Tensor],
    sigma: Callable[[torch.Tensor], torch.Tensor],
) -> list[float]:
    """The standard deviation of the predicted noise that each step keeps: one number per step.

    eta is the gamma of TCD (arXiv 2402.19159, section 3.3). A step to timestep t' goes to
    s = floor((1 - eta) t') with the predicted noise, and from there to t' with fresh noise, so it
    keeps sigma(s). eta 0 keeps all of it; 1 keeps none, which is LCM.

    sigmas: [N + 1], descending; they are read, which waits for any device but the CPU. timestep,
    sigma: the model's maps between the two.

    Raises:
        ValueError: eta is outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(
            f"eta must be between 0 (deterministic) and 1 (all noise fresh), found {eta:g}."
        )
    targets = sigmas[1:].tolist()
    # Both ends are exact for every schedule; rounding t' down would leave a little of either noise.
    if eta == 1 or not targets:
        return [0.0] * len(targets)
    if eta == 0:
        return targets
    s = torch.floor((1 - eta) * timestep(sigmas[1:]).float())
    return [min(kept, to) for kept, to in zip(sigma(s).tolist(), targets, strict=True)]


@torch.no_grad()
def lcm(
    model: Callable[..., torch.Tensor],
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    *,
    noise: Callable[[int], torch.Tensor],
    kept: Sequence[float] | None = None,
    levels: Sequence[float] | None = None,
) -> torch.Tensor:
    """LCM multistep sampling (arXiv 2310.04378, algorithm 3): one network call per step.

    Each step denoises x and goes to the next level sigma' with
    x <- x0 + kept_i eps + sqrt(sigma'^2 - kept_i^2) z, which has exactly that level's variance.
    eps = (x - x0) / sigma is the predicted noise, and z is fresh noise.

    Args:
        model: (x, sigma [B], **extra_args) -> x0.
        x: [B, ...] at the noise level sigmas[0].
        sigmas: [N + 1], descending.
        callback: gets each step's state, in the form of k-diffusion.
        noise: the fresh noise of step i, as x.
        kept: see kept_noise; None keeps none.
        levels: the numbers of sigmas; None reads them, which waits for the device.
    """
    extra_args = extra_args or {}
    levels = sigmas.tolist() if levels is None else levels  # not in the loop: reading waits
    kept = kept or [0.0] * len(levels)
    for i, (level, target) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        x0 = model(x, sigmas[i].repeat(len(x)), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": x0})
        fresh = math.sqrt(max(target**2 - kept[i] ** 2, 0.0))
        carried = x0 + (x - x0) * (kept[i] / level) if kept[i] > 0 else x0
        x = carried + noise(i) * fresh if fresh > 0 else carried
    return x
