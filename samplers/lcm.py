"""The few-step sampling loop, in the scale of the model at hand: x = alpha x0 + beta eps.

In ComfyUI, Stable Diffusion has alpha = 1 and beta = sigma (VE), and a flow model alpha = 1 - sigma
and beta = sigma. A flow model's alpha is 0 in pure noise, so nothing here is divided by alpha.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

Shares = tuple[list[float], list[float]]
"""(alpha, beta) at some noise levels: the shares of the picture and of the noise in x."""


def variance_exploding(sigmas: torch.Tensor) -> Shares:
    """The shares of x = x0 + sigma eps."""
    return [1.0] * len(sigmas), sigmas.tolist()


def kept_noise(
    sigmas: torch.Tensor,
    eta: float,
    earlier: Callable[[torch.Tensor, float], torch.Tensor],
    shares: Callable[[torch.Tensor], Shares] = variance_exploding,
) -> list[float]:
    """The standard deviation of the predicted noise that each step keeps: one number per step.

    eta is the gamma of TCD (arXiv 2402.19159, section 3.3). A step to the time t' first goes to
    s = (1 - eta) t' with the predicted noise, and from there to t' with fresh noise. From s to t'
    the picture's share changes from alpha(s) to alpha(t'). The predicted noise is scaled with it,
    so the step keeps beta(s) alpha(t') / alpha(s). eta 0 keeps all of it; 1 keeps none (LCM).

    sigmas: [N + 1], descending. Reading them waits for any device but the CPU.
    earlier(sigmas, eta): the sigmas at these times s. shares: the model's.

    Raises:
        ValueError: eta is outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(
            f"eta must be between 0 (deterministic) and 1 (all noise fresh), found {eta:g}."
        )
    # Both ends skip `earlier`, whose rounding would leave a little of the other noise.
    if eta == 1 or len(sigmas) < 2:
        return [0.0] * len(sigmas[1:])
    alphas, betas = shares(sigmas[1:])
    if eta == 0:
        return betas
    between = zip(*shares(earlier(sigmas[1:], eta)), alphas, betas, strict=True)
    return [min(b * to_alpha / a, to_beta) for a, b, to_alpha, to_beta in between]


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
    signals: Sequence[float] | None = None,
) -> torch.Tensor:
    """LCM multistep sampling (arXiv 2310.04378, algorithm 3): one network call per step.

    Each step denoises x and goes to the next level's alpha' and beta' with
    x <- alpha' x0 + kept_i eps + sqrt(beta'^2 - kept_i^2) z, which has exactly that level's
    variance. eps = (x - alpha x0) / beta is the predicted noise, and z is fresh noise.

    Args:
        model: (x, sigma [B], **extra_args) -> x0.
        x: [B, ...] at the noise level sigmas[0].
        sigmas: [N + 1], descending.
        callback: gets each step's state, in the form of k-diffusion.
        noise: the fresh noise of step i, as x.
        kept: see kept_noise; None keeps none.
        levels: beta at each of the sigmas; None uses the sigmas themselves, and waits for the
            device to read them.
        signals: alpha at each of the sigmas; None means 1 everywhere.
    """
    extra_args = extra_args or {}
    levels = sigmas.tolist() if levels is None else levels  # not in the loop: reading waits
    signals = signals or [1.0] * len(levels)
    kept = kept or [0.0] * len(levels)
    for i, (level, target) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        x0 = model(x, sigmas[i].repeat(len(x)), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": x0})
        fresh = math.sqrt(max(target**2 - kept[i] ** 2, 0.0))
        carried = x0 * signals[i + 1]
        if kept[i] > 0:
            carried = carried + (x - x0 * signals[i]) * (kept[i] / level)
        x = carried + noise(i) * fresh if fresh > 0 else carried
    return x
