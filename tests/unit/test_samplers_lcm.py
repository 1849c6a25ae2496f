"""The sampling loop against diffusers' schedulers, and its properties."""

from __future__ import annotations

import pytest
import torch
from diffusers import LCMScheduler, TCDScheduler
from lcm_lora.samplers.consistency import consistency, x0_and_eps
from lcm_lora.samplers.lcm import kept_noise, lcm
from lcm_lora.samplers.timesteps import timesteps

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
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


def levels(steps: int) -> torch.Tensor:
    return torch.cat([table()[timesteps(steps)], torch.zeros(1, dtype=torch.float64)])


def kept(sigmas: torch.Tensor, eta: float) -> list[float]:
    return kept_noise(
        sigmas,
        eta,
        lambda sigma: torch.searchsorted(table(), sigma),
        lambda t: table()[t.long()],
    )


def reference(scheduler, steps: int, **options) -> list[torch.Tensor]:
    """diffusers' own loop in VP scale: the latent after each step."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(7)
    z = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    latents = []
    for t in scheduler.timesteps:
        output = network(z, t.item())
        z = scheduler.step(output, t, z, generator=generator, return_dict=False, **options)[0]
        latents.append(z)
    return latents


def run(model, steps: int, eta: float = 1.0) -> list[torch.Tensor]:
    """Our loop with the same noise: the VP latent after each step."""
    generator = torch.Generator().manual_seed(7)

    def draw(_step: int = 0):
        return torch.randn(SHAPE, generator=generator, dtype=torch.float64)

    sigmas = levels(steps)
    seen = []
    x = draw() * (1 + sigmas[0] ** 2).sqrt()
    end = lcm(
        model, x, sigmas, callback=lambda s: seen.append(s["x"]), noise=draw,
        kept=kept(sigmas, eta),
    )  # fmt: skip
    return [
        x / (1 + sigma**2).sqrt() for x, sigma in zip([*seen[1:], end], sigmas[1:], strict=True)
    ]


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_whole_run_equals_diffusers(prediction, steps):
    expected = reference(LCMScheduler(prediction_type=PREDICTIONS[prediction], **SD), steps)
    for found, wanted in zip(run(denoiser(prediction), steps), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.75])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_eta_equals_the_gamma_of_tcd(prediction, eta):
    """Up to the last step, where TCD keeps the noise of t = 0 and we, like LCM, keep none."""
    expected = reference(TCDScheduler(prediction_type=PREDICTIONS[prediction], **SD), 4, eta=eta)
    found = run(denoiser(prediction, boundary=False), 4, eta)
    for ours, theirs in zip(found[:-1], expected[:-1], strict=True):
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
