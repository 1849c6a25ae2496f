"""The distillation loss and the DDIM solver, against closed forms and diffusers."""

import pytest
import torch
from lcm_lora.tests.unit.toy_network import ACP, Toy, a_step
from lcm_lora.training.adapter import Adapter
from lcm_lora.training.objectives.lcm import loss as lcm_loss
from lcm_lora.training.objectives.lcm import pseudo_huber
from lcm_lora.training.objectives.solver import Schedule, ddim, guided, predict_guided


def batch(n=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    z0, eps = torch.randn(2, n, 4, 4, 4, generator=g)
    index = torch.randint(50, (n,), generator=g)
    cond = {"context": torch.randn(n, 8, generator=g)}
    return z0, eps, index, cond, {"context": torch.zeros(n, 8)}


class Oracle:
    """A network that knows z0: its x0 is right at every timestep, for every prediction type."""

    def __init__(self, schedule, z0):
        self.schedule, self.z0 = schedule, z0

    def __call__(self, z, t, context):
        z0 = self.z0.repeat(len(z) // len(self.z0), 1, 1, 1)
        a, s = self.schedule.alpha(t), self.schedule.sigma(t)
        eps = (z - a * z0) / s
        return {"eps": eps, "v": a * eps - s * z0, "x0": z0}[self.schedule.prediction]


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_loss_of_a_perfect_network_is_zero(prediction):
    z0, eps, index, cond, uncond = batch()
    schedule = Schedule(ACP, prediction)
    oracle, adapter = Oracle(schedule, z0), Adapter(Toy(), 2)
    index = index.clamp(min=1)
    assert a_step(lcm_loss, oracle, adapter, schedule, z0, eps, index, cond, uncond, 7.5) < 1e-4
    # From t = 19 the solver lands on s = 0, where the boundary makes z_s itself the target.
    zero = torch.zeros_like(index)
    z_0 = schedule.noised(z0, eps, zero)
    loss = a_step(lcm_loss, oracle, adapter, schedule, z0, eps, zero, cond, uncond, 7.5)
    assert torch.allclose(loss, pseudo_huber(z0, z_0), rtol=1e-2)


def test_the_loss_moves_only_the_adapter_and_only_through_the_student():
    network = Toy()
    adapter = Adapter(network, 2)
    z0, eps, index, cond, uncond = batch()
    grads = []
    network.register_forward_hook(lambda *a: grads.append((adapter.on, torch.is_grad_enabled())))
    loss = a_step(lcm_loss, network, adapter, Schedule(ACP), z0, eps, index, cond, uncond, 7.5)
    # Teacher: one batched call, adapter off. Target: on, no gradient. Student: on, with gradient.
    assert grads == [(False, False), (True, False), (True, True)]
    loss.backward()
    assert adapter.on
    assert all(p.grad is None for p in network.parameters())
    assert any(p.grad.abs().sum() > 0 for p in adapter.parameters())


def test_guidance_counts_as_users_do():
    cond, uncond = torch.randn(2, 5)
    assert torch.equal(guided(cond, uncond, 1.0), uncond + (cond - uncond))
    # The papers' w is one less: x0 = x0_c + w (x0_c - x0_u).
    assert torch.allclose(guided(cond, uncond, 7.5), cond + 6.5 * (cond - uncond))


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_guiding_x0_and_eps_each_equals_guiding_the_output(prediction):
    schedule, network = Schedule(ACP, prediction), Toy()
    z0, eps, index, cond, uncond = batch()
    t = index * 20 + 19
    z = schedule.noised(z0, eps, t)
    x0, e = predict_guided(network, schedule, z, t, cond, uncond, 5.0)
    output = guided(network(z, t, **cond), network(z, t, **uncond), 5.0)
    expected_pair = schedule.predict(lambda *_: output, z, t, {})
    for ours, theirs in zip((x0, e), expected_pair, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_ddim_equals_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is a developer's package")
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=True, timestep_spacing="trailing",
    )  # fmt: skip
    scheduler.set_timesteps(10)
    network = Toy()
    noise, _, _, cond, uncond = batch()
    z = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            now = t.expand(len(z))
            output = guided(network(z, now, **cond), network(z, now, **uncond), 3.0)
            z = scheduler.step(output, t, z).prev_sample
    ours = ddim(network, Schedule(ACP), noise, 10, cond, uncond, 3.0)
    assert torch.allclose(ours, z, rtol=1e-4, atol=1e-4)


def test_pseudo_huber():
    assert pseudo_huber(torch.zeros(4), torch.zeros(4)) == 0
    far = pseudo_huber(torch.full((4,), 3.0), torch.zeros(4))
    assert far == pytest.approx(3.0 - 0.001, abs=1e-5)
