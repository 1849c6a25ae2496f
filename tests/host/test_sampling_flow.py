"""Flow models inside the real ComfyUI: whole runs on small networks of its own classes."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from lcm_lora.samplers.families import FAMILIES
from lcm_lora.samplers.noise import picture_seed
from lcm_lora.tests.host import random_unet
from lcm_lora.tests.host.random_unet import patched
from lcm_lora.tests.host.reference import assert_same
from lcm_lora.tests.host.tiny_flow import (
    IMAGES,
    NETWORKS,
    SOUND,
    build,
    conditioning,
    empty,
    host_ksampler,
    ours,
    picture,
)

pytestmark = pytest.mark.usefixtures("comfy")

LINES = [name for name in NETWORKS if name != "CosmosT2IPredict2"]


def sampling_of(model):
    return model.get_model_object("model_sampling")


def schedule(model, steps=4, strength=1.0, origin_steps=50, text="") -> list[float]:
    from lcm_lora.nodes.sampling import LCMSchedule

    return LCMSchedule.execute(model, steps, strength, origin_steps, text).result[0].tolist()


def reference(
    model, kind, sigmas, latent, seed=11, cfg=1.0, batch_index=None, image=None
) -> torch.Tensor:
    """A scheduler of diffusers around the raw network, with the noise the host and we draw."""
    import comfy.sample

    scheduler = kind()
    scheduler.set_timesteps(sigmas=sigmas)
    network, format_ = model.model.diffusion_model, model.model.latent_format
    batch = len(latent)
    x = comfy.sample.prepare_noise(latent, seed, batch_index) * sigmas[0]
    if image is not None:
        x = x + (1 - sigmas[0]) * format_.process_in(image)
    multiplier = getattr(sampling_of(model), "multiplier", 1)

    def velocity(which, sigma):
        text, options = conditioning(which)[0]
        more = {"y": options["pooled_output"].expand(batch, -1)}
        if type(model.model).__name__ == "Flux":
            more["guidance"] = torch.tensor([3.5])
        elif type(model.model).__name__ == "WAN21":
            more = {}
        time = torch.full((batch,), sigma * multiplier)
        return network(x, time, context=text.expand(batch, -1, -1), **more)

    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            numbers = batch_index or range(batch)
            generators = [
                torch.Generator().manual_seed(picture_seed(seed, number, i)) for number in numbers
            ]
            output = velocity(1, sigmas[i])
            if cfg != 1:
                negative = velocity(2, sigmas[i])
                output = negative + cfg * (output - negative)
            x = scheduler.step(output, t, x, generator=generators, return_dict=False)[0]
    return format_.process_out(x).double()


def shifted(time: float, by: float) -> float:
    return by * time / (1 + (by - 1) * time)


SHIFTS = {"SD3": 3.0, "Flux": math.exp(1.15), "WAN21_T2V": 8.0}  # as the host sets them


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize(
    ("family", "kind"),
    [("lcm", FlowMatchLCMScheduler), ("flow", FlowMatchEulerDiscreteScheduler)],
)
def test_a_whole_run_equals_diffusers(name, family, kind, steps):
    model = build(name)
    sigmas = [shifted(1 - i / steps, SHIFTS[name]) for i in range(steps)]
    expected = reference(model, kind, sigmas, empty(name, 2)["samples"])
    assert_same(ours(patched(model, family), empty(name, 2), steps), expected, 1e-5)


AUTHORS = {
    "flux2-turbo": FlowMatchEulerDiscreteScheduler, "rcm": FlowMatchLCMScheduler,
    "pcm-sd3": FlowMatchEulerDiscreteScheduler, "pcm-sd3-stochastic": FlowMatchLCMScheduler,
    "qwen-lightning": FlowMatchEulerDiscreteScheduler,
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("family", AUTHORS)
def test_a_family_has_its_own_sigmas_on_every_model(family, name):
    model, chosen = build(name), FAMILIES[family]
    steps = chosen.steps[-1] if chosen.steps else 4
    sigmas = chosen.listed(steps)
    if sigmas is None:
        sigmas = [shifted(time, chosen.shift) for time in chosen.times(steps)]
    assert schedule(patched(model, family), steps) == pytest.approx([*sigmas, 0], abs=1e-6)
    expected = reference(model, AUTHORS[family], sigmas, empty(name)["samples"])
    assert_same(ours(patched(model, family), empty(name), steps), expected, 1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_euler_is_the_hosts(name):
    """With guidance and a batch, at steps that divide its 1000 timesteps (we take exact thirds, as
    diffusers does). Cosmos with our sigmas, as its `simple` takes logarithms of its scale."""
    from comfy_extras.nodes_custom_sampler import KSamplerSelect, SamplerCustom

    model = build(name)
    for steps in (1, 2, 4):
        if name in LINES:
            expected = host_ksampler(model, empty(name, 2), steps=steps, cfg=1.7)
        else:
            expected = SamplerCustom.execute(
                model, True, 11, 1.7, conditioning(1), conditioning(2),
                KSamplerSelect.execute("euler").result[0],
                torch.tensor(schedule(model, steps)), empty(name, 2),
            ).result[0]["samples"]  # fmt: skip
        assert_same(ours(model, empty(name, 2), steps, cfg=1.7), expected.double(), 1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_lcm_is_the_hosts_with_our_noise(name, monkeypatch):
    """The host's sampler `lcm` is given the noise that we draw for a picture alone."""
    from comfy.k_diffusion import sampling
    from comfy_extras.nodes_custom_sampler import KSamplerSelect, SamplerCustom

    model = patched(build(name), "lcm")

    def drawn(x, *_, **__):
        steps = iter(range(9))

        def noise(*_):
            generator = torch.Generator().manual_seed(picture_seed(11, 0, next(steps)))
            return torch.empty_like(x[0]).normal_(generator=generator)[None]

        return noise

    monkeypatch.setattr(sampling, "default_noise_sampler", drawn)
    expected = SamplerCustom.execute(
        model, True, 11, 1.0, conditioning(1), conditioning(2),
        KSamplerSelect.execute("lcm").result[0], torch.tensor(schedule(model)), empty(name),
    ).result[0]["samples"]  # fmt: skip
    assert_same(ours(model, empty(name)), expected.double(), 1e-5)


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.5), (2, 0.8), (1, 0.3)])
@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize(
    ("family", "kind"),
    [("lcm", FlowMatchLCMScheduler), ("flow", FlowMatchEulerDiscreteScheduler)],
)
def test_image_to_image_equals_diffusers(name, family, kind, steps, strength):
    model, latent = build(name), picture(name)
    sigmas = [shifted(strength * (1 - i / steps), SHIFTS[name]) for i in range(steps)]
    image = latent["samples"]
    expected = reference(model, kind, sigmas, image, image=image)
    assert_same(
        ours(patched(model, family), latent, steps, denoise=strength), expected, 1e-5
    )  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_a_mask_keeps_the_rest_as_the_host_does(name):
    """Outside it the picture stays, inside it is drawn: the same as the host's Euler at eta 0."""
    from comfy_extras.nodes_custom_sampler import KSamplerSelect, SamplerCustom

    model = build(name)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 16:48] = 1
    latent = {**picture(name), "noise_mask": mask}
    sigmas = torch.tensor(schedule(model, 4, 0.8))
    expected = SamplerCustom.execute(
        model, True, 11, 1.0, conditioning(1), conditioning(2),
        KSamplerSelect.execute("euler").result[0], sigmas, latent,
    ).result[0]["samples"]  # fmt: skip
    drawn = ours(model, latent, denoise=0.8)
    assert_same(drawn, expected.double(), 1e-5)
    fresh = ours(model, latent, denoise=0.8, eta=1.0)
    for made in (drawn, fresh):
        torch.testing.assert_close(
            made[..., :2, :], latent["samples"][..., :2, :], rtol=1e-4, atol=1e-4
        )
        assert (made - latent["samples"])[..., 2:6, 2:6].abs().mean() > 0.1
    assert (drawn - fresh).abs().mean() > 0.01


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_picture_is_the_same_alone_and_in_a_batch(name, eta):
    model = build(name)
    batch = ours(model, empty(name, 3), eta=eta)
    alone = ours(model, {**empty(name), "batch_index": [2]}, eta=eta)
    assert_same(alone[0], batch[2].double(), 1e-5)
    assert (alone[0] - batch[1]).norm() > 0.1 * batch[1].norm()


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - set(IMAGES)))
def test_a_video_of_many_frames_and_an_image_latent(name):
    """A latent of a picture, with 4 dimensions, becomes one frame, as in the host's KSampler."""
    model = build(name)
    frames = ours(model, empty(name, 2, 3), eta=0.5)
    assert frames.shape == (2, 16, 3, 8, 8) and frames.isfinite().all()
    assert (frames[:, :, 0] - frames[:, :, 1]).abs().mean() > 0.1
    flat = ours(model, {"samples": torch.zeros(2, 4, 8, 8)})
    assert torch.equal(flat, ours(model, empty(name, 2)))


@pytest.fixture
def with_sound(comfy, monkeypatch):
    """A small LTX-2 and a function that makes latents for it: of the video and of its sound."""
    from comfy.nested_tensor import NestedTensor

    monkeypatch.setitem(NETWORKS, "LTXAV", SOUND)
    model = build("LTXAV")

    def latent(batch: int = 1, scale: float = 0.0) -> dict:
        generator = torch.Generator().manual_seed(3)
        video = torch.randn(batch, 128, 2, 4, 4, generator=generator)
        return {"samples": NestedTensor([scale * video, scale * torch.ones(batch, 8, 6, 16)])}

    return model, latent


def drawn_with_sound(model, latent: dict, family: str, **settings) -> list[torch.Tensor]:
    from lcm_lora.nodes.sampling import LCMKSampler, LCMModelSampling

    text = [[torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(1)), {}]]
    model = LCMModelSampling.execute(model, family).result[0]
    arguments = {"seed": 11, "steps": 4, "cfg": 1.0, "denoise": 1.0} | settings
    output = LCMKSampler.execute(model, positive=text, negative=text, latent=latent, **arguments)
    return output.result[0]["samples"].unbind()


def test_a_video_with_its_sound_is_that_of_the_hosts_sampler(with_sound):
    import nodes

    model, latent = with_sound
    text = [[torch.randn(1, 16, 128, generator=torch.Generator().manual_seed(1)), {}]]
    for denoise, scale in ((1.0, 0.0), (0.5, 1.0)):
        found = drawn_with_sound(model, latent(1, scale), "flow", denoise=denoise)
        theirs = nodes.KSampler().sample(
            model, 11, 4, 1.0, "euler", "simple", text, text, latent(1, scale), denoise
        )[0]["samples"].unbind()  # fmt: skip
        assert [one.shape for one in found] == [(1, 128, 2, 4, 4), (1, 8, 6, 16)]
        for one, right in zip(found, theirs, strict=True):
            if denoise == 1:  # below, the host divides the times in another way
                assert_same(one, right.double(), 1e-4)
            assert one.isfinite().all()


def test_a_video_with_its_sound_is_the_same_alone_and_in_a_batch(with_sound):
    model, latent = with_sound
    batch = drawn_with_sound(model, latent(2), "lcm")
    alone = drawn_with_sound(model, {**latent(), "batch_index": [1]}, "lcm")
    for one, both in zip(alone, batch, strict=True):
        assert_same(one[0], both[1].double(), 1e-5)
        assert (one[0] - both[0]).norm() > 0.1 * both[0].norm()


def test_the_guidance_of_the_prompt_reaches_the_network():
    model, seen = build("Flux"), []
    network = model.model.diffusion_model
    hook = network.register_forward_pre_hook(
        lambda _module, _inputs, named: seen.append(named["guidance"].item()), with_kwargs=True
    )
    drawn = [
        ours(model, empty("Flux"), 2, positive=conditioning(1, guidance=value))
        for value in (1.5, 3.5)
    ]
    hook.remove()
    assert seen == [1.5, 1.5, 3.5, 3.5]
    assert not torch.equal(*drawn)


def test_the_nodes_one_by_one_equal_the_one_node():
    from comfy_extras.nodes_custom_sampler import SamplerCustom
    from lcm_lora.nodes.sampling import LCMSampler

    for name in NETWORKS:
        for family in ("lcm", "flow", "rcm"):
            model = patched(build(name), family)
            sampler = LCMSampler.execute(0.5, "cpu", family_eta=True).result[0]
            one = SamplerCustom.execute(
                model, True, 11, 1.0, conditioning(1), conditioning(2), sampler,
                torch.tensor(schedule(model)), empty(name, 2),
            )  # fmt: skip
            assert torch.equal(one.result[0]["samples"], ours(model, empty(name, 2)))


def test_two_halves_of_a_run_are_the_run():
    """SIGMAS that end above 0 leave the latent as the host's next sampler expects it."""
    from comfy_extras.nodes_custom_sampler import SamplerCustom
    from lcm_lora.nodes.sampling import LCMSampler

    model = build("Flux")
    sigmas = torch.tensor(schedule(model))
    sampler = LCMSampler.execute(0.0, "cpu").result[0]

    def run(noise, sigmas, latent):
        return SamplerCustom.execute(
            model, noise, 11, 1.0, conditioning(1), conditioning(2), sampler, sigmas, latent
        ).result[0]  # fmt: skip

    half = run(True, sigmas[:3], empty("Flux"))
    assert_same(
        run(False, sigmas[2:], half)["samples"], ours(model, empty("Flux")).double(), 1e-5
    )  # fmt: skip


def test_the_schedule_of_a_flow_model():
    model = build("SD3")
    assert schedule(model) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert schedule(model, 2, 0.5) == pytest.approx([0.75, 0.5, 0])
    assert schedule(model, 4, 1.0, 100) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert schedule(model, text="1, 0.8, 0") == pytest.approx([1, 0.8, 0])
    with pytest.raises(ValueError, match="must descend, found 0.9 after 0.8"):
        schedule(model, text="1, 0.8, 0.9")
    with pytest.raises(ValueError, match="found 999"):
        schedule(model, text="999, 499")
    cosmos = build("CosmosT2IPredict2")  # whose scale is sigma / (1 - sigma), up to 80
    assert schedule(cosmos) == pytest.approx([80, 3, 1, 1 / 3, 0])
    assert schedule(cosmos, text="0.9, 0.5") == pytest.approx([9, 1, 0])
    turbo = patched(build("Flux"), "flux2-turbo")
    assert len(schedule(turbo, 4)) == 5 and schedule(turbo, 4) == schedule(build("Flux"), 4)
    assert schedule(turbo, 8, 0.5) == schedule(build("Flux"), 8, 0.5)


def test_the_hosts_simple_finds_the_sigmas_of_a_family():
    for name in LINES:
        for family in ("qwen-lightning", "wan-lightning"):
            model = patched(build(name), family)
            expected = host_ksampler(model, empty(name))
            assert_same(ours(model, empty(name)), expected.double(), 1e-5)


def shift_node(model, shift: float):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    return ModelSamplingSD3().patch(model, shift)[0]


def accelerated(model, family: str):
    """The MODEL as Apply LoRA Vector leaves it with a LoRA of the family."""
    from lcm_lora.samplers.host import record
    from lcm_lora.samplers.report import Acceleration

    after = model.clone()
    record(model, after, Acceleration(f"a {family} LoRA", (family,)))
    return after


def test_the_later_node_sets_the_shift():
    model = build("SD3")
    tuned = shift_node(model, 6.0)
    assert schedule(tuned)[1] == pytest.approx(shifted(0.75, 6))
    # The family's own, over what was set before it; without one, what was set.
    assert schedule(patched(tuned, "wan-lightning"))[1] == pytest.approx(shifted(0.75, 5))
    assert schedule(patched(tuned, "flow"))[1] == pytest.approx(shifted(0.75, 6))
    # A family after another starts from the model again.
    again = patched(patched(model, "wan-lightning"), "flow")
    assert schedule(again)[1] == pytest.approx(shifted(0.75, 3))
    # A node of the host after it: its shift, and the family's eta.
    later = shift_node(patched(accelerated(model, "rcm"), "rcm"), 6.0)
    assert schedule(later, 4)[1] == pytest.approx(shifted(0.75, 6))
    assert_same(
        ours(later, empty("SD3")), ours(tuned, empty("SD3"), eta=1.0).double(), 1e-6
    )  # fmt: skip
    assert schedule(accelerated(model, "rcm"), 4)[1] == pytest.approx(0.9338, abs=1e-4)


def test_a_family_of_the_other_kind_is_refused_by_both_names():
    from lcm_lora.nodes.sampling import LCMModelSampling

    flux, sd = build("Flux"), random_unet.build()
    with pytest.raises(
        ValueError,
        match=r"'tcd' is for Stable Diffusion models, and this MODEL is a flow model \(Flux\)",
    ):
        LCMModelSampling.execute(flux, "tcd")
    with pytest.raises(
        ValueError,
        match=r"'rcm' is for flow models, and this MODEL is a Stable Diffusion model \(BaseModel\)",
    ):
        LCMModelSampling.execute(sd, "rcm")
    with pytest.raises(ValueError, match="shift of 3, and this MODEL samples with"):
        LCMModelSampling.execute(build("CosmosT2IPredict2"), "qwen-lightning")
    mixed = accelerated(flux, "lightning")
    for run in (
        lambda: ours(mixed, empty("Flux")),
        lambda: LCMModelSampling.execute(mixed, "auto"),
    ):
        with pytest.raises(ValueError, match=r"a flow model \(Flux\), cannot be sampled as 'light"):
            run()


def test_sigmas_that_ascend_are_refused():
    from comfy_extras.nodes_custom_sampler import SamplerCustom
    from lcm_lora.nodes.sampling import LCMSampler

    sampler = LCMSampler.execute(1.0, "cpu").result[0]
    with pytest.raises(ValueError, match="have 0.75 after 0.5"):
        SamplerCustom.execute(
            build("SD3"), True, 1, 1.0, conditioning(1), conditioning(2), sampler,
            torch.tensor([1.0, 0.5, 0.75, 0.0]), empty("SD3"),
        )  # fmt: skip


def told(output) -> list[str]:
    return [text.format(**values) for text, values, _ in output.ui["lcm_lora_text"]]


def test_the_nodes_say_where_the_sigmas_come_from():
    from lcm_lora.nodes.sampling import LCMKSampler, LCMModelSampling

    flux = build("Flux")
    assert told(LCMModelSampling.execute(flux, "rcm")) == [
        "at 1, 2, 3, 4 steps, the sigmas that the LoRA's authors give"
    ]
    assert told(LCMModelSampling.execute(flux, "scfm")) == [
        "shift 3.25, as the LoRA's authors use it"
    ]
    assert told(LCMModelSampling.execute(flux, "auto")) == [
        "flow: no LoRA on the MODEL sets a family",
        "the model's own shift: flow sets none",
    ]
    hyper = patched(accelerated(flux, "hyper-flux"), "hyper-flux")
    output = LCMKSampler.execute(
        hyper, 1, 8, 1.0, conditioning(1, guidance=2.0), conditioning(2), empty("Flux"), 1.0
    )
    assert told(output) == [
        "hyper-flux is made for guidance 3.5, and the prompt has 2: change FluxGuidance.",
        "hyper-flux, 8 steps: 1 0.957 0.905 0.84 0.76 0.655 0.513 0.311; cfg 1, negative prompt "
        "unused",
    ]


def flow_classes() -> list[str]:
    """The classes of the host's that section 1 of the support table lists."""
    return [
        "SD3", "AuraFlow", "Flux", "FluxInpaint", "FluxSchnell", "LongCatImage", "Flux2", "Lens",
        "Chroma", "ChromaRadiance", "Lumina2", "ZImage", "QwenImage", "Krea2", "Anima", "HiDream",
        "HiDreamO1", "Omnigen2", "Boogu", "MageFlow", "Ideogram4", "ErnieImage", "JoyImage",
        "Kandinsky5Image", "Kandinsky5", "HunyuanImage21", "HunyuanVideo", "HunyuanVideo15",
        "WAN21_T2V", "WAN21_I2V", "WAN22_T2V", "LTXV", "GenmoMochi", "CosmosT2IPredict2",
        "CosmosI2VPredict2",
    ]  # fmt: skip


@pytest.mark.parametrize("name", flow_classes())
def test_every_class_is_sampled_with_its_own_shift_and_scale(name):
    """With the host's own model object, whose network is left out: what is tested needs none."""
    import comfy.model_patcher
    import comfy.samplers
    import comfy.supported_models
    from lcm_lora.samplers.lcm import kept_noise
    from lcm_lora.samplers.process.host import earlier, shares

    kind = getattr(comfy.supported_models, name, None)
    if kind is None:
        pytest.skip(f"this ComfyUI has no {name}")
    absent = {"disable_unet_model_creation": True, "hidden_size": 64}
    config = kind(kind.unet_config | absent)
    config.manual_cast_dtype = None
    try:
        model = config.get_model({})
    except AttributeError as missing:
        pytest.skip(f"{name} asks its network on the way: {missing}")
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
    sampling = sampling_of(model)
    for family in ("lcm", "flow"):
        sigmas = torch.tensor(schedule(patched(model, family)))
        if name.startswith("Cosmos"):
            assert sigmas.tolist() == pytest.approx([80, 3, 1, 1 / 3, 0])
        else:
            simple = comfy.samplers.calculate_sigmas(sampling, "simple", 4)
            torch.testing.assert_close(sigmas, simple, rtol=1e-5, atol=1e-6)
    # What the host mixes at each level is what we take it for, so a step has the exact variance.
    alphas, betas = shares(sampling, sigmas)
    x0, eps = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for sigma, alpha, beta in zip(sigmas, alphas, betas, strict=True):
        mixed = sampling.noise_scaling(sigma, eps.clone(), x0.clone())
        torch.testing.assert_close(mixed, alpha * x0 + beta * eps)
    line = sigmas / (1 + sigmas) if name.startswith("Cosmos") else sigmas
    for eta in (0.0, 0.3, 1.0):
        held = kept_noise(
            sigmas, eta, lambda s, eta: earlier(sampling, s, eta), lambda s: shares(sampling, s)
        )
        # The noise of the time (1 - eta) t', as large as it is beside the picture's share at t'.
        low = (1 - eta) * line[1:]
        scale = getattr(sampling, "noise_scale", 1.0)
        expected = scale * low / (1 - low) * torch.tensor(alphas[1:])
        assert held == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)
    if not name.startswith("Cosmos"):  # a family's shift, and the network's time as it was
        turbo = patched(model, "qwen-lightning")
        assert schedule(turbo) == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-6)
        torch.testing.assert_close(sampling_of(turbo).timestep(sigmas), sampling.timestep(sigmas))
        simple = comfy.samplers.calculate_sigmas(sampling_of(turbo), "simple", 4)
        assert simple.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-6)
