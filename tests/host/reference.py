"""A whole run of a scheduler of diffusers around the raw network of a MODEL."""

from __future__ import annotations

import torch
from diffusers import EulerDiscreteScheduler, LCMScheduler
from lcm_lora.samplers.noise import picture_seed
from lcm_lora.tests.host.random_unet import conditioning

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SCALE = 0.18215  # of the SD1.5 latent format


def reference(
    model, prediction: str, steps: int, seed: int, batch: int, cfg: float = 1.0,
    strength: float = 1.0, image: torch.Tensor | None = None, scheduler=None, **options,
) -> torch.Tensor:  # fmt: skip
    """A scheduler of diffusers around the raw UNet, with the noise the host and we draw.

    LCMScheduler by default; another one comes with its timesteps set, and options for its step.
    """
    import comfy.sample

    own = model.get_model_object("model_sampling")
    if scheduler is None:
        scheduler = LCMScheduler(prediction_type=PREDICTIONS[prediction])
        scheduler.set_timesteps(steps, strength=strength)
    scheduler.alphas_cumprod = 1 / (1 + own.sigmas.double() ** 2)
    scheduler.alphas_cumprod[0] = 1.0  # TCD's goes there, and we to the clean picture
    unet = model.model.diffusion_model
    z = comfy.sample.prepare_noise(torch.zeros(batch, 4, 8, 8), seed).double()
    if image is not None:
        z = scheduler.add_noise(image.double() * SCALE, z, scheduler.timesteps[:1])
    if isinstance(scheduler, EulerDiscreteScheduler):  # its scale is the host's
        z = z * (1 + scheduler.sigmas[0] ** 2).sqrt()

    def guided(z, t):
        def call(which):
            context = conditioning(which)[0][0].repeat(batch, 1, 1)
            return unet(z.float(), torch.full((batch,), float(t)), context=context).double()

        cond = call(1)
        return cond if cfg == 1 else call(2) + cfg * (cond - call(2))

    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            generators = [
                torch.Generator().manual_seed(picture_seed(seed, index, i))
                for index in range(batch)
            ]
            output = guided(scheduler.scale_model_input(z, t), t).float()
            z = scheduler.step(
                output, t, z.float(), generator=generators, return_dict=False, **options
            )[0]
    return z / SCALE


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4):
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.2e}"
