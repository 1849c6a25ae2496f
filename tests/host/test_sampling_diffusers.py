"""Whole runs inside the real ComfyUI against the schedulers of diffusers."""

from __future__ import annotations

import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, TCDScheduler
from lcm_lora.samplers.families import FAMILIES
from lcm_lora.tests.host.random_unet import build, conditioning, empty, ours, patched, picture
from lcm_lora.tests.host.reference import assert_same, reference

pytestmark = pytest.mark.usefixtures("comfy")

TABLES = [name for name, family in FAMILIES.items() if family.tables]


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_a_whole_run_equals_diffusers(prediction, steps):
    model = build(prediction)
    expected = reference(model, prediction, steps, seed=11, batch=2)
    assert_same(ours(model, steps, latent=empty(2))["samples"], expected)


TRAILING = {"timestep_spacing": "trailing"}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
AUTHORS = {
    "lcm": (LCMScheduler, {}, {}),
    "dmd2": (LCMScheduler, {}, {}),
    "tcd": (TCDScheduler, {}, {"eta": 0.3}),
    "hyper-sd": (DDIMScheduler, TRAILING | {"clip_sample": False}, {}),
    "hyper-sd-1step": (TCDScheduler, {}, {"eta": 1.0}),
    "pcm": (DDIMScheduler, TRAILING | {"clip_sample": False}, {}),
    "lightning": (EulerDiscreteScheduler, TRAILING | SD, {}),
    "phased": (TCDScheduler, {}, {"eta": 0.0}),
}


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("family", TABLES)
def test_each_family_equals_its_authors(family, steps):
    kind, settings, options = AUTHORS[family]
    scheduler = kind(prediction_type="v_prediction", **settings)
    if family == "dmd2":
        scheduler.set_timesteps(timesteps=FAMILIES["dmd2"].timesteps(steps))
    else:
        scheduler.set_timesteps(steps)
    model = build("v")
    expected = reference(
        model, "v", steps, seed=11, batch=2, scheduler=scheduler, **options
    )  # fmt: skip
    actual = ours(patched(model, family), steps, latent=empty(2))
    assert_same(actual["samples"], expected)


def test_zero_terminal_snr_is_kept():
    model = build("v", zsnr=True)
    assert model.get_model_object("model_sampling").sigmas[-1] > 4000
    assert_same(ours(model)["samples"], reference(model, "v", 4, seed=11, batch=1))


def test_guidance_equals_diffusers():
    model = build("v")
    expected = reference(model, "v", 4, seed=11, batch=1, cfg=1.8)
    assert_same(ours(model, cfg=1.8)["samples"], expected)


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.5), (2, 0.8), (1, 0.3), (3, 0.99)])
def test_image_to_image_equals_diffusers(steps, strength):
    model = build("v")
    latent = picture()
    expected = reference(
        model, "v", steps, seed=11, batch=1, strength=strength, image=latent["samples"]
    )
    assert_same(ours(model, steps, latent=latent, denoise=strength)["samples"], expected)


def test_an_empty_latent_starts_with_noise_alone_at_any_timestep():
    """diffusers' way with a list of timesteps, and the only one with the variance 1."""
    from comfy_extras.nodes_custom_sampler import SamplerCustom
    from lcm_lora.nodes.sampling import LCMSampler, LCMSchedule

    model = build("v")
    scheduler = LCMScheduler(prediction_type="v_prediction")
    scheduler.set_timesteps(timesteps=[599, 299])
    expected = reference(model, "v", 2, seed=11, batch=1, scheduler=scheduler)
    sigmas = LCMSchedule.execute(model, 2, 1.0, 50, "599, 299").result[0]
    sampler = LCMSampler.execute(1.0, "cpu").result[0]
    actual = SamplerCustom.execute(
        patched(model), True, 11, 1.0, conditioning(1), conditioning(2), sampler, sigmas, empty()
    )
    assert_same(actual.result[0]["samples"], expected)
