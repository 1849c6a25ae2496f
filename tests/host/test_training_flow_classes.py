"""Each class of flow model that can be distilled, on small random networks of ComfyUI's classes."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from lcm_lora.lora.formats import files
from lcm_lora.tests.host.flow_models import flow_model
from lcm_lora.training.adapter import Adapter
from lcm_lora.training.data import bank
from lcm_lora.training.data.bank import FEATURES, together

CHANGES = {"ZImage": {"dim": 256, "n_heads": 8, "n_kv_heads": 8}}  # the embedding of t has 256
CLASSES = (
    "SD3", "Lumina2", "ZImage", "QwenImage", "Flux", "FluxSchnell", "LongCatImage", "Chroma",
    "Flux2", "Anima", "WAN21_T2V",
)  # fmt: skip
PROMPTS = ("a red fox", "a cup of tea", "a car")
IDLE = {"QwenImage": 4}  # the text side of the last block, which nothing follows
NO_SIZES = torch.zeros(3, 6)


def texts_of(kind, prompt):
    """What ComfyUI's text encoder of a class gives for a prompt, with random features; of classes
    that have it, one for each letter."""
    generator = torch.Generator().manual_seed(len(prompt))
    length = 12 if kind == "SD3" or "Flux" in kind else 1 + len(prompt)
    width = 1024 if kind == "Anima" else 64
    texts = {FEATURES: torch.randn(1, length, width, generator=generator)}
    if kind in ("SD3", "Flux", "FluxSchnell"):
        texts["pooled_output"] = torch.randn(1, 64, generator=generator)
    if kind in ("Lumina2", "ZImage"):
        texts["attention_mask"] = torch.ones(1, length, dtype=torch.int64)
    if kind == "Anima":
        texts["t5xxl_ids"] = torch.randint(64, (length + 2,), generator=generator).int()
        texts["t5xxl_weights"] = torch.ones(length + 2)
    return texts


def teacher_of(kind):
    from lcm_lora.lora.weights.host import detect
    from lcm_lora.training.flow.host import make_differentiable
    from lcm_lora.training.flow.kinds import FLOW_MODELS
    from lcm_lora.training.flow.teacher import FlowTeacher
    from lcm_lora.training.host import process_of

    patcher = flow_model(kind, **CHANGES.get(kind, {}))
    assert type(patcher.model).__name__ in FLOW_MODELS
    network = patcher.model.diffusion_model.requires_grad_(False).eval()
    if kind == "SD3":  # a buffer that ComfyUI leaves empty
        network.pos_embed.normal_(generator=torch.Generator().manual_seed(0))
    make_differentiable(network)
    cpu = torch.device("cpu")
    teacher = FlowTeacher(
        network, process_of(patcher, "flow", cpu), detect(patcher).name,
        patcher.model.latent_format.latent_channels, cpu, torch.float32, texts_of(kind, ""),
        (), patcher, None, None,
    )  # fmt: skip
    teacher.use_guidance((3.0,))
    return teacher


@pytest.fixture(scope="module", params=CLASSES)
def teacher(request, comfy):
    import comfy.model_management as management

    before = management.in_training
    made = teacher_of(request.param)
    made.kind = request.param
    yield made
    management.in_training = before


@pytest.fixture
def adapter(teacher):
    made = Adapter(teacher.network, 2, 2.0, 0, teacher.targets)
    yield made
    made.detach()


def random(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_gradients_are_right(teacher, adapter, caplog):
    from lcm_lora.training.gradient_check import require_right_gradients

    caplog.set_level("INFO", "lcm_lora")
    require_right_gradients(teacher, adapter)
    errors = [float(line.rpartition(" ")[2]) for line in caplog.messages if "gradients" in line]
    assert len(errors) == 2 and max(errors) < 1e-3


def gradients(teacher):
    """Of the loss of one batch, with blocks recomputed in backward."""
    from lcm_lora.training.memory import recompute_blocks

    made = Adapter(teacher.network, 2, 2.0, 0, teacher.targets, teacher.device)
    for number, low in enumerate(made.layers):
        torch.nn.init.normal_(low.up, std=0.1, generator=torch.Generator().manual_seed(number))
    z, t = random(3, *teacher.latent_shape(8 * teacher.shrink)), torch.tensor([839, 385, 587])
    texts = together([texts_of(teacher.kind, prompt) for prompt in PROMPTS])
    cond, _ = teacher.conditions(texts, NO_SIZES)
    undo = recompute_blocks(teacher.network)
    try:
        with torch.no_grad():
            output = teacher(z, t, **cond)
        teacher(z, t, **cond).square().mean().backward()
    finally:
        undo()
        made.detach()
    return output, [p.grad for p in made.parameters() if p.grad is not None]


def test_weights_that_are_off_the_device_give_the_same_numbers(teacher):
    """A copy of a layer's weights lives as long as they are needed; see training/offload.py."""
    from lcm_lora.training import offload

    expected = gradients(teacher)
    other = teacher_of(teacher.kind)
    other.kind = teacher.kind
    blocks = offload.blocks_of(other.network)
    size = max(sum(p.nbytes for p in block.parameters()) for block in blocks)
    copies, most = [], 0

    def copy(layer):
        """Called before a layer's own forward, when its weights are copied."""
        nonlocal most
        copies.append(weakref.ref(layer.weight))
        alive = {id(w): w for ref in copies if (w := ref()) is not None}
        most = max(most, sum(weight.nbytes for weight in alive.values()))

    layers = [layer for block in blocks for layer in block.modules() if offload.is_layer(layer)]
    for layer in layers:
        forward = layer.forward
        layer.forward = lambda *args, _of=(layer, forward): copy(_of[0]) or _of[1](*args)
    homes = [layer.weight.data_ptr() for layer in layers]
    other.offload()
    output, of_copies = gradients(other)
    assert torch.equal(output, expected[0])
    assert len(of_copies) == len(expected[1]) > 0
    assert all(map(torch.equal, of_copies, expected[1]))
    assert [layer.weight.data_ptr() for layer in layers] == homes
    assert len(copies) >= 3 * len(layers) and 0 < most <= size
    gc.collect()
    assert not {ref() for ref in copies} - {None}


def test_it_is_called_as_the_host_samples(teacher, comfy, monkeypatch):
    """The same clean pictures as in the host's sampling, with its own guidance and kernels."""
    import comfy.model_management
    import comfy.sample
    import comfy.samplers
    from lcm_lora.training.objectives.solver import predict_guided

    z, t = random(3, *teacher.latent_shape(8 * teacher.shrink)), torch.tensor([839, 385, 587])
    cond, uncond = teacher.conditions(
        together([texts_of(teacher.kind, prompt) for prompt in PROMPTS]), NO_SIZES
    )
    with torch.no_grad():
        ours, _ = predict_guided(teacher, teacher.schedule, z, t, cond, uncond, 3.0)
    monkeypatch.setattr(comfy.model_management, "in_training", False)
    if teacher._is_video:
        z = z.unsqueeze(2)
    embedded = {"guidance": 3.0} if teacher.has_guidance else {}

    def conditioning(prompt):
        texts = texts_of(teacher.kind, prompt)
        return [[texts.pop(FEATURES), {"pooled_output": None} | texts | embedded]]

    for i, prompt in enumerate(PROMPTS):
        answers = []

        def call(network, x, levels, extra_args, i=i, answers=answers, **_):
            sigma = teacher.schedule.sigmas[t[i : i + 1]]
            answers.append(network(z[i : i + 1], sigma, **extra_args))
            return x

        with torch.no_grad():
            comfy.sample.sample_custom(
                teacher._patcher, z[:1], 1.0 if embedded else 3.0, comfy.samplers.KSAMPLER(call),
                torch.tensor([1.0, 0.0]), conditioning(prompt), conditioning(""),
                torch.zeros_like(z[:1]), disable_pbar=True,
            )  # fmt: skip
        answer = answers[0].squeeze(2) if teacher._is_video else answers[0]
        torch.testing.assert_close(ours[i : i + 1], answer, rtol=1e-3, atol=1e-3)


def test_our_samplers_steps_are_timesteps_that_it_was_trained_at(teacher):
    """So are ComfyUI's own, with its scheduler `simple`, which rounds where its table is coarse."""
    import comfy.samplers
    from lcm_lora.samplers.families import FAMILIES
    from lcm_lora.samplers.host import patch_sampling, schedule

    for family in ("lcm", "phased"):
        sampled = patch_sampling(teacher._patcher, family)
        for steps in range(1, 9):
            t = teacher.schedule.run(FAMILIES[family], steps)
            assert set(t) <= set(teacher.schedule.starts) and len(set(t)) == steps
            trained = teacher.schedule.sigmas[t]
            torch.testing.assert_close(trained, schedule(sampled, steps)[:-1], rtol=1e-6, atol=1e-6)
            own = sampled.get_model_object("model_sampling")
            host = comfy.samplers.calculate_sigmas(own, "simple", steps)[:-1]
            torch.testing.assert_close(trained, host, rtol=0, atol=3e-3)


@pytest.mark.parametrize("objective", ["phased", "dmd"])
def test_a_run_learns_and_its_lora_comes_back_into_the_host(teacher, adapter, objective, tmp_path):
    """The host's patched weights then draw as the network with the adapter beside it."""
    import comfy.model_management as management
    from lcm_lora.lora.host import apply
    from lcm_lora.training import export
    from lcm_lora.training.ranks import Ranks
    from lcm_lora.training.spec import Data, Spec
    from lcm_lora.training.state.loop import Run

    spec = Spec(
        host="/", checkpoint="/c.safetensors", output="/o.safetensors", banks=str(tmp_path),
        resolution=8 * teacher.shrink, steps={"phased": 1, "dmd": 3}[objective], batch=2, rank=2,
        guidance=(3.0,), lr=1e-2, sample_every=0, objective=objective,
        data=Data(prompts=PROMPTS, count=3, draw_steps=1),
    )  # fmt: skip
    run = Run(
        spec, tmp_path / "job", teacher, adapter, made_bank(spec, teacher, adapter), Ranks(), None,
        None, lambda: "",
    )  # fmt: skip
    assert run.train() == "done"
    up = {name: x for name, x in adapter.state().items() if name.endswith(".up")}
    assert all(x.isfinite().all() for x in up.values())
    idle = [name for name, x in up.items() if not x.any()]
    assert len(idle) == IDLE.get(teacher.kind, 0), idle
    if objective == "phased":
        return
    made = export.vector(adapter.state(), adapter.alpha, {}, "made")
    files.write(tmp_path / "made.safetensors", made, "fp32", overwrite=True)
    assert teacher.unmatched(tmp_path / "made.safetensors") == []
    z, t = random(3, *teacher.latent_shape(8 * teacher.shrink)), torch.tensor([839, 385, 587])
    cond, _ = teacher.conditions(
        together([texts_of(teacher.kind, prompt) for prompt in PROMPTS]), NO_SIZES
    )
    with torch.no_grad():
        with adapter.off():
            without = teacher(z, t, **cond)
        beside = teacher(z, t, **cond)
        loaded, _, coverage = apply(
            teacher._patcher, None, files.read(tmp_path / "made.safetensors"), 1.0, 0.0
        )
        assert coverage.taken == coverage.total and not coverage.left_over
        management.load_models_gpu([loaded], force_full_load=True)
        with adapter.off():
            inside = teacher(z, t, **cond)
        management.load_models_gpu([teacher._patcher], force_full_load=True)
        with adapter.off():
            assert torch.equal(teacher(z, t, **cond), without)
    change = (beside - without).abs().max()
    assert change > 1e-3
    assert (inside - beside).abs().max() < 0.02 * change


def made_bank(spec, teacher, adapter):
    from lcm_lora.training.data import sources
    from lcm_lora.training.ranks import Ranks

    folder = Path(spec.banks) / "bank"
    with adapter.off():
        bank.build(
            folder, sources.source(spec, teacher), lambda caption: texts_of(teacher.kind, caption),
            0.0, Ranks(), lambda *_: None,
        )  # fmt: skip
    return bank.Bank(folder)


@pytest.fixture
def alone(comfy, monkeypatch):
    """alone(kind) -> (a teacher that this test may spoil, an adapter on it)."""
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "in_training", False)

    def made(kind):
        teacher = teacher_of(kind)
        return teacher, Adapter(teacher.network, 2, 2.0, 0, teacher.targets)

    return made


def refused(teacher, adapter, words):
    from lcm_lora.training.gradient_check import require_right_gradients

    require_right_gradients(teacher, adapter)

    def again():
        with pytest.raises(ValueError, match=words):
            require_right_gradients(teacher, adapter)

    return again


def test_without_the_hosts_flag_a_network_is_refused(alone, monkeypatch):
    import comfy.model_management

    check = refused(*alone("QwenImage"), "Qwen-Image network cannot be trained here: ")
    monkeypatch.setattr(comfy.model_management, "in_training", False)
    check()


def test_without_copies_for_the_norms_a_network_is_refused(alone):
    teacher, adapter = alone("FluxSchnell")
    check = refused(teacher, adapter, "Flux network cannot be trained here: .*inplace")
    for layer in teacher.network.modules():
        if isinstance(layer, torch.nn.LayerNorm):
            layer._forward_pre_hooks.clear()
    check()


@pytest.mark.parametrize("kind", ["FluxSchnell", "Chroma"])
def test_without_copies_for_the_blocks_recomputing_is_refused(alone, monkeypatch, kind):
    from lcm_lora.training import memory

    check = refused(*alone(kind), "with blocks recomputed")
    monkeypatch.setattr(memory, "_copied", lambda value: value)
    check()


def test_copies_for_the_blocks_alone_would_give_wrong_gradients(alone):
    """Autograd does not notice it: computed again, a norm's input has changed in between."""
    from lcm_lora.training.gradient_check import LIMITS, gradient_error
    from lcm_lora.training.memory import recompute_blocks

    teacher, adapter = alone("FluxSchnell")
    for layer in teacher.network.modules():
        if isinstance(layer, torch.nn.LayerNorm):
            layer._forward_pre_hooks.clear()
    recompute_blocks(teacher.network)
    assert gradient_error(teacher, adapter) > LIMITS[torch.float32].worst


def test_a_range_of_guidance_is_refused_where_it_is_embedded(alone):
    teacher, _ = alone("Flux")
    with pytest.raises(ValueError, match="guidance is a range, 2 to 4; expected one number"):
        teacher.use_guidance((2.0, 4.0))
    _, uncond = teacher.conditions(together([texts_of("Flux", "a")]), NO_SIZES[:1])
    assert not uncond


@pytest.mark.parametrize(("kind", "calls"), [("Flux", 1), ("FluxSchnell", 2)])
def test_a_plan_counts_the_teachers_calls(alone, kind, calls):
    from lcm_lora.training.plan import plan
    from lcm_lora.training.spec import Data, Spec

    teacher, adapter = alone(kind)
    spec = Spec(
        host="/", checkpoint="/c.safetensors", output="/o.safetensors", banks="/b", resolution=64,
        batch=1, rank=2, guidance=(3.0,), data=Data(prompts=PROMPTS, count=3, draw_steps=1),
    )  # fmt: skip
    seen = []
    call = type(teacher).__call__

    def counted(self, z, *args, **texts):
        if not adapter.on:
            seen.append(len(z))
        return call(self, z, *args, **texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(teacher), "__call__", counted)
        report = plan(spec, teacher, adapter, 3)
    assert set(seen) == {calls} and teacher.guided_calls == calls
    assert ("(teacher, no gradient; target" in report) == (calls == 1)
    assert ("(teacher: 2 pictures in one, no gradient; target" in report) == (calls == 2)
    weights = sum(p.numel() for p in teacher.network.parameters()) * 4 / 1e9
    assert f"in a step, with AdamW's state added: {weights:.2f} GB of weights" in report
