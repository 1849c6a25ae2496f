"""What else a graph has between a model and a picture, with our SAMPLER, SIGMAS and MODEL."""

from __future__ import annotations

import pytest
import torch
from lcm_lora.tests.host.random_unet import (
    UNET,
    Calls,
    build,
    conditioning,
    empty,
    ours,
    patched,
    picture,
    randomise,
)
from lcm_lora.tests.host.reference import SCALE, assert_same, reference

pytestmark = pytest.mark.usefixtures("comfy")
LEFT = torch.cat([torch.ones(1, 64, 64), torch.zeros(1, 64, 64)], -1)  # 128 pixels wide


class GivenNoise:
    """A NOISE that returns given numbers, so that a piece of a picture can be drawn alone."""

    seed = 11

    def __init__(self, noise: torch.Tensor):
        self.generate_noise = lambda latent: noise


def advanced(model, positive, latent, steps=4, strength=1.0, cfg=None, noise=None, sampler=None):
    """SamplerCustomAdvanced with our SIGMAS and SAMPLER; without cfg by a BasicGuider."""
    from comfy_extras import nodes_custom_sampler as host
    from lcm_lora.nodes.sampling import LCMSampler, LCMSchedule

    if cfg is None:
        guider = host.BasicGuider.execute(model, positive).result[0]
    else:
        guider = host.CFGGuider.execute(model, positive, conditioning(2), cfg).result[0]
    noise = noise or host.RandomNoise.execute(11).result[0]
    sampler = sampler or LCMSampler.execute(1.0, "cpu").result[0]
    sigmas = LCMSchedule.execute(model, steps, strength, 50).result[0]
    run = host.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent)
    return run.result[0]["samples"]


@pytest.mark.parametrize("cfg", [None, 1.6])
@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_the_advanced_sampler_equals_the_one_node(cfg, denoise):
    model = patched(build("v"))
    latent = picture(2)
    expected = ours(model, latent=latent, denoise=denoise, cfg=cfg or 1.0)["samples"]
    actual = advanced(model, conditioning(1), latent, strength=denoise, cfg=cfg)
    assert torch.equal(actual, expected)


def test_an_inpaint_model_equals_diffusers():
    """Its network has 9 channels: it also gets the mask and the picture without the hole."""
    import node_helpers

    model = build("v", in_channels=9)
    original = picture()["samples"]
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :24] = 1
    values = {"concat_latent_image": original, "concat_mask": mask}
    seen = []

    def concatenate(_module, inputs):
        z, *rest = inputs
        if z.shape[1] == 4:
            small = mask[:, None, ::8, ::8]
            z = torch.cat([z, small, original * SCALE], 1)
        seen.append(z[:, 4:])
        return z, *rest

    handle = model.model.diffusion_model.register_forward_pre_hook(concatenate)
    expected = reference(model, "v", 4, seed=11, batch=1)
    of_diffusers, seen = seen, []
    positive = node_helpers.conditioning_set_values(conditioning(1), values)
    actual = ours(model, positive=positive)["samples"]
    handle.remove()
    assert_same(actual, expected)
    assert len(seen) == 4
    for ours_is, theirs in zip(seen, of_diffusers, strict=True):
        torch.testing.assert_close(ours_is, theirs)
    # The host fills both in from the noise mask where the graph has only that.
    latent = {**picture(), "noise_mask": mask[:, None]}
    masked = ours(model, latent=latent)["samples"]
    assert (masked - latent["samples"])[..., 3:].abs().max() < 1e-4
    assert (masked - latent["samples"])[..., :3].abs().mean() > 0.1


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_what_a_mask_leaves_out_stays_with_any_eta(eta):
    mask = (LEFT[:, :, 32:96] > 0).float()[:, None]
    latent = {**picture(), "noise_mask": mask}
    result = ours(build("v"), latent=latent, eta=eta)["samples"]
    changed = (result - latent["samples"]).abs()
    assert changed[..., 4:].max() < 1e-4 and changed[..., :4].mean() > 0.1


def test_differential_diffusion_holds_grey_longer():
    """The host's node reads timesteps from our sampling: a grey pixel is free in the last steps."""
    from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion

    model = patched(build("v"))
    soft = DifferentialDiffusion.execute(model).result[0]
    hard = torch.zeros(1, 1, 64, 64)
    hard[..., :32] = 1
    binary = {**picture(), "noise_mask": hard}
    assert torch.equal(ours(soft, latent=binary)["samples"], ours(model, latent=binary)["samples"])
    free = []
    for grey in (0.1, 0.4, 0.6, 0.9):  # thresholds of 4 steps: 1, 0.76, 0.49, 0.24
        result = ours(soft, latent={**picture(), "noise_mask": torch.full_like(hard, grey)})
        free.append((result["samples"] - picture()["samples"]).abs().mean().item())
    assert free[0] < 1e-4 and free == sorted(free) and free[1] > 0.1


def control_net():
    """A random ControlNet of the small UNet's shape, in the host's own classes; -> (it, its calls'
    timesteps)."""
    import comfy.cldm.cldm
    import comfy.controlnet

    shape = {key: value for key, value in UNET.items() if key != "out_channels"}
    network = comfy.cldm.cldm.ControlNet(**shape, hint_channels=3)
    randomise(network, 5)
    seen: list[float] = []
    network.register_forward_pre_hook(
        lambda _module, _inputs, named: seen.append(named["timesteps"][0].item()), with_kwargs=True
    )
    cpu = torch.device("cpu")
    return comfy.controlnet.ControlNet(network, load_device=cpu), seen


def controlled(control, strength: float, start: float = 0.0, end: float = 1.0):
    from nodes import ControlNetApplyAdvanced

    hint = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(4))
    return ControlNetApplyAdvanced().apply_controlnet(
        conditioning(1), conditioning(2), control, hint, strength, start, end
    )[0], hint


def test_a_control_net_equals_diffusers():
    """LCMScheduler's loop, with the ControlNet's outputs added by hand at the same timesteps."""
    model = build("v")
    control, seen = control_net()
    positive, hint = controlled(control, 0.5)
    plain = ours(model)["samples"]
    steered = ours(model, positive=positive)["samples"]
    assert seen == [999, 759, 499, 259]
    assert (steered - plain).norm() > 0.05 * plain.norm()

    def add(_module, inputs, named):
        z, t, *_ = inputs
        answer = control.control_model(
            x=z, hint=hint.movedim(-1, 1), timesteps=t, context=named["context"]
        )
        merger = control.copy().set_cond_hint(hint, 0.5)
        return inputs, {**named, "control": merger.control_merge(answer, None, None)}

    unet = model.model.diffusion_model
    handle = unet.register_forward_pre_hook(add, with_kwargs=True)
    expected = reference(model, "v", 4, seed=11, batch=1)
    handle.remove()
    assert_same(steered, expected)


def test_a_control_nets_strength_and_range():
    model = build("v")
    control, seen = control_net()
    plain = ours(model)["samples"]
    assert torch.equal(ours(model, positive=controlled(control, 0.0)[0])["samples"], plain)
    assert seen == []
    half = ours(model, positive=controlled(control, 1.0, 0.0, 0.4)[0])["samples"]
    assert seen == [999, 759]  # 40 % of the way is timestep 599
    assert (half - plain).norm() > 0.05 * plain.norm()
    # With guidance it works on both conditionings, and leaves nothing behind.
    guided = ours(model, cfg=1.5)["samples"]
    ours(model, cfg=1.5, positive=controlled(control, 1.0)[0])
    assert torch.equal(ours(model, cfg=1.5)["samples"], guided)


def masked_halves(first: list, second: list) -> list:
    from nodes import ConditioningCombine, ConditioningSetMask

    left = ConditioningSetMask().append(first, LEFT, "default", 1.0)[0]
    right = ConditioningSetMask().append(second, 1 - LEFT, "default", 1.0)[0]
    return ConditioningCombine().combine(left, right)[0]


def wide() -> dict:
    return {"samples": torch.zeros(1, 4, 8, 16)}


def test_masked_regions_have_their_own_prompt():
    model = build("v")
    positive = masked_halves(conditioning(1), conditioning(3))
    one = ours(model, 1, positive=positive, latent=wide())["samples"]
    for columns, prompt in ((slice(0, 8), 1), (slice(8, 16), 3)):
        alone = ours(model, 1, positive=conditioning(prompt), latent=wide())["samples"]
        assert_same(one[..., columns], alone[..., columns].double(), 1e-5)
    calls = Calls(model)
    ours(calls.model, 4, positive=positive, latent=wide())
    assert calls.timesteps == [999, 759, 499, 259] and calls.batches == [2] * 4


def test_areas_are_drawn_as_pictures_of_their_own():
    import comfy.sample

    from nodes import ConditioningCombine, ConditioningSetArea

    model = patched(build("v"))
    area = ConditioningSetArea().append
    positive = ConditioningCombine().combine(
        area(conditioning(1), 64, 64, 0, 0, 1.0)[0], area(conditioning(3), 64, 64, 64, 0, 1.0)[0]
    )[0]
    noise = comfy.sample.prepare_noise(wide()["samples"], 11, [0])
    combined = ours(model, 1, positive=positive, latent=wide())["samples"]
    for columns, prompt in ((slice(0, 8), 1), (slice(8, 16), 3)):
        piece = GivenNoise(noise[..., columns])
        alone = advanced(model, conditioning(prompt), empty(), steps=1, noise=piece)
        assert_same(combined[..., columns], alone.double(), 1e-5)


def hook_lora(model) -> dict[str, torch.Tensor]:
    """A random LoRA on every attention projection of the small UNet."""
    generator = torch.Generator().manual_seed(6)
    lora = {}
    for name, module in model.model.diffusion_model.named_modules():
        if name.endswith(("to_q", "to_k", "to_v")):
            out, into = module.weight.shape
            key = f"lora_unet_{name.replace('.', '_')}"
            lora[f"{key}.lora_up.weight"] = torch.randn(out, 4, generator=generator)
            lora[f"{key}.lora_down.weight"] = torch.randn(4, into, generator=generator) * 0.3
    return lora


def loaded(model):
    """The MODEL with that LoRA, from the host's own loader."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, hook_lora(model), 1.0, 0.0)[0]


def hooked(prompt: int, model, keyframes=()) -> list:
    """A conditioning with that LoRA; keyframes: (percent, strength) of its schedule."""
    import comfy.hooks
    from comfy_extras.nodes_hooks import CreateHookKeyframe, SetHookKeyframes

    hooks, frames = comfy.hooks.create_hook_lora(hook_lora(model), 1.0, 0.0), None
    for percent, strength in keyframes:
        frames = CreateHookKeyframe().create_hook_keyframe(strength, percent, frames)[0]
    hooks = SetHookKeyframes().set_hook_keyframes(hooks, frames)[0]
    return comfy.hooks.set_hooks_for_conditioning(conditioning(prompt), hooks)


def test_a_lora_hook_equals_the_loader():
    model = patched(build("v"))
    plain = ours(model)["samples"]
    actual = ours(model, positive=hooked(1, model))["samples"]
    assert_same(actual, ours(loaded(model))["samples"].double(), 1e-5)
    assert (actual - plain).norm() > 0.05 * plain.norm()
    assert torch.equal(ours(model)["samples"], plain)  # the weights are the model's own again


def test_a_lora_hooks_schedule_changes_between_our_steps():
    model = patched(build("v"))
    weight = model.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn1.to_q.weight
    own, seen = weight.clone(), []
    calls = Calls(model)
    inner = calls._call

    def look(apply_model, args):
        unet = model.model.diffusion_model
        now = unet.input_blocks[1][1].transformer_blocks[0].attn1.to_q.weight
        seen.append(not torch.equal(now, own))
        return inner(apply_model, args)

    calls.model.set_model_unet_function_wrapper(look)
    ours(calls.model, positive=hooked(1, model, [(0.0, 0.0), (0.5, 1.0)]))
    assert calls.timesteps == [999, 759, 499, 259]
    assert seen == [False, False, True, True]


def test_hooks_belong_to_their_region():
    model = build("v")
    positive = masked_halves(conditioning(1), hooked(1, model))
    one = ours(model, 1, positive=positive, latent=wide())["samples"]
    plain = ours(model, 1, latent=wide())["samples"]
    with_lora = ours(loaded(model), 1, latent=wide())["samples"]
    assert_same(one[..., :8], plain[..., :8].double(), 1e-5)
    assert_same(one[..., 8:], with_lora[..., 8:].double(), 1e-5)


def test_an_interruption_takes_hooks_off():
    import comfy.model_management as management

    model = patched(build("v"))
    plain = ours(model)["samples"]
    calls = Calls(model)
    inner = calls._call

    def stop_at_the_second(apply_model, args):
        management.interrupt_current_processing(len(calls.sigmas) == 1)
        return inner(apply_model, args)

    calls.model.set_model_unet_function_wrapper(stop_at_the_second)
    with pytest.raises(management.InterruptProcessingException):
        advanced(calls.model, hooked(1, model), empty())
    assert len(calls.sigmas) == 2
    assert torch.equal(ours(model)["samples"], plain)


def test_prompts_for_parts_of_the_run():
    """ConditioningSetTimestepRange counts in percent of the model's own timesteps."""
    from nodes import ConditioningCombine, ConditioningSetTimestepRange

    model, between = build("v"), ConditioningSetTimestepRange().set_range
    both = ConditioningCombine().combine(
        between(conditioning(1), 0.0, 0.4)[0], between(conditioning(3), 0.4, 1.0)[0]
    )[0]
    contexts = []

    def see(_module, _inputs, named):
        contexts.append(named["context"].clone())

    handle = model.model.diffusion_model.register_forward_pre_hook(see, with_kwargs=True)
    ours(model, positive=both)
    handle.remove()
    first, second = conditioning(1)[0][0], conditioning(3)[0][0]
    expected = [first, first, second, second]
    assert all(torch.equal(a, b) for a, b in zip(contexts, expected, strict=True))


def test_pictures_taken_out_of_a_batch_and_repeated_stay_themselves():
    from nodes import LatentFromBatch, RepeatLatentBatch

    model = patched(build("v"))
    five = RepeatLatentBatch().repeat(picture(), 5)[0]
    batch = ours(model, latent=five, denoise=0.7)["samples"]
    third = LatentFromBatch().frombatch(five, 2, 1)[0]
    assert_same(ours(model, latent=third, denoise=0.7)["samples"], batch[2:3].double(), 1e-5)
    last = RepeatLatentBatch().repeat(third, 3)[0]  # numbers 2, 3, 4
    assert_same(ours(model, latent=last, denoise=0.7)["samples"], batch[2:].double(), 1e-5)
    assert (batch[2] - batch[3]).norm() > 0.05 * batch[2].norm()


def test_each_picture_of_a_batch_has_its_own_mask():
    from nodes import LatentFromBatch

    masks = torch.zeros(3, 1, 64, 64)
    for index in range(3):
        masks[index, ..., : 16 * (index + 1)] = 1
    latent = {**picture(3), "noise_mask": masks}
    model = build("v")
    batch = ours(model, latent=latent)["samples"]
    for index in range(3):
        edge = 2 * (index + 1)
        assert (batch - latent["samples"])[index, ..., edge:].abs().max() < 1e-4
        alone = ours(model, latent=LatentFromBatch().frombatch(latent, index, 1)[0])["samples"]
        assert_same(alone, batch[index : index + 1].double(), 1e-5)


def test_every_step_shows_a_preview(monkeypatch):
    """The previews show x0, not the noisy latent, in SamplerCustomAdvanced as in our node."""
    import comfy.utils
    from comfy.cli_args import LatentPreviewMethod, args

    monkeypatch.setattr(args, "preview_method", LatentPreviewMethod.Latent2RGB)
    shown = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK",
        lambda value, total, preview, **_: shown.append((value, total, preview[1].tobytes())),
    )  # fmt: skip
    model = patched(build("v"))
    ours(model)
    one_node, shown[:] = shown[:], []
    advanced(model, conditioning(1), empty())
    assert [entry[:2] for entry in one_node] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert one_node == shown and len({entry[2] for entry in shown}) == 4
