"""The phased loss: its segments, its fixed points, and the two ends M = 1 and M = 50."""

import pytest
import torch
from lcm_lora.samplers.families import FAMILIES
from lcm_lora.samplers.timesteps import grid, timesteps
from lcm_lora.tests.unit.toy_network import ACP, Toy, a_step
from lcm_lora.training.adapter import Adapter
from lcm_lora.training.objectives.batch import Batch, edge_below
from lcm_lora.training.objectives.lcm import pseudo_huber
from lcm_lora.training.objectives.phased import edges
from lcm_lora.training.objectives.phased import loss as phased_loss
from lcm_lora.training.objectives.solver import TIMES, Line, Schedule, ddim, predict_guided
from lcm_lora.training.objectives.table import OBJECTIVES
from lcm_lora.training.schema import declared
from lcm_lora.training.spec import Spec
from lcm_lora.training.state.few_steps import few_steps
from torch import nn

INDEX = torch.arange(50)
SD, LINE = Schedule(ACP), Line(torch.linspace(1 / TIMES, 1, TIMES))


@pytest.fixture
def learned():
    """(network, adapter) after some learning: a fresh adapter is zero."""
    adapter = Adapter(network := Toy(), 2)
    for layer in adapter.layers:
        nn.init.normal_(layer.up, std=0.3)
    return network, adapter


def batch():
    """One picture for every point of the grid: (z0, eps, condition, unconditional)."""
    g = torch.Generator().manual_seed(1)
    z0, eps = torch.randn(2, len(INDEX), 4, 4, 4, generator=g)
    context = torch.randn(len(INDEX), 8, generator=g)
    return z0, eps, {"context": context}, {"context": torch.zeros_like(context)}


def test_four_phases():
    four = edges(SD, 4)
    assert four == (0, 259, 499, 759)
    t = torch.tensor([19, 259, 279, 499, 519, 739, 759, 779, 999])
    assert edge_below(t, four).tolist() == [0, 0, 259, 259, 499, 499, 499, 759, 759]


@pytest.mark.parametrize("phases", [1, 2, 3, 4, 6, 8, 50])
def test_a_run_of_as_many_steps_goes_from_edge_to_edge(phases):
    stops = timesteps(phases)
    assert edge_below(torch.tensor(stops), edges(SD, phases)).tolist() == [*stops[1:], 0]


@pytest.mark.parametrize("phases", range(1, 9))
def test_a_run_on_a_flow_model_goes_from_edge_to_edge(phases):
    stops = LINE.run(FAMILIES["phased"], phases)
    assert stops == [840 - i * 840 // phases - 1 for i in range(phases)]
    assert edge_below(torch.tensor(stops), edges(LINE, phases)).tolist() == [*stops[1:], 0]


@pytest.mark.parametrize("phases", [1, 2, 4, 7, 50])
def test_no_solver_step_crosses_an_edge(phases):
    t = torch.tensor(grid())
    edge = edge_below(t, edges(SD, phases))
    assert (edge < t).all() and (edge <= (t - 20).clamp(min=0)).all()
    assert set(edge.tolist()) == set(edges(SD, phases))


@pytest.mark.parametrize("phases", [1, 4, 7])
def test_no_solver_step_of_a_flow_model_crosses_an_edge(phases):
    """It may begin at any timestep, and ends at the edge where it would cross one."""
    z, index = torch.zeros(840, 1, 1, 1), torch.arange(840)
    starts, lower = LINE.starts, edges(LINE, phases)
    steps = Batch(z, z, index, {}, {}, 1.0, starts, LINE.skip, lower)
    assert torch.equal(steps.t, index) and (steps.s[1:] < steps.t[1:]).all()
    assert (steps.s >= edge_below(steps.t, lower)).all()
    assert (steps.t - steps.s).max() == 16 and set(lower) <= set(steps.s.tolist())
    free = Batch(z, z, index, {}, {}, 1.0, starts, LINE.skip)
    assert (free.s != steps.s).sum() == 15 * (phases - 1)


@pytest.mark.parametrize("phases", [0, 51])
def test_phases_must_fit_the_grid(phases):
    with pytest.raises(ValueError, match=f"1 to 50, found {phases}"):
        edges(SD, phases)


@pytest.mark.parametrize("phases", [1, 4, 50])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_loss_of_a_perfect_network_is_zero(prediction, phases):
    z0, eps, cond, uncond = batch()
    schedule = Schedule(ACP, prediction)

    def oracle(z, t, context):
        """Knows z0, and so is right at every t."""
        x0 = z0.repeat(len(z) // len(z0), 1, 1, 1)
        a, s = schedule.alpha(t), schedule.sigma(t)
        noise = (z - a * x0) / s
        return {"eps": noise, "v": a * noise - s * x0, "x0": x0}[prediction]

    adapter = Adapter(Toy(), 2)
    loss = a_step(
        phased_loss, oracle, adapter, schedule, z0, eps, INDEX, cond, uncond, 7.5, phases=phases
    )
    assert loss < 1e-5


def test_the_loss_moves_only_the_adapter_and_only_through_the_student(learned):
    network, adapter = learned
    z0, eps, cond, uncond = batch()
    calls = []
    network.register_forward_hook(lambda *a: calls.append((adapter.on, torch.is_grad_enabled())))
    loss = a_step(phased_loss, network, adapter, Schedule(ACP), z0, eps, INDEX, cond, uncond, 7.5)
    # Teacher: one batched call, adapter off. Target: on, no gradient. Student: on, with gradient.
    assert calls == [(False, False), (True, False), (True, True)]
    loss.backward()
    assert adapter.on
    assert all(p.grad is None for p in network.parameters())
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())


def steps(network, adapter, schedule):
    """(z_t, t, z_s, s): the noised batch and the teacher's solver step from it."""
    z0, eps, cond, uncond = batch()
    t = torch.tensor(grid())[INDEX]
    s = (t - 20).clamp(min=0)
    z_t = schedule.noised(z0, eps, t)
    with torch.no_grad(), adapter.off():
        guided = predict_guided(network, schedule, z_t, t, cond, uncond, 3.0)
        return z_t, t, schedule.noised(*guided, s), s


def gradients(loss, adapter):
    return torch.autograd.grad(loss, list(adapter.parameters()))


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_one_phase_is_the_consistency_model_of_ddim_to_zero(learned, prediction):
    network, adapter = learned
    schedule = Schedule(ACP, prediction)
    z0, eps, cond, uncond = batch()
    z_t, t, z_s, s = steps(network, adapter, schedule)

    def f(z, t):
        a, b = schedule.alpha(t), schedule.sigma(t)
        output = network(z, t, **cond)
        noise = output if prediction == "eps" else a * output + b * z
        return ACP[0].sqrt() * (z - b * noise) / a + (1 - ACP[0]).sqrt() * noise

    expected = pseudo_huber(f(z_t, t), f(z_s, s).detach())
    loss = a_step(
        phased_loss, network, adapter, schedule, z0, eps, INDEX, cond, uncond, 3.0, phases=1
    )
    assert torch.allclose(loss, expected, rtol=1e-5)
    for ours, theirs in zip(gradients(loss, adapter), gradients(expected, adapter), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max())


def test_a_phase_for_every_solver_step_is_the_teacher_itself(learned):
    network, adapter = learned
    schedule = Schedule(ACP)
    z0, eps, cond, uncond = batch()
    z_t, t, z_s, s = steps(network, adapter, schedule)
    student = schedule.noised(*schedule.predict(network, z_t, t, cond), s)
    loss = a_step(
        phased_loss, network, adapter, schedule, z0, eps, INDEX, cond, uncond, 3.0, phases=50
    )
    assert torch.allclose(loss, pseudo_huber(student, z_s), rtol=1e-5)


def test_as_many_steps_as_the_grid_has_points_are_the_teachers_own(learned):
    network, _ = learned
    noise, _, cond, uncond = batch()
    latents = few_steps(network, Schedule(ACP), lambda _: noise, 50, cond, FAMILIES["phased"])
    expected = ddim(network, Schedule(ACP), noise, 50, cond, uncond, 1.0)
    assert torch.allclose(latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name", ["lcm", "phased", "tcd"])
def test_few_steps_are_the_equations_in_vp_scale(learned, prediction, name):
    """LCM's algorithm 3 (arXiv 2310.04378) and TCD's (2402.19159), written out in float64."""
    network, _ = learned
    family, schedule, acp = FAMILIES[name], Schedule(ACP, prediction), ACP.double()
    start, _, cond, _ = batch()
    noise = [start, *torch.randn(3, *start.shape, generator=torch.Generator().manual_seed(2))]
    latents = few_steps(network, schedule, noise.__getitem__, 4, cond, family)
    z, timesteps = start.double(), family.timesteps(4)
    for i, t in enumerate(timesteps):
        a, b = acp[t].sqrt(), (1 - acp[t]).sqrt()
        with torch.no_grad():
            output = network(z.float(), torch.full((len(z),), t), **cond).double()
        x0, eps = (z - b * output) / a, output
        if prediction == "v":
            x0, eps = a * z - b * output, a * output + b * z
        if name == "lcm":
            x0 = 0.25 / ((10 * t) ** 2 + 0.25) * z + 10 * t / ((10 * t) ** 2 + 0.25) ** 0.5 * x0
        if i + 1 == len(timesteps):
            break
        after = timesteps[i + 1]
        s = int((1 - family.eta) * after)
        if name == "lcm":
            z = acp[after].sqrt() * x0 + (1 - acp[after]).sqrt() * noise[i + 1].double()
        else:
            z = acp[s].sqrt() * x0 + (1 - acp[s]).sqrt() * eps
            share = acp[after] / acp[s]
            z = share.sqrt() * z + (1 - share).sqrt() * noise[i + 1].double()
    assert (latents - x0).norm() < 1e-5 * x0.norm()


def test_each_objective_has_a_loss():
    assert tuple(OBJECTIVES) == declared(Spec)["objective"].setting.choices
