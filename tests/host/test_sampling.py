"""Sampling inside the real ComfyUI, on a small UNet of its own classes with random weights."""

from __future__ import annotations

import pytest
import torch
from lcm_lora.samplers.families import FAMILIES
from lcm_lora.tests.host.random_unet import (
    Calls,
    build,
    conditioning,
    core_patch,
    empty,
    host_ksampler,
    one_by_one,
    ours,
    patched,
    picture,
)
from lcm_lora.tests.host.reference import assert_same

pytestmark = pytest.mark.usefixtures("comfy")


def test_the_nodes_one_by_one_equal_the_one_node():
    model = patched(build("v"))
    assert torch.equal(one_by_one(model, empty(3)), ours(model, latent=empty(3))["samples"])


@pytest.mark.parametrize(("family", "steps"), [("tcd", 4), ("lightning", 2), ("dmd2", 1)])
def test_the_nodes_follow_the_family(family, steps):
    model = patched(build("v"), family)
    expected = ours(model, steps)["samples"]
    assert torch.equal(one_by_one(model, empty(), steps, family_eta=True), expected)
    # Without it eta is the number of the widget, as in workflows older than families.
    eta = FAMILIES[family].eta
    assert torch.equal(one_by_one(model, empty(), steps, eta=eta), expected)
    # A MODEL without a family is treated as an LCM's.
    plain = build("v")
    assert torch.equal(one_by_one(plain, empty(), family_eta=True), one_by_one(plain, empty()))


def test_the_one_node_says_what_it_did():
    from lcm_lora.nodes.sampling import LCMKSampler

    def told(cfg):
        output = LCMKSampler.execute(
            patched(build("v")), 11, 2, cfg, conditioning(1), conditioning(2), empty(), 1.0
        )
        lines = output.ui["lcm_lora_text"]
        return [(text.format(**values), warning) for text, values, warning in lines]

    lora, run = told(1.0)
    assert run == ("lcm, 2 steps: 999 499; cfg 1, negative prompt unused", False)
    assert lora[0].startswith("No acceleration LoRA on the MODEL") and lora[1]
    assert told(7.0)[1:] == [
        ("cfg 7 burns the colours: use 1 to 2.", True),
        ("lcm, 2 steps: 999 499; cfg 7", False),
    ]


def test_eta_of_the_one_node():
    model = patched(build("v"), "tcd")
    expected = ours(model)["samples"]
    assert torch.equal(ours(model, eta=0.3)["samples"], expected)
    same = ours(model, eta=0.3, noise_device="gpu")["samples"]  # here both devices are the CPU
    assert torch.equal(same, expected)
    other = ours(model, eta=0.0)["samples"]
    assert torch.equal(other, one_by_one(model, empty(), eta=0.0))
    assert (other - expected).norm() > 0.01 * expected.norm()


def test_eta_zero_is_the_hosts_ddim():
    """Deterministic re-noising with the predicted noise is Euler in the host's scale."""
    import comfy.sample
    from lcm_lora.nodes.sampling import LCMSampler, LCMSchedule

    model = patched(build("v"))
    sigmas = LCMSchedule.execute(model, 4, 1.0, 50).result[0]
    latent = empty()["samples"]
    noise = comfy.sample.prepare_noise(latent, 11)
    sampler = LCMSampler.execute(0.0, "cpu").result[0]
    actual = comfy.sample.sample_custom(
        model, noise, 1.0, sampler, sigmas, conditioning(1), conditioning(2), latent, seed=11
    )
    assert_same(actual, host_ksampler(model, "simple", sampler="euler").double(), 1e-5)


def picture_by_picture(model):
    """The MODEL with a network that is asked for one picture at a time."""

    def call(apply_model, args):
        count = len(args["input"])
        one = [
            {
                "input": args["input"][i : i + 1], "timestep": args["timestep"][i : i + 1],
                "c": {
                    name: value[i : i + 1] if torch.is_tensor(value) and len(value) == count
                    else value for name, value in args["c"].items()
                },
            }
            for i in range(count)
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


def test_an_empty_picture_is_the_same_beside_one_that_is_not():
    """DMD2's single step makes a picture from noise alone, or from an existing picture."""
    model = picture_by_picture(patched(build("v"), "dmd2"))
    mixed = {"samples": torch.cat([empty()["samples"], picture()["samples"]])}
    batch = ours(model, 1, latent=mixed)["samples"]
    for index, latent in enumerate((empty(), picture())):
        alone = ours(model, 1, latent={**latent, "batch_index": [index]})["samples"]
        assert torch.equal(alone, batch[index : index + 1])


def test_a_picture_is_the_same_after_another_prompt():
    model = build("v")
    first = ours(model, latent=empty(7))["samples"]
    other = ours(model, seed=12, cfg=1.5, latent=empty(2))["samples"]
    assert other.shape[0] == 2
    assert torch.equal(first, ours(model, latent=empty(7))["samples"])


def test_a_picture_of_odd_size_has_its_own_first_noise():
    """Normal numbers drawn in one call would depend on the batch, unless in groups of 16."""
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


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_a_mask_of_any_numbers_is_that_of_floating_point(kind):
    mask = torch.zeros(1, 32, 32)
    mask[..., :17] = 1
    right, found = (
        ours(build("v"), latent={**picture(), "noise_mask": one})["samples"]
        for one in (mask, mask.to(kind))
    )
    assert torch.equal(found, right) and right.isfinite().all()


def sampled(sampler, sigmas: torch.Tensor, latent: dict) -> torch.Tensor:
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    arguments = patched(build("v")), True, 11, 1.0, conditioning(1), conditioning(2)
    return SamplerCustom.execute(*arguments, sampler, sigmas, latent).result[0]["samples"]


def test_sigmas_that_are_whole_numbers_are_those_of_floating_point():
    from lcm_lora.nodes.sampling import LCMSampler

    sampler, sigmas = LCMSampler.execute(0.3, "cpu").result[0], torch.tensor([14, 7, 3, 0])
    for latent in (empty(), picture()):
        right = sampled(sampler, sigmas.float(), latent)
        assert torch.equal(sampled(sampler, sigmas, latent), right) and right.isfinite().all()


@pytest.mark.parametrize("sigmas", [[0.0], []])
def test_the_end_of_a_split_schedule_changes_nothing(sigmas):
    """As with the host's Euler."""
    from comfy.samplers import sampler_object
    from lcm_lora.nodes.sampling import LCMSampler

    for latent in (empty(), picture()):
        theirs, found = (
            sampled(sampler, torch.tensor(sigmas), latent)
            for sampler in (sampler_object("euler"), LCMSampler.execute(1.0, "cpu").result[0])
        )
        assert torch.equal(found, theirs)
        torch.testing.assert_close(found, latent["samples"])  # the host scales it there and back


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
    # A patch that only says what the model predicts is followed.
    assert torch.equal(ours(core_patch(build("eps"), "v_prediction", True))["samples"], expected)


def test_zero_terminal_snr_set_with_the_hosts_own_lcm_patch_is_kept():
    model = build("v")
    own = model.get_model_object("model_sampling")
    before = own.sigmas.clone()
    by_hand = core_patch(model, "lcm", True)
    equivalent = build("v", zsnr=True)
    torch.testing.assert_close(
        patched(by_hand).get_model_object("model_sampling").table,
        equivalent.get_model_object("model_sampling").sigmas, rtol=1e-4, atol=0,
    )  # fmt: skip
    assert_same(ours(by_hand)["samples"], ours(equivalent)["samples"].double(), 1e-4)
    assert model.get_model_object("model_sampling") is own
    assert torch.equal(own.sigmas, before) and not own.zsnr


def test_models_of_another_process_are_refused():
    import comfy.sample
    from comfy_extras import nodes_model_advanced as advanced
    from lcm_lora.nodes.sampling import LCMSampler, LCMSchedule

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
        with pytest.raises(ValueError, match="BaseModel, which samples with .*ContinuousEDM"):
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


@pytest.mark.gpu
def test_a_gpu_draws_the_picture_of_the_cpu():
    """Also where the host moves the model to the device and back between two runs. Its convolutions
    may use TF32."""
    import comfy.model_management as management

    expected = ours(patched(build("v")), latent=empty(2))["samples"]
    # Compared with the host's own device; "cuda" alone is not equal to "cuda:0".
    model = patched(build("v", device=str(management.get_torch_device())))
    for _ in range(2):
        actual = ours(model, latent=empty(2))["samples"].cpu()
        assert (actual - expected).norm() < 3e-2 * expected.norm()
        assert next(model.model.parameters()).device.type == "cuda"
        management.unload_all_models()
        assert next(model.model.parameters()).device.type == "cpu"


@pytest.mark.gpu
def test_a_picture_alone_and_in_a_batch_on_a_gpu_in_float16(toy_checkpoint):
    """Kernels for another size may add up in another order, so bits may differ."""
    import comfy.sd
    from lcm_lora.samplers import host

    model = comfy.sd.load_checkpoint_guess_config(
        str(toy_checkpoint), model_options={"dtype": torch.float16}
    )[0]
    generator = torch.Generator().manual_seed(1)
    prompt = [[torch.randn(1, 77, 768, generator=generator), {}]]
    run = host.Run(seed=11)
    batch = host.sample(model, run, prompt, prompt, empty(4))["samples"].cpu().float()
    third = {**empty(1), "batch_index": [2]}
    alone = host.sample(model, run, prompt, prompt, third)["samples"].cpu().float()
    assert (alone[0] - batch[2]).norm() < 2e-2 * batch[2].norm()
    assert (alone[0] - batch[1]).norm() > 0.1 * batch[2].norm()
