"""The loop on flow models, x = (1 - sigma) x0 + sigma eps, against diffusers and the authors."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from lcm_lora.samplers.families import DEFAULT_FLOW, FAMILIES
from lcm_lora.samplers.lcm import kept_noise, lcm
from lcm_lora.samplers.timesteps import parse_sigmas, refuse_ascent, times
from lcm_lora.tests.unit import scheduled

FLOW = [name for name, family in FAMILIES.items() if family.flow]
SHAPE = (2, 16, 1, 8, 8)  # of a picture in a video model
SIGMAS = [1.0, 0.9, 0.75, 0.5, 0.0]


def shift(time: float, by: float) -> float:
    return by * time / (1 + (by - 1) * time)


def line(sigmas: torch.Tensor) -> tuple[list[float], list[float]]:
    return (1 - sigmas).tolist(), sigmas.tolist()


def kept(sigmas: torch.Tensor, eta: float) -> list[float]:
    return kept_noise(sigmas, eta, lambda sigmas, eta: sigmas * (1 - eta), line)


def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """A smooth function of latent and time in a trained network's place."""
    return torch.tanh(x.roll(1, -1) * 0.7 + sigma - x.square() * 0.1)


def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return x - sigma[0] * velocity(x, sigma[0].item())


def draws():
    generator = torch.Generator().manual_seed(7)
    return lambda _step=0: torch.randn(SHAPE, generator=generator, dtype=torch.float64)


def run(sigmas: list[float], eta: float, model=denoiser) -> list[torch.Tensor]:
    """The latent after each step."""
    draw, seen = draws(), []
    levels = torch.tensor(sigmas, dtype=torch.float64)
    alphas, betas = line(levels)
    end = lcm(
        model, draw() * sigmas[0], levels, callback=lambda state: seen.append(state["x"]),
        noise=draw, kept=kept(levels, eta), levels=betas, signals=alphas,
    )  # fmt: skip
    return [*seen[1:], end]


def of_diffusers(kind, sigmas: list[float]) -> list[torch.Tensor]:
    scheduler = kind()
    scheduler.set_timesteps(sigmas=sigmas[:-1])
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64) * sigmas[0]
    seen = []
    for t in scheduler.timesteps:
        output = velocity(x, t.item() / 1000)
        x = scheduler.step(output, t, x, generator=generator, return_dict=False)[0].double()
        seen.append(x)
    return seen


RUNS = [SIGMAS, [1.0, 0.0], [*FAMILIES["flux2-turbo"].lists[0], 0.0], [0.6, 0.3, 0.0]]


@pytest.mark.parametrize("sigmas", RUNS)
def test_lcm_is_the_lcm_of_diffusers(sigmas):
    for ours, theirs in zip(
        run(sigmas, 1.0), of_diffusers(FlowMatchLCMScheduler, sigmas), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sigmas", RUNS)
def test_eta_zero_is_euler(sigmas):
    expected = of_diffusers(FlowMatchEulerDiscreteScheduler, sigmas)
    for ours, theirs in zip(run(sigmas, 0.0), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_variance_is_exact_at_every_eta(eta):
    """A model that knows x0 leaves exactly sigma of noise and 1 - sigma of the picture."""
    shape, x0 = (64, 4, 32, 32), 3.0
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor(SIGMAS, dtype=torch.float64)
    alphas, betas = line(levels)

    def draw(_step: int = 0):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def check(state):
        left = state["x"] - (1 - state["sigma"]) * x0
        assert left.std() / state["sigma"] == pytest.approx(1, abs=0.006)  # four deviations
        assert abs(left.mean()) < 0.01

    end = lcm(
        lambda x, sigma: torch.full_like(x, x0), draw(), levels, callback=check, noise=draw,
        kept=kept(levels, eta), levels=betas, signals=alphas,
    )  # fmt: skip
    assert torch.equal(end, torch.full(shape, x0, dtype=torch.float64))


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7, 1.0])
def test_the_step_is_that_of_the_papers_in_two_parts(eta):
    """Euler down to the time (1 - eta) t', then noise up to t', for any sigmas and latents."""
    draw = draws()
    for sigma, to in ((1.0, 0.9), (0.9, 0.75), (0.3, 0.1)):
        x, v, z = draw(), draw(), draw()
        low = (1 - eta) * to
        at_low = x + (low - sigma) * v
        ratio = (1 - to) / (1 - low)
        expected = ratio * at_low + math.sqrt(to**2 - ratio**2 * low**2) * z
        levels = torch.tensor([sigma, to], dtype=torch.float64)
        alphas, betas = line(levels)
        actual = lcm(
            lambda x, at, v=v: x - at[0] * v, x, levels, noise=lambda _, z=z: z,
            kept=kept(levels, eta), levels=betas, signals=alphas,
        )  # fmt: skip
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_cosmos_scale_and_the_line_are_one_process(eta):
    """x / (1 - sigma) at the level sigma / (1 - sigma); 1 itself has no place there."""
    sigmas = [0.98, 0.9, 0.75, 0.5, 0.0]
    levels = torch.tensor(sigmas, dtype=torch.float64)
    exploding = levels / (1 - levels)

    def earlier(sigmas, eta):
        low = sigmas / (1 + sigmas) * (1 - eta)
        return low / (1 - low)

    def model(y, sigma):
        at = sigma[0] / (1 + sigma[0])
        return denoiser(y * (1 - at), at[None])

    draw = draws()
    end = lcm(
        model, draw() * exploding[0], exploding, noise=draw,
        kept=kept_noise(exploding, eta, earlier),
    )  # fmt: skip
    torch.testing.assert_close(run(sigmas, eta)[-1], end, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
def test_stable_diffusion_has_every_bit_of_the_loop_it_had(eta):
    """The loop before flow models: x0 + kept eps + fresh z, with nothing to scale x0."""
    sigmas = scheduled.levels([999, 759, 499, 259]).float()
    held = scheduled.kept(sigmas.double(), eta)
    generator = torch.Generator().manual_seed(1)
    x, *noises = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(5))
    x = x * sigmas[0]

    def model(x, sigma):
        return torch.tanh(x.roll(1, -1) * 0.7 / (1 + sigma[0]))

    actual = lcm(model, x, sigmas, noise=lambda step: noises[step], kept=held)
    levels = sigmas.tolist()
    for i, (level, target) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        x0 = model(x, sigmas[i].repeat(2))
        fresh = math.sqrt(max(target**2 - held[i] ** 2, 0.0))
        carried = x0 + (x - x0) * (held[i] / level) if held[i] > 0 else x0
        x = carried + noises[i] * fresh if fresh > 0 else carried
    assert torch.equal(actual, x)


PUBLISHED = {
    # lightx2v's generate_with_diffusers.py with its shift of 3.
    ("qwen-lightning", 4): [1, 0.9, 0.75, 0.5],
    ("qwen-lightning", 8): [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3],
    ("qwen-turbo", 2): [1, 0.75],
    # Points 0, 12, 25, 37 of the 50 of PCM's schedulers, which its tests run with a shift of 3.
    ("pcm-sd3", 4): [1, 0.9048, 0.75, 0.5132],
    ("pcm-sd3-stochastic", 4): [1, 0.9048, 0.75, 0.5132],
    ("pcm-sd3-shift1", 2): [1, 0.5],
    ("pcm-sd3-shift1", 4): [1, 0.76, 0.5, 0.26],
    # denoising steps 1000, 750, 500, 250 at a shift of 5.
    ("wan-lightning", 4): [1, 0.9375, 0.8333, 0.625],
    ("rcm", 1): [80 / 81],
    ("rcm", 4): [80 / 81, 0.9338, 0.8529, 0.6090],
    ("flux2-turbo", 8): [1, 0.6509, 0.4374, 0.2932, 0.1893, 0.1108, 0.0495, 0.00031],
    ("tdm-sd3", 4): [1, 0.9474, 0.8571, 0.6667],
}


@pytest.mark.parametrize(("family", "steps"), PUBLISHED)
def test_sigmas_are_the_authors(family, steps):
    chosen = FAMILIES[family]
    sigmas = chosen.listed(steps)
    if sigmas is None:
        sigmas = [shift(time, chosen.shift) for time in chosen.times(steps)]
    assert sigmas == pytest.approx(PUBLISHED[family, steps], abs=5.1e-5)


@pytest.mark.parametrize("family", FLOW)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8])
def test_every_family_runs_any_number_of_steps(family, steps):
    chosen = FAMILIES[family]
    for strength in (1.0, 0.6, 0.3):
        run_times = chosen.times(steps, strength)
        assert len(run_times) == steps and run_times == sorted(run_times, reverse=True)
        assert 0 < run_times[-1] and run_times[0] <= strength < run_times[0] + 0.021
    assert chosen.listed(steps, 0.5) is None
    assert chosen.eta in (0, 1)


def test_times_are_those_of_diffusers_pipelines():
    for steps in range(1, 51):
        expected = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist()
        assert times(steps) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least 1, found 0"):
        times(0)
    with pytest.raises(ValueError, match="strength"):
        times(4, 1.5)
    with pytest.raises(ValueError, match="do not fit"):
        times(8, 0.1, 50)
    assert DEFAULT_FLOW in FLOW and "lcm" in FLOW


def test_a_list_of_sigmas():
    assert parse_sigmas("1, 0.9; 0.75 .5") == [1, 0.9, 0.75, 0.5]
    assert parse_sigmas("0.987 0.5 0") == [0.987, 0.5]
    for text, said in {
        "1, 0.5, 0.75": "must descend, found 0.75 after 0.5",
        "1, 1": "must descend, found 1 after 1",
        "999, 749": "from 1 down to 0, found 999; timesteps from 999 down are for Stable Diffusion",
        "1, -0.5": "found -0.5",
        "1, nan": "found nan",
        "1, half": "must be numbers, found 'half'",
        "0": "no sigma above 0",
        ",": "no sigma above 0",
    }.items():
        with pytest.raises(ValueError, match=said):
            parse_sigmas(text)


def test_sigmas_that_ascend_are_refused():
    refuse_ascent([14.6, 2.0, 2.0, 0.0])
    with pytest.raises(ValueError, match=r"descend; these SIGMAS have 0.75 after 0.5.*reverse"):
        refuse_ascent([1.0, 0.5, 0.75, 0.0])
