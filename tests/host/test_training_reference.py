"""One training step, and the names it trains, against diffusers and peft in the official recipe."""

import pytest
import torch
from lcm_lora.dev.bench.networks import (
    ARCHITECTURES,
    DIFFUSERS,
    RECIPE,
    SMALL,
    SMALL_DIFFUSERS,
    host_unet,
)  # fmt: skip
from torch import nn

diffusers = pytest.importorskip("diffusers", reason="diffusers is a developer's package")
peft = pytest.importorskip("peft", reason="peft is a developer's package")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def recipe():
    return peft.LoraConfig(r=4, lora_alpha=4, **RECIPE)


def lora_layers(unet):
    """Module name -> peft's layer there."""
    return {name: m for name, m in unet.named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_names_are_those_of_diffusers_and_peft(comfy, family):
    from lcm_lora.training.adapter import Adapter
    from lcm_lora.training.export import vector

    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**DIFFUSERS[family])
        theirs.add_adapter(recipe())
    adapter = Adapter(host_unet(ARCHITECTURES[family], "meta"), 4, 4.0)
    adapter.layers.to_empty(device="cpu")
    ours = vector(adapter.state(), adapter.alpha, {}, family).deltas
    expected = {"lora_unet_" + name.replace(".", "_"): m for name, m in lora_layers(theirs).items()}
    assert ours.keys() == expected.keys()
    for name, layer in expected.items():
        assert ours[name].up.shape == layer.lora_B["default"].weight.shape
        assert ours[name].down.shape == layer.lora_A["default"].weight.shape


class Reference:
    """The step of the released script, one picture at a time, from the libraries' own parts."""

    def __init__(self, unet, prediction):
        self.unet = unet
        self.solver = diffusers.DDIMScheduler(
            **BETAS, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False,
            timestep_spacing="trailing",
        )  # fmt: skip
        self.solver.set_timesteps(50)
        self.solver.alphas_cumprod = self.solver.alphas_cumprod.double()
        self.solver.final_alpha_cumprod = self.solver.alphas_cumprod[0]
        self.boundary = diffusers.LCMScheduler(**BETAS)

    def f(self, z, t, c):
        x0 = self.solver.step(self.unet(z, t, c).sample, t, z).pred_original_sample
        c_skip, c_out = self.boundary.get_scalings_for_boundary_condition_discrete(t)
        return c_skip * z + c_out * x0

    def pair(self, z0, eps, t, c, no_c, cfg):
        """(student, target) at t."""
        z_t = self.solver.add_noise(z0, eps, t)
        with torch.no_grad():
            self.unet.disable_adapters()
            output, output_u = self.unet(z_t, t, c).sample, self.unet(z_t, t, no_c).sample
            guided = output + (cfg - 1) * (output - output_u)
            z_s = self.solver.step(guided, t, z_t).prev_sample
            self.unet.enable_adapters()
            target = self.f(z_s, (t - 20).clamp(min=0), c)
        return self.f(z_t, t, c), target


def twins(comfy_utils):
    """(network, adapter, unet, [(our factor, peft's factor)]): equal weights, equal LoRA.

    All in float64: near a difference of 0 the loss's slope multiplies rounding by 1 / c = 1000.
    """
    from lcm_lora.training.adapter import Adapter

    network = host_unet(SMALL, "cpu")
    unet = diffusers.UNet2DConditionModel(**SMALL_DIFFUSERS)
    our_name, state = comfy_utils.unet_to_diffusers(SMALL), network.state_dict()
    unet.load_state_dict({name: state[our_name[name]] for name in unet.state_dict()})
    unet.add_adapter(recipe())
    adapter = Adapter(network, 4, 4.0)
    layers = {f"{n}.weight": low for n, low in zip(adapter.names, adapter.layers, strict=True)}
    pairs = []
    for name, layer in lora_layers(unet).items():
        low = layers.pop(our_name[f"{name}.weight"])
        pairs += [(low.up, layer.lora_B["default"].weight)]
        pairs += [(low.down, layer.lora_A["default"].weight)]
    assert not layers
    generator = torch.Generator().manual_seed(1)
    for ours, theirs in pairs:
        nn.init.normal_(ours, std=0.1, generator=generator)
        theirs.data.copy_(ours.data)
    for module in (network, adapter, unet):
        module.double()
    return network, adapter, unet, pairs


@pytest.mark.parametrize("ours, theirs", [("eps", "epsilon"), ("v", "v_prediction")])
def test_a_step_equals_diffusers_and_peft(comfy, ours, theirs):
    import comfy.utils
    from lcm_lora.tests.unit.toy_network import a_step
    from lcm_lora.training.objectives import lcm
    from lcm_lora.training.objectives.solver import Schedule

    network, adapter, unet, pairs = twins(comfy.utils)
    reference = Reference(unet, theirs)
    generator = torch.Generator().manual_seed(2)
    index = torch.tensor([0, 3, 24, 49])
    z0, eps = torch.randn(2, 4, 4, 8, 8, generator=generator, dtype=torch.float64)
    c, no_c = torch.randn(2, 4, 7, 32, generator=generator, dtype=torch.float64)

    pictures = zip(*(x.split(1) for x in (z0, eps, 20 * index + 19, c, no_c)), strict=True)
    met = [reference.pair(*picture, cfg=7.5) for picture in pictures]
    student, target = (torch.cat(side) for side in zip(*met, strict=True))
    expected = (((student - target) ** 2 + 0.001**2).sqrt() - 0.001).mean()
    expected.backward()

    loss = a_step(
        lcm.loss, lambda z, t, context: network(z, t.float(), context), adapter,
        Schedule(reference.solver.alphas_cumprod, ours), z0, eps, index,
        {"context": c}, {"context": no_c}, 7.5,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for mine, peft_s in pairs:
        assert (mine.grad - peft_s.grad).abs().max() <= 1e-4 * peft_s.grad.abs().max()
