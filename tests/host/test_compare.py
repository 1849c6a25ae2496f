"""Compare Settings on the demo model: every cell is what the nodes one by one draw."""

from __future__ import annotations

import gc
import itertools
import weakref
from types import SimpleNamespace

import pytest
import torch
from lcm_lora.tests.host.reference import assert_same
from safetensors.torch import load_file, save_file

SEED = 7
PROMPT = "a photo of a fox on a teal background"
GREY = 1.5 / 255


@pytest.fixture(scope="module")
def toy(comfy, toy_checkpoint):
    """The demo model, its LoRAs as wires, and a style that changes the text encoder too."""
    from lcm_lora.dev.bench.subjects import Toy
    from lcm_lora.dev.server import install
    from lcm_lora.dev.toy import assemble
    from lcm_lora.lora.formats import files
    from lcm_lora.lora.formats.wire import to_wire

    paths = {
        "lcm": assemble.lora(assemble.LCM_LORA), "sticker": assemble.lora(assemble.STICKER_LORA),
        "blueprint": assemble.lora(assemble.BLUEPRINT_LORA),
    }  # fmt: skip
    for path in paths.values():
        install(path, comfy.loras)
    generator = torch.Generator().manual_seed(1)
    module = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    texts = {
        f"{module}.lora_up.weight": torch.randn(3072, 4, generator=generator),
        f"{module}.lora_down.weight": torch.randn(4, 768, generator=generator),
    }
    save_file(load_file(paths["sticker"]) | texts, comfy.loras / "with-text.safetensors")
    paths["with text"] = comfy.loras / "with-text.safetensors"
    loaded = Toy.load(toy_checkpoint)
    return SimpleNamespace(
        model=loaded.base, clip=loaded.clip, vae=loaded.vae,
        latent={"samples": torch.zeros(1, 4, 8, 8)},
        positive=encoded(loaded.clip, PROMPT), negative=encoded(loaded.clip, ""),
        wires={name: to_wire(files.read_named(path, path.name)) for name, path in paths.items()},
    )  # fmt: skip


def encoded(clip, text):
    import nodes

    return nodes.CLIPTextEncode().encode(clip, text)[0]


def compare(toy, columns, rows=None, vectors=("lcm", "sticker"), weights=(1.0, 0.8), **changes):
    """The node, as the graph calls it."""
    from lcm_lora.nodes.compare.node import LCMCompare

    count = {"count": str(len(vectors))}
    for number, (name, weight) in enumerate(zip(vectors, weights, strict=True), 1):
        count |= {f"vector_{number}": toy.wires[name]} if name else {}
        count[f"weight_{number}"] = weight
    inputs = {
        "model": toy.model, "vae": toy.vae, "latent": toy.latent, "count": count,
        "columns": columns, "rows": rows or {"rows": "none"}, "seed": SEED, "steps": 2, "cfg": 1.0,
        "denoise": 1.0, "clip": toy.clip, "positive": toy.positive, "negative": toy.negative,
    }  # fmt: skip
    with torch.inference_mode():
        return LCMCompare.execute(**inputs | changes)


def pictures(*arguments, **changes) -> torch.Tensor:
    return compare(*arguments, **changes).result[1]


def one_by_one(
    toy, added=(("lcm", 1.0), ("sticker", 0.8)), steps=2, cfg=1.0, seed=SEED, denoise=1.0,
    eta=-1.0, prompt=None, latent=None,
) -> torch.Tensor:  # fmt: skip
    """The same by Apply LoRA Vector, CLIP Text Encode, LCM KSampler and VAE Decode."""
    from lcm_lora.nodes.sampling import LCMKSampler
    from lcm_lora.nodes.vectors import LCMLoRAApply

    import nodes

    model, clip = toy.model, toy.clip
    with torch.inference_mode():
        for name, weight in added:
            model, clip = LCMLoRAApply.execute(
                model, toy.wires[name], weight, weight, clip
            ).result  # fmt: skip
        positive = toy.positive if prompt is None else encoded(clip, prompt)
        latent = LCMKSampler.execute(
            model, seed, steps, cfg, positive, toy.negative, latent or toy.latent, denoise, eta
        ).result[0]
        return nodes.VAEDecode().decode(toy.vae, latent)[0].clamp(0, 1)


def axis(kind, name="columns", **given):
    return {name: kind, **given}


def test_steps_and_cfg_are_bit_for_bit_what_the_nodes_draw(toy):
    drawn = pictures(toy, axis("steps", values="1, 3"), axis("cfg", "rows", values="1, 1.5"))
    settings = itertools.product((1.0, 1.5), (1, 3))
    for picture, (cfg, steps) in zip(drawn, settings, strict=True):
        assert torch.equal(picture, one_by_one(toy, steps=steps, cfg=cfg)[0])


def test_denoise_and_eta_are_bit_for_bit_what_the_nodes_draw(toy):
    picture = {"samples": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))}
    drawn = pictures(
        toy, axis("denoise", values="0.4, 0.8"), axis("eta", "rows", values="0, 1"), latent=picture
    )
    assert len(drawn) == 8  # both pictures of the latent in each cell
    for pair, (eta, denoise) in zip(
        drawn.split(2), itertools.product((0.0, 1.0), (0.4, 0.8)), strict=True
    ):
        alone = one_by_one(toy, denoise=denoise, eta=eta, latent=picture)
        assert torch.equal(pair, alone)


def test_nothing_of_a_run_is_kept_when_it_has_ended(toy, monkeypatch):
    """Its models, texts and factors would fill the memory."""
    from lcm_lora.nodes.compare import node

    drawings = []

    class Watched(node.Drawing):
        def __init__(self, *given):
            super().__init__(*given)
            drawings.append(weakref.ref(self))

    monkeypatch.setattr(node, "Drawing", Watched)
    pictures(toy, axis("weight", vector=1, values="0.5, 1"))
    gc.collect()
    assert [drawing() for drawing in drawings] == [None]


def test_weights_that_are_drawn_together_equal_weights_one_by_one(toy):
    drawn = pictures(
        toy, axis("weight", vector=1, values="0.5, 1"),
        axis("weight", "rows", vector=2, values="-0.4:1.2:0.8"),
    )  # fmt: skip
    added = itertools.product((-0.4, 0.4, 1.2), (0.5, 1.0))
    for picture, (style, fast) in zip(drawn, added, strict=True):
        alone = one_by_one(toy, (("lcm", fast), ("sticker", style)))[0]
        assert (picture - alone).abs().max() <= GREY
    assert (drawn[0] - drawn[1]).abs().max() > 20 * GREY


def test_guidance_with_weights_that_are_drawn_together(toy):
    """The network is then asked for every picture twice."""
    drawn = pictures(toy, axis("weight", vector=2, values="0, 0.6, 1.2"), cfg=1.7)
    for picture, style in zip(drawn, (0.0, 0.6, 1.2), strict=True):
        alone = one_by_one(toy, (("lcm", 1.0), ("sticker", style)), cfg=1.7)[0]
        assert (picture - alone).abs().max() <= GREY


def test_prompts_and_seeds_are_those_of_pictures_alone(toy):
    """Also where a vector changes the text encoder, and where its weight changes with the row."""
    prompts = ("a photo of a rocket on blue rays", PROMPT)
    columns = axis("prompt", prompts="\n".join(prompts))
    drawn = pictures(toy, columns, axis("seed", "rows", values="1, 5"), positive=None)
    for picture, (seed, prompt) in zip(drawn, itertools.product((1, 5), prompts), strict=True):
        assert (picture - one_by_one(toy, seed=seed, prompt=prompt)[0]).abs().max() <= GREY
    rows, vectors = axis("weight", "rows", vector=2, values="0, 1"), ("lcm", "with text")
    drawn = pictures(toy, columns, rows, vectors)
    for picture, (weight, prompt) in zip(
        drawn, itertools.product((0.0, 1.0), prompts), strict=True
    ):
        alone = one_by_one(toy, (("lcm", 1.0), ("with text", weight)), prompt=prompt)[0]
        assert (picture - alone).abs().max() <= GREY
    ignored = one_by_one(toy, (("lcm", 1.0), ("sticker", 1.0)), prompt=PROMPT)[0]
    assert (drawn[3] - ignored).abs().max() > 5 * GREY, "its text encoder part counts"


def test_every_text_is_encoded_once_and_no_weight_of_the_model_changes(toy, monkeypatch):
    import comfy.model_management
    import comfy.sd

    comfy.model_management.unload_all_models()  # other tests merged LoRAs
    asked, before = [], toy.model.model.diffusion_model.state_dict()
    before = {name: weight.clone() for name, weight in before.items()}
    encode = comfy.sd.CLIP.encode_from_tokens_scheduled
    monkeypatch.setattr(
        comfy.sd.CLIP, "encode_from_tokens_scheduled",
        lambda clip, tokens, *rest, **more: asked.append(1) or encode(clip, tokens, *rest, **more),
    )  # fmt: skip
    patched, model = [], toy.model.clone()
    patch = type(model).patch_weight_to_device

    def seen(self, key, *rest, **more):
        patched.extend([key] if key in self.patches else [])
        return patch(self, key, *rest, **more)

    monkeypatch.setattr(type(model), "patch_weight_to_device", seen)
    columns = axis("prompt", prompts="a fox\na panda\na rocket")
    pictures(toy, columns, axis("weight", "rows", vector=2, values="0:1:0.5"), model=model)
    assert len(asked) == 3
    assert not patched, "weights that are compared stay beside the layers"
    after = toy.model.model.diffusion_model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_equal_weights_are_merged_once(toy, monkeypatch):
    patched, model = [], toy.model.clone()
    patch = type(model).patch_weight_to_device

    def seen(self, key, *rest, **more):
        patched.extend([key] if key in self.patches else [])
        return patch(self, key, *rest, **more)

    monkeypatch.setattr(type(model), "patch_weight_to_device", seen)
    pictures(toy, axis("steps", values="1, 2, 3"), model=model, weights=(0.9, 0.7))
    assert patched and len(patched) == len(set(patched))


def test_files_take_the_place_of_a_vector_with_its_weight(toy, comfy):
    columns = axis("LoRA file", vector=2, files="demo-sticker-lora\ndemo-blue*")
    rows = axis("weight", "rows", vector=2, values="0.5, 1")
    output = compare(toy, columns, rows, ("lcm", None), (1.0, 0.8))
    added = itertools.product((0.5, 1.0), ("sticker", "blueprint"))
    for picture, (weight, name) in zip(output.result[1], added, strict=True):
        alone = one_by_one(toy, (("lcm", 1.0), (name, weight)))[0]
        assert (picture - alone).abs().max() <= GREY
    assert 'lora_2="demo-blueprint-lora.safetensors"' in output.result[2].splitlines()[1]


def test_pasted_settings_draw_the_same(toy):
    rows = axis("weight", "rows", vector=2, values="0.4, 1")
    columns = axis("LoRA file", vector=2, files="demo-*-lora")
    output = compare(toy, columns, rows, ("lcm", None))
    chosen = [4, 1]
    lines = [output.result[2].splitlines()[number] for number in chosen]
    again = compare(
        toy, axis("settings", lines="\n".join(lines)), vectors=("lcm", None), seed=1, steps=4
    )
    assert again.result[2].splitlines() == lines
    assert (again.result[1] - output.result[1][chosen]).abs().max() <= GREY


def test_checkpoints_of_a_job(toy, store, job, monkeypatch):
    from lcm_lora.lora.formats.wire import to_wire
    from lcm_lora.nodes.compare.node import LCMCompare
    from lcm_lora.training.jobs import host
    from lcm_lora.training.state import checkpoints
    from lcm_lora.training.state.checkpoints import Checkpoint

    layers = toy.model.model.diffusion_model.named_modules()
    name, layer = next(pair for pair in layers if pair[0].endswith("attn2.to_k"))
    out, columns = layer.weight.shape
    made, _ = store.create(job(), "a", "")
    for step in (3, 20):
        torch.manual_seed(step)
        factors = {f"{name}.up": torch.randn(out, 4), f"{name}.down": torch.randn(4, columns)}
        checkpoints.save(store.checkpoints(made), Checkpoint(step, factors, {}, {}))
    monkeypatch.setattr(host, "store", lambda: store)
    given = axis("job checkpoint", vector=1, job=made, values="all")
    output = compare(toy, given, vectors=(None,), weights=(0.7,))
    for step, picture in zip((3, 20), output.result[1], strict=True):
        toy.wires["step"] = to_wire(host.of_checkpoint(made, step, {}))
        assert torch.equal(picture, one_by_one(toy, (("step", 0.7),))[0])
    with pytest.raises(ValueError, match=r"no checkpoint of step 4\. It has: 3, 20"):
        compare(toy, given | {"values": "3, 4"}, vectors=(None,), weights=(0.7,))
    one, other = (
        LCMCompare.fingerprint_inputs(given | {"job": None}, {"rows": "none"}) for _ in range(2)
    )
    assert one != other, "there may be a new checkpoint at the next run"


def test_an_acceleration_below_other_weights_is_sampled_as_its_family(toy, comfy):
    from lcm_lora.lora.formats.wire import LoraModel

    tensors = toy.wires["lcm"]
    tcd = LoraModel(dict(tensors), SimpleNamespace(
        metadata={"lcm_lora.family": "tcd"}, source="tcd", sha256="", ignored=()
    ))  # fmt: skip
    toy.wires["tcd"] = tcd
    drawn = pictures(
        toy, axis("weight", vector=1, values="0, 0.5, 1"), vectors=("tcd",), weights=(1.0,)
    )
    for weight, picture in zip((0.0, 0.5, 1.0), drawn, strict=True):
        assert (picture - one_by_one(toy, (("tcd", weight),))[0]).abs().max() <= GREY


def test_opaque_vectors_are_put_into_the_model(toy):
    """DoRA cannot stand beside a layer: such weights are drawn one after the other."""
    from lcm_lora.lora.formats.wire import LoraModel

    plain = toy.wires["sticker"]
    module = next(key for key in plain if key.endswith("attn1_to_q.lora_up.weight"))
    module = module.removesuffix(".lora_up.weight")
    magnitude = torch.full((len(plain[f"{module}.lora_up.weight"]), 1), 0.7)
    dora = dict(plain) | {f"{module}.dora_scale": magnitude}
    toy.wires["dora"] = LoraModel(dora, SimpleNamespace(
        metadata={}, source="dora", sha256="", ignored=()
    ))  # fmt: skip
    drawn = pictures(toy, axis("weight", vector=2, values="0.4, 1"), vectors=("lcm", "dora"))
    for weight, picture in zip((0.4, 1.0), drawn, strict=True):
        alone = one_by_one(toy, (("lcm", 1.0), ("dora", weight)))[0]
        assert torch.equal(picture, alone)


@pytest.mark.parametrize("at", [1, 4, 9])
def test_an_interruption_keeps_what_is_drawn(toy, at):
    """at: the network's call at which the user presses the button; a cell has two."""
    import comfy.model_management as management
    from lcm_lora.nodes.compare.node import LCMCompare

    columns = axis("steps", values="2, 3")
    rows = axis("cfg", "rows", values="1, 1.2, 1.4")
    whole = compare(toy, columns, rows)
    model, calls = toy.model.clone(), itertools.count(1)

    def call(apply_model, args):
        management.interrupt_current_processing(next(calls) == at)
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(call)
    before = LCMCompare.fingerprint_inputs(columns, rows)
    if at == 1:
        with pytest.raises(management.InterruptProcessingException):
            compare(toy, columns, rows, model=model)
        assert LCMCompare.fingerprint_inputs(columns, rows) == before
        return
    part = compare(toy, columns, rows, model=model)
    count = {4: 1, 9: 3}[at]
    assert torch.equal(part.result[1], whole.result[1][:count])
    assert part.result[2].splitlines() == whole.result[2].splitlines()[:count]
    text, values, warning = part.ui["lcm_lora_text"][0]
    assert warning and text.format(**values) == f"Interrupted: {count} of 6 pictures are drawn."
    assert part.result[0].shape == whole.result[0].shape
    assert LCMCompare.fingerprint_inputs(columns, rows) != before, "it runs again next time"


def test_an_interruption_leaves_nothing_beside_the_layers(toy):
    import comfy.model_management as management

    expected = one_by_one(toy)
    model = toy.model.clone()

    def call(apply_model, args):
        management.interrupt_current_processing(True)
        return apply_model(args["input"], args["timestep"], **args["c"])

    model.set_model_unet_function_wrapper(call)
    with pytest.raises(management.InterruptProcessingException):
        compare(toy, axis("weight", vector=2, values="0, 1"), model=model)
    hooks = [module for module in toy.model.model.modules() if module._forward_hooks]
    assert not hooks
    assert torch.equal(one_by_one(toy), expected)


@pytest.mark.parametrize(("pause", "shown"), [(0.0, 3), (60.0, 1)])
def test_progress_is_that_of_all_cells_and_shows_the_sheet(toy, monkeypatch, pause, shown):
    import comfy.utils
    from lcm_lora.nodes.compare import node

    monkeypatch.setattr(node, "PAUSE", pause)
    seen, before = [], comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(lambda *all, **_: seen.append(all))
    try:
        compare(toy, axis("steps", values="1, 2, 4"))
    finally:
        comfy.utils.set_progress_bar_global_hook(before)
    values = [value for value, *_ in seen]
    assert values == sorted(values) and values[-1] == 7
    assert {total for _, total, _ in seen} == {7}
    previews = [preview for *_, preview in seen if preview]
    assert len(previews) == shown and previews[0][1].size[0] > 3 * 64


@pytest.mark.parametrize(
    ("columns", "changes", "message"),
    [
        (axis("steps", values=""), {}, "nothing to compare for steps.*1, 2, 4, 8"),
        (axis("steps", values="4"), {}, "only '4'.*at least two.*rows to none"),
        (axis("steps", values="4, 4"), {}, "'4' appears twice"),
        (axis("steps", values="0, 4"), {}, "steps is 0; expected a number from 1 to 50"),
        (axis("steps", values="1.5, 4"), {}, "steps is 1.5; expected a whole number"),
        (axis("cfg", values="1, x"), {}, "'x' is not a number"),
        (axis("weight", vector=2, values="1:0:0.1"), {}, "starts above its end. Write 0:1:0.1"),
        (axis("weight", vector=2, values="0:1:0"), {}, "step of the range .* is 0"),
        (axis("weight", vector=3, values="0, 1"), {}, "vector 3, but the node has 2.*count"),
        (axis("weight", vector=2, values="0:1:0.0001"), {}, "10001 values; expected at most 256"),
        (axis("seed", values="1:200"), {"rows": axis("cfg", "rows", values="1, 2")}, "400 cells"),
        (axis("prompt", prompts=" \n"), {}, "nothing to compare for prompt"),
        (axis("prompt", prompts="a\nb"), {"clip": None}, "no CLIP is connected"),
        (axis("steps", values="1, 2"), {"positive": None}, "positive is not connected"),
        (axis("cfg", values="1, 2"), {"negative": None}, "negative is not connected"),
        (axis("steps", values="2, 8"), {"denoise": 0.1}, "8 steps do not fit"),
        (axis("LoRA file", vector=2, files="gone"), {}, "no LoRA file 'gone'"),
        (
            axis("settings", lines="steps=4, weight_2=1\nsteps=4, weight_2=0"),
            {"rows": axis("weight", "rows", vector=2, values="0, 1")},
            "both change weight_2. Set rows to none",
        ),
        (axis("settings", lines="steps=4\nstep=5"), {}, "no setting 'step'"),
        (axis("settings", lines="steps=4\ncfg"), {}, "'cfg' is not a setting"),
        (axis("settings", lines="steps=4\nweight_3=1"), {}, "the node has 2 vectors"),
    ],
)
def test_bad_input_gets_a_sentence_before_anything_is_drawn(toy, columns, changes, message):
    import comfy.utils

    drawn, before = [], comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(lambda *all, **_: drawn.append(all))
    try:
        with pytest.raises(ValueError, match=message):
            compare(toy, columns, **changes)
    finally:
        comfy.utils.set_progress_bar_global_hook(before)
    assert not drawn


def test_vectors_that_do_not_fit_are_refused(toy):
    """Of another architecture; and one that is not connected."""
    wide = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    toy.wires["sdxl"] = {
        f"{wide}.lora_up.weight": torch.ones(640, 2),
        f"{wide}.lora_down.weight": torch.ones(2, 2048),
    }
    with pytest.raises(ValueError, match="was made for .*SDXL.*but the model is"):
        compare(toy, axis("weight", vector=2, values="0, 1"), vectors=("lcm", "sdxl"))
    with pytest.raises(ValueError, match="vector_2 is not connected"):
        compare(toy, axis("steps", values="1, 2"), vectors=("lcm", None))


def test_one_vector_or_none_is_enough(toy):
    drawn = pictures(toy, axis("steps", values="1, 2"), vectors=(), weights=())
    assert torch.equal(drawn[1], one_by_one(toy, (), steps=2)[0])
    drawn = pictures(toy, axis("weight", vector=1, values="0, 1"), vectors=("lcm",), weights=(1.0,))
    for weight, picture in zip((0.0, 1.0), drawn, strict=True):
        assert_same(picture, one_by_one(toy, (("lcm", weight),))[0].double(), 1e-3)
