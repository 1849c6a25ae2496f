"""A run on the meta device, where any tensor that was left on the CPU is an error."""

from types import SimpleNamespace

import pytest
import torch
from lcm_lora.samplers.families import FAMILIES
from lcm_lora.samplers.noise import picture_noise
from lcm_lora.tests.host import tiny_flow
from lcm_lora.tests.host.random_unet import build, patched
from torch.overrides import TorchFunctionMode

pytestmark = pytest.mark.usefixtures("comfy")

TABLES = [name for name, family in FAMILIES.items() if family.tables]


@pytest.fixture(autouse=True)
def attention_that_asks_no_device(comfy, monkeypatch):
    """The host's others ask the device for free memory."""
    from comfy.ldm.modules import attention

    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)


class ReadBack(TorchFunctionMode):
    """Lets cpu() read numbers that fall from a meta tensor, which has none, and counts how often
    the device has been waited for. Every other way to read one is an error of the meta device."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cpu and args[0].is_meta:
            self.count += 1
            return torch.arange(len(args[0]) - 1, -1, -1, dtype=torch.float32)
        return function(*args, **kwargs or {})


def model_of(family: str, prediction: str, context: torch.Tensor, unet: torch.nn.Module):
    """What the host gives a sampler: model(x, sigma) -> x0, with the noise schedule inside."""
    sampling = patched(build(prediction), family).get_model_object("model_sampling")

    def model(x, sigma, **_):
        z = sampling.calculate_input(sigma, x)
        output = unet(z, sampling.timestep(sigma).float(), context=context)
        return sampling.calculate_denoised(sigma, output, x)

    network = SimpleNamespace(model_sampling=sampling)
    model.inner_model = SimpleNamespace(inner_model=network)
    return model


def run(family: str, prediction: str, eta: float | None = None, left: str = ""):
    """A run of 4 steps on a batch of 2 as the host calls it; -> (latent, times waited)."""
    from lcm_lora.samplers.host import sample_lcm_exact

    unet = build(prediction).model.diffusion_model.to("meta")
    if left == "weights":
        unet.input_blocks.to_empty(device="cpu")
    context = torch.empty(2, 77, 64, device="cpu" if left == "context" else "meta")
    model = model_of(family, prediction, context, unet)
    x = torch.empty(2, 4, 8, 8, device="meta")
    sigmas = torch.arange(4.0, -1.0, -1.0).to("cpu" if left == "sigmas" else "meta")
    with torch.no_grad(), ReadBack() as read:
        result = sample_lcm_exact(
            model, x, sigmas, {"seed": 1}, disable=True,
            eta=eta, noise_device="cpu", batch_index=None,
        )  # fmt: skip
    return result, read.count


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("family", TABLES)
def test_a_run_leaves_nothing_on_the_cpu(family, prediction):
    """Noise is drawn there and taken along; the sigmas are read once, before the loop."""
    result, waited = run(family, prediction)
    assert result.is_meta and result.shape == (2, 4, 8, 8)
    assert waited == 1


@pytest.mark.parametrize("name", tiny_flow.NETWORKS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_a_run_of_a_flow_model_leaves_nothing_on_the_cpu(name, eta):
    from lcm_lora.samplers.host import sample_lcm_exact

    sampling = patched(tiny_flow.build(name), "flow").get_model_object("model_sampling")

    def model(x, sigma, **_):
        return sampling.calculate_denoised(sigma, x * 0.5, x)

    model.inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling))
    x = torch.empty(tiny_flow.shape(name, 2), device="meta")
    with ReadBack() as read:
        result = sample_lcm_exact(
            model, x, torch.empty(5, device="meta"), {"seed": 1}, disable=True,
            eta=eta, noise_device="cpu", batch_index=None,
        )  # fmt: skip
    assert result.is_meta and result.shape == x.shape
    assert read.count == 1


@pytest.mark.parametrize("left", ["sigmas", "context", "weights"])
def test_a_tensor_left_on_the_cpu_is_noticed(left):
    with pytest.raises((RuntimeError, NotImplementedError), match="meta|device"):
        run("lcm", "eps", left=left)


def test_noise_goes_where_the_latent_is():
    noise = picture_noise(torch.empty(2, 4, 8, 8, device="meta", dtype=torch.float16), 1)(0)
    assert noise.is_meta and noise.dtype == torch.float16


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["lcm", "tcd"])
def test_a_loop_on_a_gpu_never_waits_for_it(family):
    """The second run, because the first copies the tables there. Noise comes from the CPU."""
    from lcm_lora.samplers.lcm import lcm

    unet = build("v").model.diffusion_model.to("cuda")
    model = model_of(family, "v", torch.zeros(2, 77, 64, device="cuda"), unet)
    levels = [14.0, 5.0, 2.0, 0.7, 0.0]
    sigmas = torch.tensor(levels, device="cuda")
    kept = [0.5, 0.5, 0.5, 0.0] if family == "tcd" else None
    x = torch.randn(2, 4, 8, 8, device="cuda") * levels[0]
    for mode in ("default", "error"):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            noise = picture_noise(x, 1)
            result = lcm(model, x, sigmas, noise=noise, kept=kept, levels=levels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert result.isfinite().all()
