"""The statistics of latents, and what they see."""

import math

import pytest
import torch
from lcm_lora.search.objective import (
    BANDS,
    band_of,
    difference,
    residuals,
    statistics,
    style_shown,
)


def latents(seed: int = 0, count: int = 64) -> torch.Tensor:
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_power_is_that_of_the_values():
    """Parseval: the power of all bands is the variance within the pictures."""
    x = 3 * latents() + 2
    found = statistics(x)
    within = x.var((2, 3), correction=0).mean(0).double()
    assert found[:, 1:].exp().sum(1) == pytest.approx(within, rel=1e-5)
    assert found[:, 0] == pytest.approx(x.mean((0, 2, 3)).double(), rel=1e-5)


def test_a_wave_is_in_its_own_band():
    x = torch.arange(16) * 2 * math.pi / 16
    wave = torch.sin(5 * x).expand(1, 1, 16, 16)
    powers = statistics(wave)[0, 1:].exp()
    assert powers.argmax() == int(5 / 16 / 0.5 * BANDS) == band_of(16, 16)[0, 5]
    assert powers.max() / powers.sum() > 0.999


def test_noise_of_other_pictures_hardly_counts_but_blur_and_burn_do():
    wanted = statistics(latents(0))

    def away(x):
        return float(difference(statistics(x), wanted).square().sum())

    blurred = torch.nn.functional.avg_pool2d(latents(1), 3, 1, 1)
    assert away(latents(1)) < 0.1 < 1 < away(blurred)
    assert away(1.5 * latents(1)) > 1
    assert away(latents(1) + 1) > 1


def test_residuals_are_the_distances_of_their_definition():
    answers, ends, drawn = torch.randn(3, 2, 4, 8, 8), torch.randn(3, 4, 8, 8), latents()[:3]
    made = residuals(answers, ends, drawn, None)
    by_hand = torch.stack([(answers[:, k] - ends).square().mean() for k in range(2)]).mean()
    assert made.d_path == pytest.approx(float(by_hand))
    assert made.d_spec == pytest.approx(
        float(difference(statistics(drawn), statistics(ends)).square().sum())
    )


def test_latents_with_time_count_each_moment():
    x = latents(count=6)
    video = x.view(2, 3, 4, 16, 16).transpose(1, 2)
    torch.testing.assert_close(statistics(video), statistics(x))


def test_the_share_of_a_style():
    plain, styled = statistics(latents()), statistics(1.5 * latents() + 0.5)
    half = (plain + styled) / 2
    assert style_shown(styled, plain, styled, plain) == pytest.approx(1)
    assert style_shown(plain, plain, styled, plain) == pytest.approx(0)
    assert 0.4 < style_shown(half, plain, styled, plain) < 0.6
    assert style_shown(styled, plain, plain, plain) is None
