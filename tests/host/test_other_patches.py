"""Patches of the host and of other packs on a MODEL, before and after ours, and the toy's decoder
and text encoder around it."""

from __future__ import annotations

import pytest
import torch
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
)
from lcm_lora.tests.host.reference import assert_same

pytestmark = pytest.mark.usefixtures("comfy")

# Two levels, as FreeU scales the blocks that have twice or four times the first one's channels.
TWO_LEVELS = {
    "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1],
    "transformer_depth_output": [1] * 4, "transformer_depth_middle": 1,
}  # fmt: skip


def freeu(model):
    from comfy_extras.nodes_freelunch import FreeU_V2

    return FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2).result[0]


def perp_neg(model):
    from comfy_extras.nodes_perpneg import PerpNeg

    return PerpNeg.execute(model, conditioning(3), 1.0).result[0]


def rescale_cfg(model):
    from comfy_extras.nodes_model_advanced import RescaleCFG

    return RescaleCFG().patch(model, 0.7)[0]


def perturbed_attention(model):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return PerturbedAttentionGuidance.execute(model, 3.0).result[0]


def unet_wrapper(model):
    model = model.clone()
    model.set_model_unet_function_wrapper(
        lambda apply_model, args: apply_model(args["input"], args["timestep"], **args["c"]) * 0.9
    )
    return model


def cfg_function(model):
    model = model.clone()
    model.set_model_sampler_cfg_function(lambda args: args["cond"] + 0.3 * args["uncond"])
    return model


def post_cfg_function(model):
    model = model.clone()
    model.set_model_sampler_post_cfg_function(lambda args: args["denoised"].clamp(-0.5, 0.5))
    return model


def attention_patch(model):
    model = model.clone()
    model.set_model_attn2_patch(lambda q, k, v, _options: (q, k, v * 1.5))
    return model


def network_wrapper(model):
    from comfy.patcher_extension import WrappersMP

    model = model.clone()
    model.add_wrapper(
        WrappersMP.DIFFUSION_MODEL, lambda executor, *args, **named: executor(*args, **named) * 0.9
    )
    return model


@pytest.mark.parametrize(
    "patch",
    [
        freeu, perp_neg, rescale_cfg, perturbed_attention, unet_wrapper, cfg_function,
        post_cfg_function, attention_patch, network_wrapper,
    ],
)  # fmt: skip
def test_a_patch_works_before_and_after_ours(patch):
    model = build("v", **TWO_LEVELS)
    plain = ours(patched(model), cfg=1.6)["samples"]
    before = ours(patched(patch(model)), cfg=1.6)["samples"]
    after = ours(patch(patched(model)), cfg=1.6)["samples"]
    assert torch.equal(before, after)
    assert (after - plain).norm() > 0.01 * plain.norm()
    assert torch.equal(ours(patched(model), cfg=1.6)["samples"], plain)
    assert torch.equal(one_by_one(patch(patched(model)), empty()), ours(patch(model))["samples"])


def test_a_sampling_object_set_after_ours_is_what_counts():
    """The host's node puts its own in our place: another schedule and another prediction."""
    model = build("eps")
    alone = core_patch(model, "v_prediction", zsnr=True)
    later = core_patch(patched(model), "v_prediction", zsnr=True)
    for run in (
        lambda model: host_ksampler(model, "simple"),
        lambda model: one_by_one(model, empty()),
        lambda model: ours(model)["samples"],
    ):
        drawn = run(later)
        assert torch.equal(drawn, run(alone))
        assert (drawn - run(patched(model))).norm() > 0.01 * drawn.norm()
    calls = Calls(later)
    one_by_one(calls.model, empty())
    assert calls.timesteps == [999, 759, 499, 259]  # of the new schedule
    assert calls.sigmas[0] == later.get_model_object("model_sampling").sigmas[-1] > 4000


def merged(first, second, ratio: float = 0.25):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    return ModelMergeSimple().merge(first, second, ratio)[0]


def mean_of(first, second, ratio: float = 0.25):
    """The model that a merge of the two should be, with its weights written by hand."""
    model = build("v")
    with torch.no_grad():
        for weight, a, b in zip(
            *(m.model.diffusion_model.parameters() for m in (model, first, second)), strict=True
        ):
            weight.copy_(ratio * a + (1 - ratio) * b)
    return model


def test_a_merge_keeps_the_sampling_of_its_first_model():
    """As with every patch of a MODEL; weights are merged whichever side ours is on."""
    from lcm_lora.samplers.process.host import LCMSampling

    first, second = build("v", seed=0), build("v", seed=1)
    by_hand = mean_of(first, second)
    for family in ("lcm", "dmd2"):
        left = merged(patched(first, family), second)
        assert left.get_model_object("model_sampling").family.name == family
        assert_same(ours(left)["samples"], ours(patched(by_hand, family))["samples"].double(), 1e-5)
    right = merged(first, patched(second))
    assert not isinstance(right.get_model_object("model_sampling"), LCMSampling)
    expected = host_ksampler(by_hand, "simple", sampler="euler")
    assert_same(host_ksampler(right, "simple", sampler="euler"), expected.double(), 1e-5)
    # Our sampler sets it where there is none.
    assert_same(ours(right)["samples"], ours(by_hand)["samples"].double(), 1e-5)


def test_a_merge_of_merges_is_sampled_as_its_first_model():
    first, second = build("v", seed=0), build("v", seed=1)
    both = merged(merged(patched(first), second, 1.0), patched(second, "dmd2"))
    expected = ours(patched(mean_of(first, second)))["samples"]
    assert_same(ours(both)["samples"], expected.double(), 1e-5)


def test_a_compiled_model_draws_the_same():
    """With dynamo's own backend: others need a compiler that not every machine has."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel
    from torch._dynamo.utils import counters

    def compiled(model):
        return TorchCompileModel.execute(model, "eager").result[0]

    # Without attention, which takes ten seconds to trace.
    model = build("v", transformer_depth=[0], transformer_depth_output=[0, 0])
    expected = ours(model, 2)["samples"].double()
    counters.clear()
    for fast in (patched(compiled(model)), compiled(patched(model))):
        assert_same(ours(fast, 2)["samples"], expected, 1e-5)
    assert counters["frames"]["ok"] > 0
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def toy(toy_checkpoint):
    """The toy as the host's checkpoint loader gives it: MODEL, CLIP, VAE."""
    import comfy.sd

    return comfy.sd.load_checkpoint_guess_config(str(toy_checkpoint))[:3]


def test_clip_skip_before_and_after_a_vector_is_applied(comfy, toy):
    from lcm_lora.dev.toy import assemble
    from lcm_lora.lora.formats.files import read
    from lcm_lora.lora.formats.wire import to_wire
    from lcm_lora.nodes.vectors import LCMLoRAApply

    from nodes import CLIPSetLastLayer, CLIPTextEncode

    model, clip, _ = toy
    vector = to_wire(read(assemble.lora(assemble.LCM_LORA)))

    def text(clip):
        return CLIPTextEncode().encode(clip, "a photo of a bag")[0]

    def skip(clip):
        return CLIPSetLastLayer().set_last_layer(clip, -2)[0]

    def applied(clip):
        return LCMLoRAApply.execute(model, vector, 1.0, 1.0, clip).result

    fast = patched(applied(clip)[0])
    plain = ours(fast, positive=text(applied(clip)[1]))["samples"]
    before = ours(fast, positive=text(applied(skip(clip))[1]))["samples"]
    after = ours(fast, positive=text(skip(applied(clip)[1])))["samples"]
    assert torch.equal(before, after)
    assert (after - plain).norm() > 0.01 * plain.norm()


def test_tiled_decoding_of_our_latent(toy):
    from nodes import CLIPTextEncode, VAEDecode, VAEDecodeTiled

    model, clip, vae = toy
    positive = CLIPTextEncode().encode(clip, "a photo of a bag")[0]
    latent = ours(model, 1, latent={"samples": torch.zeros(1, 4, 16, 16)}, positive=positive)
    at_once = VAEDecode().decode(vae, latent)[0]
    tiled = VAEDecodeTiled().decode(vae, latent, 64, 32)[0]
    assert tiled.shape == at_once.shape == (1, 128, 128, 3)
    assert (tiled - at_once).abs().mean() < 0.02
