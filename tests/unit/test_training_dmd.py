"""Distribution matching: against its equations in float64, and on distributions that are known."""

import copy

import pytest
import torch
from lcm_lora.tests.unit.test_training_equations import ACP, ALPHA, RANK, Network
from lcm_lora.training.adapter import Adapter
from lcm_lora.training.data import draws
from lcm_lora.training.objectives.batch import Batch
from lcm_lora.training.objectives.dmd import Draws, Pair, arrive, direction, matching_loss
from lcm_lora.training.objectives.solver import Schedule, predict_guided
from torch import nn
from torch.func import functional_call

TIMESTEPS = [999, 759, 499]


def alpha(t):
    return ACP[t].sqrt()[:, None, None, None]


def sigma(t):
    return (1 - ACP[t]).sqrt()[:, None, None, None]


def f(x0, z, t):
    scaled = (10 * t.double())[:, None, None, None]
    return 0.25 / (scaled**2 + 0.25) * z + scaled / (scaled**2 + 0.25).sqrt() * x0


def reference(network, student, fake, c, no_c, cfg, drawn, timesteps):
    """The student's loss and the fake score's, with their graphs, written from the equations.

    student, fake: weight name -> (up, down).
    """

    def merged(factors):
        return {
            name: network.get_parameter(name)
            + torch.einsum("or,r...->o...", up.flatten(1), down) * ALPHA / RANK
            for name, (up, down) in factors.items()
        }

    def x0_eps(z, t, context, weights):
        eps = functional_call(network, weights, (z, t, context))
        return (z - sigma(t) * eps) / alpha(t), eps

    z = drawn.run[:, 0]
    for i, value in enumerate(timesteps):
        t = torch.full((len(z),), value)
        x = f(x0_eps(z, t, c, merged(student))[0], z, t)
        if i + 1 < len(timesteps):
            later = torch.full((len(z),), timesteps[i + 1])
            z = (alpha(later) * x + sigma(later) * drawn.run[:, i + 1]).detach()
    tau, eps = drawn.tau[:, 0], drawn.eps[:, 0]
    z_tau = (alpha(tau) * x + sigma(tau) * eps).detach()
    with torch.no_grad():
        mu_fake, _ = x0_eps(z_tau, tau, c, merged(fake))
        cond, uncond = (x0_eps(z_tau, tau, text, {})[0] for text in (c, no_c))
        mu_real = uncond + cfg * (cond - uncond)
        weight = (x - mu_real).abs().mean((1, 2, 3), keepdim=True)
    # The gradient of the divergence at x, with DMD's weight for each picture.
    student_loss = (x * (mu_fake - mu_real) / weight).mean()
    tau, eps = drawn.tau[:, 1], drawn.eps[:, 1]
    z_tau = (alpha(tau) * x + sigma(tau) * eps).detach()
    fake_loss = ((x0_eps(z_tau, tau, c, merged(fake))[1] - eps) ** 2).mean()
    return student_loss, fake_loss


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def factors(adapter):
    return {
        f"{name}.weight": (up.clone().requires_grad_(), down.clone().requires_grad_())
        for name, up, down in adapter.tensors()
    }


@pytest.mark.parametrize("calls", [1, 3])
def test_a_steps_gradients_equal_the_equations(calls):
    torch.manual_seed(0)
    network = Network().double()
    plain = copy.deepcopy(network)
    adapters = [Adapter(network, RANK, ALPHA, seed).double() for seed in (0, 1)]
    for adapter in adapters:
        for layer in adapter.layers:
            nn.init.normal_(layer.up, std=0.3)
    student, fake = adapters
    fake.on = False
    c, no_c, z0, eps = random(7, 5, 8), random(7, 5, 8), random(7, 4, 4, 4), random(7, 4, 4, 4)
    cfg = torch.linspace(1, 7, 7, dtype=torch.float64)[:, None, None, None]
    tau = torch.stack([torch.arange(20, 980, 150), torch.arange(970, 20, -140)], 1)
    drawn = Draws(random(7, 4, 4, 4, 4), random(7, 2, 4, 4, 4), tau)
    batch = Batch(z0, eps, torch.zeros(7).long(), {"context": c}, {"context": no_c}, cfg)
    pair = Pair(network, Schedule(ACP), student, fake, torch.float32)
    pair.add_gradients(batch, drawn, TIMESTEPS[:calls], 1.0)

    theirs = [factors(adapter) for adapter in adapters]
    losses = reference(plain, *theirs, c, no_c, cfg, drawn, TIMESTEPS[:calls])
    sum(losses).backward()
    for adapter, reference_factors in zip(adapters, theirs, strict=True):
        for layer, (up, down) in zip(adapter.layers, reference_factors.values(), strict=True):
            for ours, expected in ((layer.up.grad, up.grad), (layer.down.grad, down.grad)):
                assert expected.abs().max() > 0
                assert (ours - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert student.on and not fake.on


def denoiser(z, t, context):
    """The exact eps prediction for pixels that are normal around the context, deviation 0.7."""
    variance = alpha(t) ** 2 * 0.49 + sigma(t) ** 2
    x0 = context + alpha(t) * 0.49 * (z - alpha(t) * context) / variance
    return (z - alpha(t) * x0) / sigma(t)


@pytest.mark.parametrize(("cfg", "expected"), [(1.0, 2.0), (3.0, 4.0)])
def test_a_student_comes_to_the_guided_teachers_pictures(cfg, expected):
    """Conditional pictures lie around 2, unconditional ones around 1, so with guidance w around
    1 + w (2 - 1). With the sign reversed, or without the unconditional part, it goes elsewhere."""
    generator = torch.Generator().manual_seed(0)
    schedule = Schedule(ACP)
    cond, uncond = ({"context": torch.full((16, 1, 1, 1), value)} for value in (2.0, 1.0))
    at = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([at], lr=0.5)
    for _ in range(200):
        x = at + 0.7 * torch.randn(16, 1, 8, 8, generator=generator, dtype=torch.float64)
        tau = torch.randint(20, 980, (16,), generator=generator)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        z = schedule.noised(x.detach(), noise, tau)
        own = {"context": at.detach().expand(16, 1, 1, 1)}
        fake, _ = schedule.predict(denoiser, z, tau, own)
        real, _ = predict_guided(denoiser, schedule, z, tau, cond, uncond, cfg)
        optimiser.zero_grad()
        matching_loss(x, direction(x.detach(), fake, real)).backward()
        optimiser.step()
    assert abs(float(at.detach()) - expected) < 0.15


def test_the_way_to_a_call_is_the_samplers(monkeypatch):
    """A student that always says the same picture arrives at that picture, noised."""
    picture = torch.arange(2.0, dtype=torch.float64)[:, None, None, None].expand(2, 4, 3, 3)

    def network(z, t, context):
        return (z - alpha(t) * picture) / sigma(t)

    noise = random(2, 4, 4, 3, 3)
    z, t = arrive(network, Schedule(ACP), noise, TIMESTEPS, {"context": None})
    assert t.tolist() == [499, 499]
    torch.testing.assert_close(z, alpha(t) * picture + sigma(t) * noise[:, 2], rtol=0, atol=1e-5)


def test_draws_are_those_of_the_place_alone():
    batch = draws.matching(5, 9, range(6), (4, 2, 2))
    part = draws.matching(5, 9, range(2, 4), (4, 2, 2))
    assert all(torch.equal(a[2:4], b) for a, b in zip(batch, part, strict=True))
    assert not torch.equal(batch[0], draws.matching(5, 10, range(6), (4, 2, 2))[0])
    taus = torch.cat([draws.matching(5, step, range(50), (1, 1, 1))[2] for step in range(40)])
    assert taus.min() < 30 and taus.max() > 970 and 20 <= taus.min() and taus.max() <= 979


def test_runs_reach_every_call_of_1_2_and_4_steps():
    from lcm_lora.samplers.families import FAMILIES

    timesteps = FAMILIES["lcm"].timesteps
    runs = {tuple(draws.run(3, step, timesteps)) for step in range(200)}
    expected = {tuple(timesteps(n)[: call + 1]) for n in (1, 2, 4) for call in range(n)}
    assert runs == expected
