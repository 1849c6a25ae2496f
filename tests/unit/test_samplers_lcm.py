"""The sampling loop against diffusers' schedulers, and its properties."""

from __future__ import annotations

import pytest
import torch
from diffusers import LCMScheduler, TCDScheduler
from lcm_lora.samplers.lcm import lcm
from lcm_lora.samplers.timesteps import timesteps
from lcm_lora.tests.unit import scheduled
from lcm_lora.tests.unit.scheduled import SD, SHAPE, denoiser, kept, run

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def levels(steps: int) -> torch.Tensor:
    return scheduled.levels(timesteps(steps))


def reference(scheduler, steps: int, **options) -> list[torch.Tensor]:
    scheduler.set_timesteps(steps)
    return scheduled.reference(scheduler, **options)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_whole_run_equals_diffusers(prediction, steps):
    expected = reference(LCMScheduler(prediction_type=PREDICTIONS[prediction], **SD), steps)
    for ours, theirs in zip(run(denoiser(prediction), timesteps(steps)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.75])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_eta_equals_the_gamma_of_tcd(prediction, eta):
    """Except for the last step: TCD keeps the noise of t = 0; we, like LCM, keep none."""
    expected = reference(TCDScheduler(prediction_type=PREDICTIONS[prediction], **SD), 4, eta=eta)
    latents = run(denoiser(prediction, boundary=False), timesteps(4), eta)
    for ours, theirs in zip(latents[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_variance_is_exact_at_every_eta(eta):
    """A model that knows x0 leaves noise of exactly the next level's deviation."""
    shape, x0 = (64, 4, 32, 32), 3.0
    sigmas = levels(4)
    generator = torch.Generator().manual_seed(0)

    def draw(_step: int = 0):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def check(state):
        spread = (state["x"] - x0).std() / state["sigma"]
        assert spread == pytest.approx(1, abs=0.006)  # 262144 values: four deviations

    lcm(
        lambda x, sigma: torch.full_like(x, x0), x0 + draw() * sigmas[0], sigmas,
        callback=check, noise=draw, kept=kept(sigmas, eta),
    )  # fmt: skip


def test_kept_noise_grows_from_none_to_all():
    sigmas = levels(4)
    rows = torch.tensor([kept(sigmas, eta) for eta in (1.0, 0.8, 0.5, 0.2, 0.0)])
    assert (rows[0] == 0).all()
    assert (rows[1:, :-1] > rows[:-1, :-1]).all()
    assert (rows[:, -1] == 0).all()
    assert rows[-1].tolist() == pytest.approx(sigmas[1:].tolist())


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_eta_outside_its_range(eta):
    with pytest.raises(ValueError, match="eta must be"):
        kept(levels(2), eta)


def test_eta_zero_draws_no_noise_and_one_step_none_at_all():
    def draw(step):
        raise AssertionError(f"noise drawn at step {step}")

    x = torch.randn(SHAPE, dtype=torch.float64) * 14.6
    sigmas = levels(4)
    first, second = (
        lcm(denoiser("eps"), x, sigmas, noise=draw, kept=kept(sigmas, 0.0)) for _ in range(2)
    )
    assert torch.equal(first, second)
    lcm(denoiser("eps"), x, levels(1), noise=draw)


def test_the_callback_sees_latents_that_stay_as_they_were():
    states, copies = [], []

    def remember(state):
        states.append(state)
        copies.append((state["x"].clone(), state["denoised"].clone()))

    x = torch.randn(SHAPE, dtype=torch.float64)
    before = x.clone()
    lcm(denoiser("v"), x, levels(4), callback=remember, noise=lambda i: torch.ones(SHAPE))
    assert torch.equal(x, before)
    assert [state["i"] for state in states] == [0, 1, 2, 3]
    for state, (latent, denoised) in zip(states, copies, strict=True):
        assert torch.equal(state["x"], latent) and torch.equal(state["denoised"], denoised)


def test_one_call_a_step_with_the_arguments_given():
    calls = []

    def model(x, sigma, **extra):
        calls.append((sigma, extra))
        return x * 0.5

    sigmas = levels(4)
    lcm(model, torch.zeros(SHAPE), sigmas, {"seed": 1}, noise=lambda i: torch.ones(SHAPE))
    assert [call[1] for call in calls] == [{"seed": 1}] * 4
    assert torch.equal(torch.stack([call[0] for call in calls]), sigmas[:-1, None].expand(-1, 2))
