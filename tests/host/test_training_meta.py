"""A training step on the meta device, where any tensor that was left on the CPU is an error."""

import pytest
import torch
from lcm_lora.dev.bench.networks import SMALL, host_unet
from lcm_lora.tests.unit.toy_network import a_step
from lcm_lora.training.adapter import Adapter
from lcm_lora.training.objectives import lcm, phased
from lcm_lora.training.objectives.batch import Batch
from lcm_lora.training.objectives.dmd import Draws, Pair
from lcm_lora.training.objectives.solver import Schedule

FAMILIES = {
    "SD1.5": SMALL,
    "SDXL": SMALL | {
        "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 48,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def trainer_s_attention(comfy, monkeypatch):
    """The attention that a job's process selects by a flag; the others ask for free memory."""
    from comfy.ldm.modules import attention

    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)


def step(loss, config, prediction, table_on="meta", cfg_on="meta"):
    """One step's loss of a batch of 2, backward done; -> (loss, adapter)."""
    network = host_unet(config, "meta")
    adapter = Adapter(network, 4, 4.0)
    condition = {"context": torch.empty(2, 77, 32, device="meta")}
    if "num_classes" in config:
        condition["y"] = torch.empty(2, 48, device="meta")

    z0, eps = torch.empty(2, 2, 4, 8, 8, device="meta")
    value = a_step(
        loss, lambda z, t, **condition: network(z, t.float(), **condition), adapter,
        Schedule(torch.empty(1000, device=table_on), prediction), z0, eps,
        torch.empty(2, dtype=torch.int64, device="meta"), condition, condition,
        torch.empty(2, 1, 1, 1, device=cfg_on),
    )  # fmt: skip
    value.backward()
    return value, adapter


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("loss", [lcm.loss, phased.loss])
def test_a_step_leaves_nothing_on_the_cpu(loss, prediction, family):
    value, adapter = step(loss, FAMILIES[family], prediction)
    assert value.is_meta and value.shape == ()
    assert all(p.grad.is_meta for p in adapter.parameters())


@pytest.mark.parametrize("left", ["table_on", "cfg_on"])
@pytest.mark.parametrize("loss", [lcm.loss, phased.loss])
def test_a_tensor_left_on_the_cpu_is_noticed(loss, left):
    with pytest.raises((RuntimeError, NotImplementedError), match="meta|device"):
        step(loss, SMALL, "eps", **{left: "cpu"})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_distribution_matching_leaves_nothing_on_the_cpu(family):
    config = FAMILIES[family]
    network = host_unet(config, "meta")
    adapters = [Adapter(network, 4, 4.0, seed) for seed in (0, 1)]
    adapters[1].on = False
    condition = {"context": torch.empty(2, 77, 32, device="meta")}
    if "num_classes" in config:
        condition["y"] = torch.empty(2, 48, device="meta")
    latents, noise = (
        torch.empty(2, 4, 8, 8, device="meta"),
        torch.empty(2, 4, 4, 8, 8, device="meta"),
    )
    times = torch.empty(2, 2, dtype=torch.int64, device="meta")
    cfg = torch.empty(2, 1, 1, 1, device="meta")
    batch = Batch(latents, latents, times[:, 0], condition, condition, cfg)
    pair = Pair(
        lambda z, t, **condition: network(z, t.float(), **condition),
        Schedule(torch.empty(1000, device="meta")), *adapters,
    )  # fmt: skip
    loss = pair.add_gradients(batch, Draws(noise, noise[:, :2], times), [999, 499], 1.0)
    assert loss.device.type == "meta"
    assert all(p.grad.device.type == "meta" for a in adapters for p in a.parameters())
