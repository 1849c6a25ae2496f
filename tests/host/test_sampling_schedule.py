"""Which timesteps and sigmas a network is asked for, inside the real ComfyUI."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import LCMScheduler
from lcm_lora.samplers.families import FAMILIES
from lcm_lora.tests.host.random_unet import (
    Calls,
    build,
    core_patch,
    host_ksampler,
    patched,
)

pytestmark = pytest.mark.usefixtures("comfy")

TABLES = [name for name, family in FAMILIES.items() if family.tables]


@pytest.mark.parametrize("steps", range(1, 9))
def test_the_hosts_ksampler_with_simple_has_the_reference_timesteps(steps):
    scheduler = LCMScheduler()
    scheduler.set_timesteps(steps)
    model = build("v")
    calls = Calls(patched(model))
    host_ksampler(calls.model, "simple", steps)
    assert calls.timesteps == scheduler.timesteps.tolist()
    table = model.get_model_object("model_sampling").sigmas
    assert calls.sigmas == table[scheduler.timesteps].tolist()


@pytest.mark.parametrize("zsnr", [False, True])
def test_timestep_and_sigma_belong_together_with_every_scheduler(zsnr):
    """At every call the network gets the timestep that matches the noise in its input."""
    from comfy.samplers import SCHEDULER_NAMES

    model = build("v", zsnr)
    log_table = model.get_model_object("model_sampling").sigmas.double().log()
    for scheduler, steps in itertools.product(SCHEDULER_NAMES, (2, 3, 4, 7)):
        calls = Calls(patched(model))
        host_ksampler(calls.model, scheduler, steps)
        assert len(calls.timesteps) >= steps - 1
        for t, sigma in zip(calls.timesteps, calls.sigmas, strict=True):
            low = int(t)
            stride = (log_table[min(low + 1, 999)] - log_table[low]).item()
            at_t = log_table[low].item() + (t - low) * stride
            # float32 holds timesteps to 6e-5; the last stride of zero-SNR is a leap.
            tolerance = 1e-6 + 6.2e-5 * stride
            assert math.log(sigma) == pytest.approx(at_t, abs=tolerance), (scheduler, steps)


def test_every_timestep_of_the_table_is_exact():
    model = build()
    table = model.get_model_object("model_sampling").sigmas
    sampling = patched(model).get_model_object("model_sampling")
    timesteps = torch.arange(1000)
    assert torch.equal(sampling.timestep(table), timesteps.float())
    assert torch.equal(sampling.sigma(timesteps), table)
    assert sampling.timestep(torch.tensor([1e-4, 1e4])).tolist() == [0, 999]
    assert sampling.timestep(table[759]).shape == ()
    between = torch.rand(500, generator=torch.Generator().manual_seed(0)) * 999
    torch.testing.assert_close(sampling.timestep(sampling.sigma(between)), between)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_boundary_condition_holds(prediction):
    """At t = 0 the consistency function is the latent itself, for any output of the network."""
    sampling = patched(build(prediction)).get_model_object("model_sampling")
    output, x = torch.randn(2, 2, 4, 8, 8)
    sigma = sampling.sigma(torch.tensor([0, 999]))
    denoised = sampling.calculate_denoised(sigma, output, x)
    torch.testing.assert_close(denoised[0], x[0] * (1 + sigma[0] ** 2).rsqrt())
    own = build(prediction).get_model_object("model_sampling")
    torch.testing.assert_close(denoised[1], own.calculate_denoised(sigma, output, x)[1])


def test_percent_to_sigma_stays_as_the_model_has_it():
    """ControlNet's and conditioning's ranges are given in percent."""
    model = build()
    own, new = (m.get_model_object("model_sampling") for m in (model, patched(model)))
    for percent in (0.0, 0.1, 0.35, 0.5, 0.9, 1.0):
        assert new.percent_to_sigma(percent) == pytest.approx(own.percent_to_sigma(percent))


def test_the_schedule_node():
    from lcm_lora.nodes.sampling import LCMSchedule

    model = build("v")
    table = model.get_model_object("model_sampling").sigmas

    def node(*arguments, of=model):
        return LCMSchedule.execute(of, *arguments).result[0]

    expected = [*table[[999, 759, 499, 259]].tolist(), 0.0]
    for any_model in (model, patched(model), core_patch(model, "lcm")):
        sigmas = node(4, 1.0, 50, of=any_model)
        assert sigmas.dtype == torch.float32 and sigmas.tolist() == expected
    assert node(2, 0.8, 50).tolist() == [*table[[799, 399]].tolist(), 0.0]
    assert node(4, 1.0, 50, "999, 749, 499, 249")[1] == table[749]
    with pytest.raises(ValueError, match="do not fit"):
        node(8, 0.1, 50)
    with pytest.raises(ValueError, match="found 500 after 499"):
        node(4, 1.0, 50, "999, 499, 500")


def test_the_schedule_of_a_family():
    from lcm_lora.nodes.sampling import LCMSchedule

    model = patched(build("v"), "dmd2")
    table = model.get_model_object("model_sampling").table

    def node(*arguments):
        return LCMSchedule.execute(model, *arguments).result[0].tolist()

    assert node(4, 1.0, 50) == [*table[[999, 749, 499, 249]].tolist(), 0.0]
    assert node(4, 0.6, 50) == [*table[[599, 449, 299, 149]].tolist(), 0.0]
    # The user's setting has priority over the family's.
    assert node(2, 1.0, 10) == [*table[[999, 499]].tolist(), 0.0]
    assert node(4, 1.0, 25) == [*table[[999, 759, 519, 279]].tolist(), 0.0]
    assert node(4, 1.0, 50, "999, 500") == [*table[[999, 500]].tolist(), 0.0]


@pytest.mark.parametrize("family", TABLES)
def test_what_simple_takes_of_each_family(family):
    """As the help pages say: where every timestep is allowed, some may be off by one."""
    any_timestep = FAMILIES[family].origin_steps is None
    for steps in range(1, 9):
        calls = Calls(patched(build("v"), family))
        host_ksampler(calls.model, "simple", steps, "euler")
        expected = FAMILIES[family].timesteps(steps)
        off = [abs(a - b) for a, b in zip(calls.timesteps, expected, strict=True)]
        if FAMILIES[family].single and steps == 1:
            assert (calls.timesteps, expected) == ([999], [399])
        else:
            assert max(off) == int(any_timestep and steps in (3, 6, 7)), steps
