"""Sampling inside the real ComfyUI, on a small UNet of its own classes with random weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler, TCDScheduler
from lcm_lora.samplers.families import FAMILIES
from lcm_lora.samplers.noise import picture_seed

pytestmark = pytest.mark.usefixtures("comfy")

UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32,
    "num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1],
    "transformer_depth_output": [1, 1], "transformer_depth_middle": -2, "context_dim": 64,
    "use_spatial_transformer": True, "use_linear_in_transformer": False, "legacy": False,
    "num_heads": 4, "num_head_channels": -1, "use_temporal_attention": False,
    "adm_in_channels": None, "dtype": torch.float32,
}  # fmt: skip
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
SCALE = 0.18215  # of the SD1.5 latent format


def build(prediction: str = "eps", zsnr: bool = False, seed: int = 0, **unet):
    """A ModelPatcher around a random UNet that answers everywhere with numbers of about 1."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15(UNET | unet)
    config.manual_cast_dtype = None
    config.sampling_settings = {"zsnr": zsnr}
    kind = comfy.model_base.ModelType.V_PREDICTION if prediction == "v" else None
    model = comfy.model_base.BaseModel(config, kind or comfy.model_base.ModelType.EPS)
    if config.inpaint_model():
        model.set_inpaint()
    randomise(model.diffusion_model, seed)
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
    if prediction == "x0":
        patcher = core_patch(patcher, "x0")
    return patcher


def randomise(network: torch.nn.Module, seed: int) -> None:
    """Weights with which every layer gives numbers of about 1, where the host leaves them empty."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        if weight.dim() > 1:
            bound = weight[0].numel() ** -0.5
            weight.data = torch.randn(weight.shape, generator=generator) * bound
        else:
            norm = name.endswith("weight")
            weight.data = torch.ones_like(weight) if norm else torch.zeros_like(weight)


def core_patch(model, sampling: str, zsnr: bool = False):
    """The model through the host's own ModelSamplingDiscrete node."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    return ModelSamplingDiscrete().patch(model, sampling, zsnr)[0]


def conditioning(seed: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(1, 77, 64, generator=generator), {}]]


def empty(batch: int = 1) -> dict:
    return {"samples": torch.zeros(batch, 4, 8, 8)}


def picture(batch: int = 1) -> dict:
    return {"samples": torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(3)) * 5}


def ours(
    model, steps=4, seed=11, cfg=1.0, latent=None, denoise=1.0, positive=None, **advanced
) -> dict:
    """LCMKSampler, as the graph calls it."""
    from lcm_lora.nodes.sampling import LCMKSampler

    output = LCMKSampler.execute(
        model, seed, steps, cfg, positive or conditioning(1), conditioning(2), latent or empty(),
        denoise, **advanced,
    )  # fmt: skip
    return output.result[0]


class Calls:
    """What a MODEL's network was asked: sigma, timestep and batch of every call."""

    def __init__(self, model):
        self.model = model.clone()
        self.sigmas: list[float] = []
        self.timesteps: list[float] = []
        self.batches: list[int] = []
        self.model.set_model_unet_function_wrapper(self._call)

    def _call(self, apply_model, args):
        def see(_module, inputs):
            self.timesteps.append(inputs[1][0].item())

        self.sigmas.append(args["timestep"][0].item())
        self.batches.append(len(args["input"]))
        hook = self.model.model.diffusion_model.register_forward_pre_hook(see)
        try:
            return apply_model(args["input"], args["timestep"], **args["c"])
        finally:
            hook.remove()


def reference(
    model, prediction: str, steps: int, seed: int, batch: int, cfg: float = 1.0,
    strength: float = 1.0, image: torch.Tensor | None = None, scheduler=None, **options,
) -> torch.Tensor:  # fmt: skip
    """A scheduler of diffusers around the raw UNet, with the noise the host and we draw.

    LCMScheduler by default; another one comes with its timesteps set, and options for its step.
    """
    import comfy.sample

    own = model.get_model_object("model_sampling")
    if scheduler is None:
        scheduler = LCMScheduler(prediction_type=PREDICTIONS[prediction])
        scheduler.set_timesteps(steps, strength=strength)
    scheduler.alphas_cumprod = 1 / (1 + own.sigmas.double() ** 2)
    scheduler.alphas_cumprod[0] = 1.0  # TCD's goes there, and we to the clean picture
    unet = model.model.diffusion_model
    z = comfy.sample.prepare_noise(torch.zeros(batch, 4, 8, 8), seed).double()
    if image is not None:
        z = scheduler.add_noise(image.double() * SCALE, z, scheduler.timesteps[:1])
    if isinstance(scheduler, EulerDiscreteScheduler):  # its scale is the host's
        z = z * (1 + scheduler.sigmas[0] ** 2).sqrt()

    def guided(z, t):
        def call(which):
            context = conditioning(which)[0][0].repeat(batch, 1, 1)
            return unet(z.float(), torch.full((batch,), float(t)), context=context).double()

        cond = call(1)
        return cond if cfg == 1 else call(2) + cfg * (cond - call(2))

    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            generators = [
                torch.Generator().manual_seed(picture_seed(seed, index, i))
                for index in range(batch)
            ]
            output = guided(scheduler.scale_model_input(z, t), t).float()
            z = scheduler.step(
                output, t, z.float(), generator=generators, return_dict=False, **options
            )[0]
    return z / SCALE


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4):
    error = (found.double() - expected).norm() / expected.norm()
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_a_whole_run_equals_diffusers(prediction, steps):
    model = build(prediction)
    expected = reference(model, prediction, steps, seed=11, batch=2)
    assert_same(ours(model, steps, latent=empty(2))["samples"], expected)


TRAILING = {"timestep_spacing": "trailing"}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
AUTHORS = {
    "lcm": (LCMScheduler, {}, {}),
    "dmd2": (LCMScheduler, {}, {}),
    "tcd": (TCDScheduler, {}, {"eta": 0.3}),
    "hyper-sd": (DDIMScheduler, TRAILING | {"clip_sample": False}, {}),
    "hyper-sd-1step": (TCDScheduler, {}, {"eta": 1.0}),
    "pcm": (DDIMScheduler, TRAILING | {"clip_sample": False}, {}),
    "lightning": (EulerDiscreteScheduler, TRAILING | SD, {}),
    "phased": (TCDScheduler, {}, {"eta": 0.0}),
}


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_equals_its_authors(family, steps):
    kind, settings, options = AUTHORS[family]
    scheduler = kind(prediction_type="v_prediction", **settings)
    if family == "dmd2":
        scheduler.set_timesteps(timesteps=FAMILIES["dmd2"].timesteps(steps))
    else:
        scheduler.set_timesteps(steps)
    model = build("v")
    expected = reference(
        model, "v", steps, seed=11, batch=2, scheduler=scheduler, **options
    )  # fmt: skip
    found = ours(patched(model, family), steps, latent=empty(2))
    assert_same(found["samples"], expected)


def test_zero_terminal_snr_is_kept():
    model = build("v", zsnr=True)
    assert model.get_model_object("model_sampling").sigmas[-1] > 4000
    assert_same(ours(model)["samples"], reference(model, "v", 4, seed=11, batch=1))


def test_guidance_equals_diffusers():
    model = build("v")
    expected = reference(model, "v", 4, seed=11, batch=1, cfg=1.8)
    assert_same(ours(model, cfg=1.8)["samples"], expected)


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.5), (2, 0.8), (1, 0.3), (3, 0.99)])
def test_image_to_image_equals_diffusers(steps, strength):
    model = build("v")
    latent = picture()
    expected = reference(
        model, "v", steps, seed=11, batch=1, strength=strength, image=latent["samples"]
    )
    assert_same(ours(model, steps, latent=latent, denoise=strength)["samples"], expected)


def host_ksampler(model, scheduler: str, steps: int = 4, sampler: str = "lcm") -> torch.Tensor:
    import nodes

    run = nodes.KSampler().sample
    return run(
        model, 11, steps, 1.0, sampler, scheduler, conditioning(1), conditioning(2), empty()
    )[0]["samples"]  # fmt: skip


def patched(model, family: str = "lcm"):
    from lcm_lora.nodes.sampling import LCMModelSampling

    return LCMModelSampling.execute(model, family).result[0]


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
    """At every call the network is told the timestep whose noise it is really given."""
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
    whole = torch.arange(1000)
    assert torch.equal(sampling.timestep(table), whole.float())
    assert torch.equal(sampling.sigma(whole), table)
    assert sampling.timestep(torch.tensor([1e-4, 1e4])).tolist() == [0, 999]
    assert sampling.timestep(table[759]).shape == ()
    between = torch.rand(500, generator=torch.Generator().manual_seed(0)) * 999
    torch.testing.assert_close(sampling.timestep(sampling.sigma(between)), between)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_boundary_condition_holds(prediction):
    """At t = 0 the consistency function is the latent itself, whatever the network says."""
    sampling = patched(build(prediction)).get_model_object("model_sampling")
    output, x = torch.randn(2, 2, 4, 8, 8)
    sigma = sampling.sigma(torch.tensor([0, 999]))
    found = sampling.calculate_denoised(sigma, output, x)
    torch.testing.assert_close(found[0], x[0] * (1 + sigma[0] ** 2).rsqrt())
    own = build(prediction).get_model_object("model_sampling")
    torch.testing.assert_close(found[1], own.calculate_denoised(sigma, output, x)[1])


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


def one_by_one(model, latent: dict, steps: int = 4, **settings) -> torch.Tensor:
    """LCMSchedule and LCMSampler in the host's SamplerCustom."""
    from comfy_extras.nodes_custom_sampler import SamplerCustom
    from lcm_lora.nodes.sampling import LCMSampler, LCMSchedule

    sigmas = LCMSchedule.execute(model, steps, 1.0, 50).result[0]
    sampler = LCMSampler.execute(**{"eta": 1.0, "noise_device": "cpu"} | settings).result[0]
    output = SamplerCustom.execute(
        model, True, 11, 1.0, conditioning(1), conditioning(2), sampler, sigmas, latent
    )
    return output.result[0]["samples"]


def test_the_nodes_one_by_one_equal_the_one_node():
    model = patched(build("v"))
    assert torch.equal(one_by_one(model, empty(3)), ours(model, latent=empty(3))["samples"])


@pytest.mark.parametrize(("family", "steps"), [("tcd", 4), ("lightning", 2), ("dmd2", 1)])
def test_the_nodes_follow_the_family(family, steps):
    model = patched(build("v"), family)
    whole = ours(model, steps)["samples"]
    assert torch.equal(one_by_one(model, empty(), steps, family_eta=True), whole)
    # Without it eta is the number of the widget, as in workflows older than families.
    eta = FAMILIES[family].eta
    assert torch.equal(one_by_one(model, empty(), steps, eta=eta), whole)
    # A MODEL of no family is an LCM's.
    plain = build("v")
    assert torch.equal(one_by_one(plain, empty(), family_eta=True), one_by_one(plain, empty()))


def test_eta_of_the_one_node():
    model = patched(build("v"), "tcd")
    wanted = ours(model)["samples"]
    assert torch.equal(ours(model, eta=0.3)["samples"], wanted)
    assert torch.equal(ours(model, eta=0.3, noise_device="gpu")["samples"], wanted)  # both the CPU
    other = ours(model, eta=0.0)["samples"]
    assert torch.equal(other, one_by_one(model, empty(), eta=0.0))
    assert (other - wanted).norm() > 0.01 * wanted.norm()


def test_the_schedule_of_a_family():
    from lcm_lora.nodes.sampling import LCMSchedule

    model = patched(build("v"), "dmd2")
    table = model.get_model_object("model_sampling").table

    def node(*arguments):
        return LCMSchedule.execute(model, *arguments).result[0].tolist()

    assert node(4, 1.0, 50) == [*table[[999, 749, 499, 249]].tolist(), 0.0]
    assert node(4, 0.6, 50) == [*table[[599, 449, 299, 149]].tolist(), 0.0]
    # What the user sets goes before the family.
    assert node(2, 1.0, 10) == [*table[[999, 499]].tolist(), 0.0]
    assert node(4, 1.0, 25) == [*table[[999, 759, 519, 279]].tolist(), 0.0]
    assert node(4, 1.0, 50, "999, 500") == [*table[[999, 500]].tolist(), 0.0]


@pytest.mark.parametrize("family", ["dmd2", "lightning"])
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_simple_is_exact_for_trailing_families_too(family, steps):
    calls = Calls(patched(build("v"), family))
    host_ksampler(calls.model, "simple", steps, "euler")
    assert calls.timesteps == FAMILIES[family].timesteps(steps)


def test_an_empty_latent_starts_with_noise_alone_at_any_timestep():
    """diffusers' way with a list of timesteps, and the only one with the variance 1."""
    from comfy_extras.nodes_custom_sampler import SamplerCustom
    from lcm_lora.nodes.sampling import LCMSampler, LCMSchedule

    model = build("v")
    scheduler = LCMScheduler(prediction_type="v_prediction")
    scheduler.set_timesteps(timesteps=[599, 299])
    expected = reference(model, "v", 2, seed=11, batch=1, scheduler=scheduler)
    sigmas = LCMSchedule.execute(model, 2, 1.0, 50, "599, 299").result[0]
    sampler = LCMSampler.execute(1.0, "cpu").result[0]
    found = SamplerCustom.execute(
        patched(model), True, 11, 1.0, conditioning(1), conditioning(2), sampler, sigmas, empty()
    )
    assert_same(found.result[0]["samples"], expected)


def test_eta_zero_is_the_hosts_ddim():
    """Deterministic re-noising with the predicted noise is Euler in the host's scale."""
    import comfy.sample
    from lcm_lora.nodes.sampling import LCMSampler, LCMSchedule

    model = patched(build("v"))
    sigmas = LCMSchedule.execute(model, 4, 1.0, 50).result[0]
    latent = empty()["samples"]
    noise = comfy.sample.prepare_noise(latent, 11)
    sampler = LCMSampler.execute(0.0, "cpu").result[0]
    found = comfy.sample.sample_custom(
        model, noise, 1.0, sampler, sigmas, conditioning(1), conditioning(2), latent, seed=11
    )
    assert_same(found, host_ksampler(model, "simple", sampler="euler").double(), 1e-5)


def picture_by_picture(model):
    """The MODEL with a network that is asked for one picture at a time."""

    def call(apply_model, args):
        whole = len(args["input"])
        one = [
            {
                "input": args["input"][i : i + 1], "timestep": args["timestep"][i : i + 1],
                "c": {
                    name: value[i : i + 1] if torch.is_tensor(value) and len(value) == whole
                    else value for name, value in args["c"].items()
                },
            }
            for i in range(whole)
        ]  # fmt: skip
        return torch.cat([apply_model(a["input"], a["timestep"], **a["c"]) for a in one])

    model = model.clone()
    model.set_model_unet_function_wrapper(call)
    return model


@pytest.mark.parametrize("family", ["lcm", "tcd", "dmd2"])
def test_a_picture_is_the_same_alone_and_in_a_batch(family):
    """Not one bit differs that we draw or compute; the network's matrix products do, by their size,
    when it is asked for the whole batch."""
    model = patched(build("v"), family)
    single = picture_by_picture(model)
    batch = ours(model, latent=empty(7))["samples"]
    exact = ours(single, latent=empty(7))["samples"]
    for index in (0, 2, 6):
        alone = ours(single, latent={**empty(), "batch_index": [index]})["samples"]
        assert torch.equal(alone, exact[index : index + 1])
        assert_same(alone, batch[index : index + 1].double(), 1e-5)
    assert (batch[0] - batch[1]).norm() > 0.1 * batch[0].norm()


def test_a_picture_is_the_same_after_another_prompt():
    model = build("v")
    first = ours(model, latent=empty(7))["samples"]
    other = ours(model, seed=12, cfg=1.5, latent=empty(2))["samples"]
    assert other.shape[0] == 2
    assert torch.equal(first, ours(model, latent=empty(7))["samples"])


def test_a_picture_of_odd_size_has_its_own_first_noise():
    """Drawn in one piece, normal numbers would depend on the batch when not 16 at a time."""
    model = build("v")
    batch = ours(model, latent={"samples": torch.zeros(3, 4, 7, 9)})["samples"]
    alone = ours(model, latent={"samples": torch.zeros(1, 4, 7, 9), "batch_index": [1]})
    assert_same(alone["samples"], batch[1:2].double(), 1e-5)


def test_cfg_one_is_one_network_call_a_step():
    for cfg, batch in ((1.0, 1), (1.5, 2)):
        calls = Calls(build())
        ours(calls.model, cfg=cfg)
        assert calls.timesteps == [999, 759, 499, 259]
        assert calls.batches == [batch] * 4


def test_a_noise_mask_keeps_what_it_covers():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    latent = {**picture(), "noise_mask": mask}
    for denoise in (1.0, 0.6):
        result = ours(build("v"), latent=latent, denoise=denoise)
        changed = (result["samples"] - latent["samples"]).abs()
        assert changed[..., 4:].max() < 1e-4
        assert changed[..., :4].mean() > 0.1
        assert torch.equal(result["noise_mask"], mask)


def test_inputs_stay_as_they_were():
    model = build("v")
    own = model.get_model_object("model_sampling")
    latent = {**picture(2), "batch_index": [4, 9], "downscale_ratio_spacial": 8}
    before = latent["samples"].clone()
    result = ours(model, latent=latent)
    assert model.get_model_object("model_sampling") is own
    assert torch.equal(latent["samples"], before) and "downscale_ratio_spacial" in latent
    assert result["batch_index"] == [4, 9] and "downscale_ratio_spacial" not in result


def test_the_hosts_own_lcm_patch_is_replaced_by_the_models_schedule():
    """It keeps 50 noise levels and takes v for eps: the model's own ones come back."""
    model = build("v", zsnr=True)
    expected = ours(model)["samples"]
    host_ksampler(core_patch(model, "lcm"), "simple")  # a clone's patch is on the model now
    assert torch.equal(ours(core_patch(model, "lcm"))["samples"], expected)
    assert torch.equal(ours(patched(patched(model)))["samples"], expected)
    # One that only says what the model predicts is followed.
    assert torch.equal(ours(core_patch(build("eps"), "v_prediction", True))["samples"], expected)


@pytest.mark.parametrize("kind", ["ModelSamplingDiscreteFlow", "ModelSamplingContinuousEDM"])
def test_models_without_a_noise_table_are_refused(kind):
    import comfy.sample
    from comfy_extras import nodes_model_advanced as advanced
    from lcm_lora.nodes.sampling import LCMSampler, LCMSchedule

    if kind == "ModelSamplingDiscreteFlow":
        model = advanced.ModelSamplingSD3().patch(build(), 3.0)[0]
    else:
        model = advanced.ModelSamplingContinuousEDM().patch(build(), "edm", 120.0, 0.002)[0]
    sampler = LCMSampler.execute(1.0, "cpu").result[0]
    latent = empty()["samples"]
    for call in (
        lambda: patched(model),
        lambda: ours(model),
        lambda: LCMSchedule.execute(model, 4, 1.0, 50),
        lambda: comfy.sample.sample_custom(
            model, latent + 1, 1.0, sampler, torch.tensor([1.0, 0.5, 0.0]),
            conditioning(1), conditioning(2), latent, seed=1,
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"BaseModel that samples with .*{kind}"):
            call()


def test_numbers_that_do_not_fit():
    from lcm_lora.samplers.host import patch_sampling

    with pytest.raises(ValueError, match="only 5 of the 50"):
        ours(build(), steps=8, denoise=0.1)
    with pytest.raises(ValueError, match="found 0"):
        ours(build(), denoise=0.0)
    with pytest.raises(ValueError, match="'hyper'.*lcm"):
        patch_sampling(build(), "hyper")


def test_an_interruption_leaves_everything_ready():
    import comfy.model_management as management

    model = build("v")
    expected = ours(model)["samples"]
    calls = Calls(model)
    interrupted = calls.model
    inner = calls._call

    def stop_at_the_second(apply_model, args):
        management.interrupt_current_processing(len(calls.sigmas) == 1)
        return inner(apply_model, args)

    interrupted.set_model_unet_function_wrapper(stop_at_the_second)
    with pytest.raises(management.InterruptProcessingException):
        ours(interrupted)
    assert len(calls.sigmas) == 2
    assert torch.equal(ours(model)["samples"], expected)


def test_progress_counts_the_steps():
    import comfy.utils

    seen = []
    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, *_, **__: seen.append((value, total))
    )
    try:
        ours(build(), steps=3)
    finally:
        comfy.utils.set_progress_bar_global_hook(before)
    assert seen[-1] == (3, 3)


def test_the_schemas_load():
    from lcm_lora.nodes import sampling

    for name in ("LCMModelSampling", "LCMSchedule", "LCMSampler", "LCMKSampler"):
        schema = getattr(sampling, name).GET_SCHEMA()
        assert schema.node_id == name and schema.description and schema.search_aliases
        assert all(port.tooltip for port in [*schema.inputs, *schema.outputs])
    ports = sampling.LCMKSampler.GET_SCHEMA().inputs
    ids = [port.id for port in ports]
    assert ids[:8] == ["model", "seed", "steps", "cfg", "positive", "negative", "latent", "denoise"]
    assert ids[8:] == ["eta", "noise_device"]
    assert all(port.advanced and port.optional for port in ports[8:])
