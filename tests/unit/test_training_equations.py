"""One step's target, loss and gradients against the papers' equations, written out in float64."""

import copy

import pytest
import torch
from lcm_lora.tests.unit.toy_network import a_step
from lcm_lora.training.adapter import Adapter
from lcm_lora.training.objectives import lcm, phased
from lcm_lora.training.objectives.lcm import pseudo_huber
from lcm_lora.training.objectives.solver import Line, Schedule
from torch import nn
from torch.func import functional_call

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ACP = (1 - BETAS).cumprod(0)
RANK, ALPHA = 2, 6.0


class Network(nn.Module):
    """A residual block with a timestep and a cross-attention: linear and convolutional targets."""

    def __init__(self):
        super().__init__()
        self.proj_in = nn.Conv2d(4, 8, 1)
        self.in_layers = nn.Sequential(nn.SiLU(), nn.Identity(), nn.Conv2d(8, 8, 3, 1, 1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(2, 8))
        self.attn2 = nn.ModuleDict({n: nn.Linear(8, 8, bias=False) for n in ("to_q", "to_k")})
        self.proj_out = nn.Conv2d(8, 4, 1)

    def forward(self, z, t, context):
        t = t.to(z.dtype)[:, None] / 300
        h = self.proj_in(z) + self.emb_layers(torch.cat([t.sin(), t.cos()], 1))[:, :, None, None]
        h = h + self.in_layers(h)
        q, k = self.attn2["to_q"](h.flatten(2).mT), self.attn2["to_k"](context)
        h = h + ((q @ k.mT).softmax(-1) @ context).mT.reshape(h.shape)
        return self.proj_out(torch.tanh(h))


def reference(network, factors, prediction, phased, z0, noise, index, c, no_c, cfg):
    """(student, target, loss) of LCM (arXiv 2310.04378, algorithm 1) or PCM (2405.18407) as a LoRA.

    factors: weight name -> (up, down). Where s = 0 the released code takes the schedule's entry 0.
    """

    def alpha(t):
        return ACP[t].sqrt()[:, None, None, None]

    def sigma(t):
        return (1 - ACP[t]).sqrt()[:, None, None, None]

    def x0_eps(z, t, context, weights):
        output = functional_call(network, weights, (z, t, context))
        if prediction == "v":
            return alpha(t) * z - sigma(t) * output, alpha(t) * output + sigma(t) * z
        return (z - sigma(t) * output) / alpha(t), output

    def f(z, t, edge):
        x0, eps = x0_eps(z, t, c, merged)
        if phased:
            return alpha(edge) * x0 + sigma(edge) * eps
        scaled = (10 * t.double())[:, None, None, None]
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        return c_skip * z + c_out * x0

    merged = {
        name: network.get_parameter(name)
        + torch.einsum("or,r...->o...", up.flatten(1), down) * ALPHA / RANK
        for name, (up, down) in factors.items()
    }
    t = 20 * index + 19
    s = torch.where(t == 19, 0, t - 20)
    edge = torch.tensor([max(e for e in (0, 259, 499, 759) if e < now) for now in t.tolist()])
    z_t = alpha(t) * z0 + sigma(t) * noise
    with torch.no_grad():
        (x0_c, eps_c), (x0_u, eps_u) = x0_eps(z_t, t, c, {}), x0_eps(z_t, t, no_c, {})
        w = cfg - 1
        x0, eps = x0_c + w * (x0_c - x0_u), eps_c + w * (eps_c - eps_u)
        target = f(alpha(s) * x0 + sigma(s) * eps, s, edge)
    student = f(z_t, t, edge)
    return student, target, (((student - target) ** 2 + 0.001**2).sqrt() - 0.001).mean()


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("loss", [lcm.loss, phased.loss])
def test_a_step_equals_the_equations(loss, prediction, monkeypatch):
    torch.manual_seed(0)
    network = Network().double()
    plain = copy.deepcopy(network)
    adapter = Adapter(network, RANK, ALPHA).double()
    for layer in adapter.layers:
        nn.init.normal_(layer.up, std=0.3)
    index = torch.tensor([0, 0, 1, 7, 12, 13, 25, 38, 49])
    z0, noise = torch.randn(2, len(index), 4, 4, 4, dtype=torch.float64)
    c, no_c = torch.randn(2, len(index), 5, 8, dtype=torch.float64)
    cfg = torch.linspace(1, 9, len(index), dtype=torch.float64)[:, None, None, None]

    met = []

    def huber(student, target):  # where the student's answer and its target meet
        met.extend((student, target))
        return pseudo_huber(student, target)

    monkeypatch.setattr(lcm, "pseudo_huber", huber)
    monkeypatch.setattr(phased, "pseudo_huber", huber)
    our_loss = a_step(
        loss, network, adapter, Schedule(ACP, prediction), z0, noise, index,
        {"context": c}, {"context": no_c}, cfg,
    )  # fmt: skip
    our_loss.backward()

    factors = {
        f"{name}.weight": (up.clone().requires_grad_(), down.clone().requires_grad_())
        for name, up, down in adapter.tensors()
    }
    assert len(factors) == 6
    is_phased = loss is phased.loss
    expected = reference(plain, factors, prediction, is_phased, z0, noise, index, c, no_c, cfg)
    expected[2].backward()

    pairs = [*zip((*met, our_loss), expected, strict=True)]
    for layer, (up, down) in zip(adapter.layers, factors.values(), strict=True):
        pairs += [(layer.up.grad, up.grad), (layer.down.grad, down.grad)]
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_a_step_on_a_flow_model_equals_the_equations():
    """LCM on the line x = (1 - sigma) x0 + sigma eps, for a network whose answer is a velocity."""
    torch.manual_seed(0)
    velocity = Network().double()
    plain = copy.deepcopy(velocity)
    adapter = Adapter(velocity, RANK, ALPHA).double()
    for layer in adapter.layers:
        nn.init.normal_(layer.up, std=0.3)
    times = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    sigmas = 3 * times / (1 + 2 * times)

    def at(t):
        return sigmas[t][:, None, None, None]

    def network(z, t, context):  # as ComfyUI's apply_model answers
        return z - at(t) * velocity(z, t, context)

    index = torch.tensor([0, 0, 1, 7, 12, 13, 25, 38, 49])
    z0, noise = torch.randn(2, len(index), 4, 4, 4, dtype=torch.float64)
    c, no_c = torch.randn(2, len(index), 5, 8, dtype=torch.float64)
    cfg = torch.linspace(1, 9, len(index), dtype=torch.float64)[:, None, None, None]
    loss = a_step(
        lcm.loss, network, adapter, Line(sigmas), z0, noise, index, {"context": c},
        {"context": no_c}, cfg,
    )  # fmt: skip
    loss.backward()

    factors = {
        f"{name}.weight": (up.clone().requires_grad_(), down.clone().requires_grad_())
        for name, up, down in adapter.tensors()
    }
    merged = {
        name: plain.get_parameter(name)
        + torch.einsum("or,r...->o...", up.flatten(1), down) * ALPHA / RANK
        for name, (up, down) in factors.items()
    }

    def v(z, t, context, weights):
        return functional_call(plain, weights, (z, t, context))

    t = 20 * index + 19
    s = torch.where(t == 19, 0, t - 20)
    x_t = (1 - at(t)) * z0 + at(t) * noise
    with torch.no_grad():
        uncond = v(x_t, t, no_c, {})
        guided = uncond + cfg * (v(x_t, t, c, {}) - uncond)
        x_s = x_t + (at(s) - at(t)) * guided
        target = x_s - at(s) * v(x_s, s, c, merged)
    error = v(x_t, t, c, merged) - (x_t - target) / at(
        t
    )  # of the velocity that leads to the target
    expected = ((error**2 + 0.001**2).sqrt() - 0.001).mean()
    expected.backward()
    pairs = [(loss, expected)]
    for layer, (up, down) in zip(adapter.layers, factors.values(), strict=True):
        pairs += [(layer.up.grad, up.grad), (layer.down.grad, down.grad)]
    for ours, theirs in pairs:
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
