"""The consistency function and the conversions between prediction types."""

from __future__ import annotations

import pytest
import torch
from diffusers import LCMScheduler
from lcm_lora.samplers.consistency import c_skip_out, consistency, x0_and_eps


def test_scalings_equal_diffusers():
    scheduler = LCMScheduler()
    t = torch.arange(1000)
    c_skip, c_out = c_skip_out(t.double())
    for i in (0, 1, 2, 19, 259, 499, 999):
        expected = scheduler.get_scalings_for_boundary_condition_discrete(i)
        assert (c_skip[i].item(), c_out[i].item()) == pytest.approx(expected, rel=1e-12)
    single = c_skip_out(t)
    assert single[0].dtype == torch.float32
    torch.testing.assert_close(single[0], c_skip.float())


def test_at_zero_it_returns_the_latent_itself():
    z, x0 = torch.randn(2, 3, 4, 4, 4)
    assert torch.equal(consistency(z, x0, torch.zeros(3, dtype=torch.long)), z)
    torch.testing.assert_close(consistency(z, x0, torch.tensor(999)), x0, rtol=0, atol=1e-3)


def test_each_picture_has_its_own_timestep():
    z, x0 = torch.randn(2, 3, 4, 4, 4)
    t = torch.tensor([0, 1, 500])
    batch = consistency(z, x0, t)
    for i in range(3):
        torch.testing.assert_close(batch[i : i + 1], consistency(z[i : i + 1], x0[i : i + 1], t[i]))


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_a_perfect_prediction_gives_back_x0_and_eps(prediction):
    x0, eps = torch.randn(2, 5, 4, 8, 8, dtype=torch.float64)
    angle = torch.linspace(0.05, 1.5, 5, dtype=torch.float64).view(-1, 1, 1, 1)
    alpha, sigma = angle.cos(), angle.sin()
    output = {"eps": eps, "v": alpha * eps - sigma * x0, "x0": x0}[prediction]
    recovered = x0_and_eps(output, alpha * x0 + sigma * eps, alpha, sigma, prediction)
    torch.testing.assert_close(recovered, (x0, eps))


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_zero_terminal_snr_stays_finite(prediction):
    z, output = torch.randn(2, 2, 4, 8, 8)
    x0, eps = x0_and_eps(output, z, torch.tensor(0.0), torch.tensor(1.0), prediction)
    assert x0.isfinite().all() and eps.isfinite().all()
    if prediction == "v":  # the type such models have: nothing is divided
        assert torch.equal(x0, -output) and torch.equal(eps, z)


def test_an_unknown_prediction_type():
    with pytest.raises(ValueError, match="'flow'"):
        x0_and_eps(torch.zeros(1), torch.zeros(1), torch.ones(1), torch.zeros(1), "flow")
