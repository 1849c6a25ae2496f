"""A small function as a network, sampled by our loop and by diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import LCMScheduler
from lcm_lora.samplers.consistency import consistency, x0_and_eps
from lcm_lora.samplers.lcm import kept_noise, lcm

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPE = (2, 4, 8, 8)


def table() -> torch.Tensor:
    """SD1.5's sigmas, [1000] float64."""
    acp = LCMScheduler(**SD).alphas_cumprod.double()
    return ((1 - acp) / acp).sqrt()


def network(z: torch.Tensor, t: float) -> torch.Tensor:
    """A smooth function of latent and time in a trained network's place."""
    return torch.tanh(z.roll(1, -1) * 0.7 + t / 700 - z.square() * 0.1)


def denoiser(prediction: str, boundary: bool = True):
    """The network as the host calls a model: VE latent and sigma -> denoised latent."""
    sigmas = table()

    def call(x, sigma):
        t = torch.searchsorted(sigmas, sigma[0])
        alpha = (1 + sigma[0] ** 2).rsqrt()
        z = x * alpha
        x0, _ = x0_and_eps(network(z, t.item()), z, alpha, sigma[0] * alpha, prediction)
        return consistency(z, x0, t.double()) if boundary else x0

    return call


def levels(timesteps: Sequence[int]) -> torch.Tensor:
    """Their sigmas, then 0."""
    return torch.cat([table()[list(timesteps)], torch.zeros(1, dtype=torch.float64)])


def kept(sigmas: torch.Tensor, eta: float) -> list[float]:
    def earlier(sigmas, eta):
        timesteps = torch.searchsorted(table(), sigmas)
        return table()[((1 - eta) * timesteps.float()).floor().long()]

    return kept_noise(sigmas, eta, earlier)


def draws() -> Callable[..., torch.Tensor]:
    """The same noise for both loops: the start, then that of every step which wants some."""
    generator = torch.Generator().manual_seed(7)
    return lambda _step=0: torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def reference(scheduler, **options) -> list[torch.Tensor]:
    """diffusers' own loop in VP scale, timesteps set: the latent after each step."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    generator = torch.Generator().manual_seed(7)
    z = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    latents = []
    for t in scheduler.timesteps:
        output = network(z, t.item())
        z = scheduler.step(output, t, z, generator=generator, return_dict=False, **options)[0]
        latents.append(z)
    return latents


def run(model, timesteps: Sequence[int], eta: float = 1.0) -> list[torch.Tensor]:
    """Our loop with the same noise: the VP latent after each step."""
    draw = draws()
    sigmas = levels(timesteps)
    seen = []
    x = draw() * (1 + sigmas[0] ** 2).sqrt()
    end = lcm(
        model, x, sigmas, callback=lambda s: seen.append(s["x"]), noise=draw,
        kept=kept(sigmas, eta),
    )  # fmt: skip
    return [
        x / (1 + sigma**2).sqrt() for x, sigma in zip([*seen[1:], end], sigmas[1:], strict=True)
    ]
