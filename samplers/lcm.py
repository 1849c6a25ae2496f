"""The few-step sampling loop, in the host's scale x = x0 + sigma eps (VE)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch


def kept_noise(
    sigmas: torch.Tensor,
    eta: float,
    timestep: Callable[[torch.Tensor], torch.Tensor],
    sigma: Callable[[torch.Tensor], torch.Tensor],
) -> list[float]:
    """The standard deviation of predicted noise to keep at each of the steps after sigmas[0].

    eta is the gamma of TCD (arXiv 2402.19159, section 3.3): a step to timestep t' goes to s =
    floor((1 - eta) t') with the predicted noise and from there to t' with fresh noise, so what is
    kept is sigma(s). 0 keeps all of it, 1 keeps none, which is LCM. timestep and sigma are the
    model's own mappings. Raises ValueError for eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(
            f"eta must be between 0 (deterministic) and 1 (all noise fresh), found {eta:g}."
        )
    targets = sigmas[1:].tolist()
    # The two ends are exact for every schedule; rounding t' down would leave a rest of either.
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
    extra_args: dict | None = None,
    callback: Callable[[dict], None] | None = None,
    *,
    noise: Callable[[int], torch.Tensor],
    kept: Sequence[float] | None = None,
) -> torch.Tensor:
    """LCM multistep sampling (arXiv 2310.04378, algorithm 3): one network call a step.

    model(x, sigma [B], **extra_args) -> denoised, x: [B, ...] at noise level sigmas[0], sigmas:
    [N + 1] descending; noise(i): fresh noise of step i. Each step denoises and goes to the next
    level with x <- x0 + kept_i eps + sqrt(sigma'^2 - kept_i^2) z, which has exactly that level's
    variance. eps is the noise predicted, (x - x0) / sigma; kept: see kept_noise, all 0 when None.
    """
    extra_args = extra_args or {}
    levels = sigmas.tolist()  # read once: asking the device inside the loop would wait for it
    kept = kept or [0.0] * len(levels)
    for i, (level, target) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        x0 = model(x, sigmas[i].repeat(len(x)), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": x0})
        fresh = math.sqrt(max(target**2 - kept[i] ** 2, 0.0))
        carried = x0 + (x - x0) * (kept[i] / level) if kept[i] > 0 else x0
        x = carried + noise(i) * fresh if fresh > 0 else carried
    return x
