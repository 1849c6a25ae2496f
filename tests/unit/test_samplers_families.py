"""Each family's timesteps and whole runs against the scheduler that its authors name."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, TCDScheduler
from lcm_lora.samplers.families import FAMILIES
from lcm_lora.tests.unit.scheduled import SD, denoiser, draws, network, reference, run

TABLES = [name for name, family in FAMILIES.items() if family.tables]
STEPS = [1, 2, 4, 8]
DMD2 = {1: [399], 2: [999, 499], 4: [999, 749, 499, 249]}
DMD2[8] = [999, 874, 749, 624, 499, 374, 249, 124]
TRAILING = {"timestep_spacing": "trailing"} | SD


def scheduler_of(family: str, steps: int):
    """The authors' scheduler at these steps, and the options of its step."""
    if family == "dmd2":
        scheduler = LCMScheduler(**SD)
        scheduler.set_timesteps(timesteps=DMD2[steps])
        return scheduler, {}
    kind, settings, options = {
        "lcm": (LCMScheduler, SD, {}),
        "tcd": (TCDScheduler, SD, {"eta": 0.3}),
        "hyper-sd": (DDIMScheduler, TRAILING | {"clip_sample": False}, {}),
        "hyper-sd-1step": (TCDScheduler, SD, {"eta": 1.0}),
        "pcm": (DDIMScheduler, TRAILING | {"clip_sample": False}, {}),
        "lightning": (EulerDiscreteScheduler, TRAILING, {}),
        "phased": (TCDScheduler, SD, {"eta": 0.0}),
    }[family]
    scheduler = kind(**settings)
    scheduler.set_timesteps(steps)
    return scheduler, options


@pytest.mark.parametrize("family", TABLES)
@pytest.mark.parametrize("steps", STEPS)
def test_timesteps_equal_the_authors(family, steps):
    scheduler, _ = scheduler_of(family, steps)
    assert FAMILIES[family].timesteps(steps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_trailing_equals_diffusers_at_every_count(kind):
    scheduler = kind(**TRAILING)
    for steps in range(1, 51):
        scheduler.set_timesteps(steps)
        for family in ("hyper-sd", "pcm", "lightning"):
            assert FAMILIES[family].timesteps(steps) == scheduler.timesteps.tolist(), steps


@pytest.mark.parametrize("family", [name for name in TABLES if name != "lightning"])
@pytest.mark.parametrize("steps", STEPS)
def test_a_whole_run_equals_the_authors(family, steps):
    scheduler, options = scheduler_of(family, steps)
    # TCD's scheduler goes to the timestep 0, not to the clean picture: so 0 gets no noise.
    scheduler.alphas_cumprod[0] = 1.0
    chosen = FAMILIES[family]
    latents = run(denoiser("eps", chosen.boundary), chosen.timesteps(steps), chosen.eta)
    for ours, theirs in zip(latents, reference(scheduler, **options), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", STEPS)
def test_a_whole_lightning_run_equals_euler(steps):
    """In its own scale, which is ours. It starts with sigma_max, not with sqrt(1 + sigma_max^2):
    0.2 % less than the host's noise, so both start alike here."""
    scheduler, _ = scheduler_of("lightning", steps)
    sigmas = scheduler.sigmas
    x = draws()().float() * (1 + sigmas[0] ** 2).sqrt()
    expected = []
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, t), t.item())
        x = scheduler.step(output, t, x, return_dict=False)[0]
        expected.append(x)
    chosen = FAMILIES["lightning"]
    latents = run(denoiser("eps", chosen.boundary), chosen.timesteps(steps), chosen.eta)
    for ours, theirs, sigma in zip(latents, expected, sigmas[1:], strict=True):
        torch.testing.assert_close(
            (ours * (1 + sigma**2).sqrt()).float(), theirs, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("family", TABLES)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8])
def test_image_to_image_keeps_all_steps_and_starts_below_its_strength(family, steps):
    before = 0
    for percent in range(16, 101):
        timesteps = FAMILIES[family].timesteps(steps, percent / 100)
        assert len(timesteps) == steps
        assert all(a > b for a, b in zip(timesteps, timesteps[1:], strict=False))
        single = steps == 1 and FAMILIES[family].single
        highest = min(10 * percent, single + 1 if single else 1000)
        assert highest - 21 <= timesteps[0] < highest and timesteps[-1] >= 0
        assert timesteps[0] >= before  # more strength never means less noise
        before = timesteps[0]


def test_image_to_image_of_the_trailing_families():
    assert FAMILIES["lightning"].timesteps(4, 0.6) == [599, 449, 299, 149]
    assert FAMILIES["pcm"].timesteps(2, 0.5) == [499, 249]  # like a slice of 4 complete steps
    assert FAMILIES["dmd2"].timesteps(1, 0.9) == [399]
    assert FAMILIES["dmd2"].timesteps(1, 0.3) == [299]
    with pytest.raises(ValueError, match="8 steps do not fit.* at least 0.008"):
        FAMILIES["pcm"].timesteps(8, 0.004)
    with pytest.raises(ValueError, match="at least 1, found 0"):
        FAMILIES["pcm"].timesteps(0)
    with pytest.raises(ValueError, match="strength"):
        FAMILIES["hyper-sd"].timesteps(4, 1.5)


@pytest.mark.parametrize("family", TABLES)
def test_a_run_takes_its_timesteps_from_the_grid(family):
    chosen = FAMILIES[family]
    for steps in range(1, 9):
        assert set(chosen.timesteps(steps)) <= set(chosen.grid())
