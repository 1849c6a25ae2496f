"""Find LoRA Weights on a small real model in the real ComfyUI."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lcm_lora.tests.host.tiny_lora import dialects, tiny_model

PROMPTS = "a cat\na dog\na fox\na hen"


@pytest.fixture(scope="module")
def toy(toy_checkpoint):
    """.clip, .vae: of the demo model."""
    import comfy.sd

    _, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(toy_checkpoint))
    return SimpleNamespace(clip=clip, vae=vae)


@pytest.fixture(scope="module")
def model(toy):
    made = tiny_model()
    made.toy = toy
    return made


@pytest.fixture(scope="module")
def vectors(model):
    """An acceleration and two styles."""
    from lcm_lora.lora.formats.parse import parse

    made = []
    for seed, name in enumerate(("lcm", "ink", "oil")):
        tensors = dialects(model, seed=seed)["kohya"]
        tensors = {k: t * 0.4 if "lora_up" in k else t for k, t in tensors.items()}
        made.append(parse(tensors, {}, f"{name}.safetensors"))
    return made


def studio(model, vectors, steps=2, strengths=(1.0,), **changes):
    from lcm_lora.search.host import Settings, Studio

    settings = {
        "steps": steps, "cfg": 1.0, "seed": 5, "reference_steps": 6, "guidance": 2.0,
        "negative": "", "strengths": strengths,
    } | changes  # fmt: skip
    latent = {"samples": torch.zeros(1, 4, 4, 4)}
    count = len(strengths)
    ticks = []
    made = Studio(
        model, model.toy.clip, vectors[0], vectors[1 : 1 + count], latent, Settings(**settings),
        ticks.append,
    )  # fmt: skip
    made.ticks = ticks
    return made


def encoded(model, text):
    return model.toy.clip.encode_from_tokens_scheduled(model.toy.clip.tokenize(text))


def planted(studio, goal, prompts=("a cat", "a dog")):
    """What measures the distance to the pictures at known weights."""
    from lcm_lora.search.host import Measured
    from lcm_lora.search.objective import statistics

    parts = studio.parts(prompts, 0)
    measure = Measured(studio, parts, studio.reference(parts))
    measure.targets = studio.answers(goal, parts, measure.reference.states)
    measure.wanted = statistics(studio.draw(goal, parts))
    return measure


def test_the_pictures_are_those_of_lcm_ksampler(model, vectors):
    """The weights are those of the exact sum, and each picture keeps its noise in every batch."""
    from lcm_lora.lora.combine import exact
    from lcm_lora.lora.host import apply
    from lcm_lora.nodes.sampling import LCMKSampler

    work = studio(model, vectors)
    parts = work.parts(["a cat", "a dog"], 3)
    assert [part.numbers for part in parts] == [(3, 4)]
    drawn = work.draw((0.9, 0.6), parts)
    vector = exact(vectors[:2], (0.9, 0.6))[0]
    applied = apply(model, None, vector, 1.0, 0.0)[0]
    for number, prompt in ((3, "a cat"), (4, "a dog")):
        text = encoded(model, prompt)
        latent = {"samples": torch.zeros(1, 4, 4, 4), "batch_index": [number]}
        alone = LCMKSampler.execute(applied, 5, 2, 1.0, text, text, latent, 1.0).result[0]
        torch.testing.assert_close(
            alone["samples"], drawn[number - 3 : number - 2], rtol=1e-3, atol=1e-3
        )


def test_the_reference_is_what_comfyui_draws_in_many_steps(model, vectors):
    """Guided DDIM of ComfyUI at the same noise levels; and its states are on that way."""
    import comfy.sample
    import comfy.samplers
    from lcm_lora.lora.host import apply
    from lcm_lora.samplers.host import schedule

    work = studio(model, vectors, strengths=(0.7,))
    parts = work.parts(["a cat"], 0)
    reference = work.reference(parts)
    styled = apply(model, None, vectors[1], 0.7, 0.0)[0]
    empty = torch.zeros(1, 4, 4, 4)
    levels = torch.cat([schedule(work.fast.model, 6), work.sigmas]).unique().flip(0)
    seen = []
    theirs = comfy.sample.sample_custom(
        styled, comfy.sample.prepare_noise(empty, 5, [0]), 2.0,
        comfy.samplers.sampler_object("ddim"),
        levels, encoded(model, "a cat"),
        encoded(model, ""), empty, seed=5, disable_pbar=True,
        callback=lambda step, x0, x, total: seen.append(x.clone()),
    )  # fmt: skip
    torch.testing.assert_close(reference.latents, theirs, rtol=1e-3, atol=1e-3)
    for k, sigma in enumerate(work.sigmas[:-1]):
        at = seen[int((levels == sigma).nonzero())]
        torch.testing.assert_close(reference.states[:, k], at, rtol=1e-3, atol=1e-3)


def test_weights_are_found_by_which_the_targets_were_drawn(model, vectors):
    from lcm_lora.search.find import Search

    search = Search(planted(studio(model, vectors), (0.8, 0.5)), (1.0, 0.8), 0.0, 1.5, 40)
    list(search.steps())
    assert search.found().taken.weights == pytest.approx((0.8, 0.5), abs=0.01)
    assert len(search.points) <= 25


def execute(model, vectors, count=1, **changes):
    from lcm_lora.lora.formats.wire import to_wire
    from lcm_lora.nodes.search import LCMWeightSearch

    styles = {"count": str(count)}
    for number in range(1, count + 1):
        styles[f"style_{number}"] = to_wire(vectors[number])
        styles[f"strength_{number}"], styles[f"weight_{number}"] = 1.0, 0.8
    inputs = {
        "model": model, "clip": model.toy.clip, "vae": model.toy.vae,
        "acceleration": to_wire(vectors[0]),
        "acceleration_weight": 1.0, "count": styles, "latent": {"samples": torch.zeros(1, 4, 4, 4)},
        "prompts": PROMPTS, "steps": 2, "budget": 8, "seed": 5, "pictures": 3,
        "reference_steps": 4, "guidance": 2.0,
    }  # fmt: skip
    return LCMWeightSearch.execute(**inputs | changes)


def test_the_node(model, vectors, tmp_path):
    """Its vector is the sum at its weights, keeps the figures, and Combine takes the weights."""
    from lcm_lora.lora.combine import exact
    from lcm_lora.lora.formats import files
    from lcm_lora.lora.formats.describe import describe
    from lcm_lora.lora.formats.searched import SEARCH, read_weights
    from lcm_lora.lora.formats.wire import from_wire, to_wire
    from lcm_lora.nodes.combine import LCMLoRACombine

    output = execute(model, vectors)
    vector, weights, report, sheet, overlap = output.result
    numbers = read_weights(weights, ["lcm.safetensors", "ink.safetensors"])
    assert sheet.ndim == 4 and sheet.shape[-1] == 3 and 0 <= sheet.min() < sheet.max() <= 1
    assert overlap.ndim == 4 and overlap.shape[-1] == 3 and 0 <= overlap.min() < overlap.max() <= 1
    assert "Equally good" in report and weights in report
    found = from_wire(vector)
    wanted = exact(vectors[:2], numbers)[0]
    for name, delta in wanted.deltas.items():
        torch.testing.assert_close(found.deltas[name].matrix(), delta.matrix())
    figures = json.loads(found.metadata[SEARCH])
    assert [weight for _, weight in figures["weights"]] == numbers
    assert figures["steps"] == 2 and len(figures["prompts_sha256"]) == 64
    path = tmp_path / "found.safetensors"
    files.write(path, found, "fp32", False)
    info = describe(files.read_named(path, path.name))
    assert f"{numbers[1]:g} x ink.safetensors" in info and "4 prompts" in info
    count = {"count": "2", "weight_1": 9.0, "weight_2": 9.0}
    count |= {f"vector_{i}": to_wire(v) for i, v in enumerate(vectors[:2], 1)}
    again = LCMLoRACombine.execute(count, "exact", 0, 1.0, weights=weights).result[0]
    for name, delta in from_wire(again).deltas.items():
        torch.testing.assert_close(delta.matrix(), wanted.deltas[name].matrix())


def test_as_much_of_the_style_shows_as_is_wanted(model, vectors, monkeypatch):
    """Or of the weights that were measured, those that show most. The default shows less than is
    wanted, so it is not kept, even where it is nearer to the reference."""
    from lcm_lora.lora.formats.searched import SEARCH
    from lcm_lora.lora.formats.wire import from_wire
    from lcm_lora.search import session

    taken, real = [], session.at_least

    def watched(run, share, wanted, watch):
        point = real(run, share, wanted, watch)
        taken.append((point, share(point), [share(other) for other in run.points]))
        return point

    monkeypatch.setattr(session, "at_least", watched)
    latent = {"samples": torch.zeros(1, 4, 8, 8)}  # smaller ones have too few frequencies
    output = execute(model, vectors, latent=latent, budget=16, style_at_least=1.4)
    ((point, share, shares),) = taken
    assert shares[0] < 1.3 and share > shares[0], "or the default would do"
    assert share >= 1.395 or share == max(shares)
    figures = json.loads(from_wire(output.result[0]).metadata[SEARCH])
    assert figures["style_at_least"] == 1.4
    weights = [weight for _, weight in figures["weights"]]
    assert weights == pytest.approx(point.weights, abs=0.006)
    assert ("You set style_at_least to 140 %" in output.result[2]) == (
        figures["style_shown"] < 1.35
    )


def test_a_share_of_a_style_without_effect_is_refused_before_the_search(
    model, vectors, monkeypatch
):
    from lcm_lora.search.find import Search

    monkeypatch.setattr(Search, "measured", lambda *_: pytest.fail("something was measured"))
    style = vectors[1]
    nothing = replace(style, deltas={n: delta.scaled(0.0) for n, delta in style.deltas.items()})
    with pytest.raises(ValueError, match="style_at_least is set, but .* Set it to 0"):
        execute(model, [vectors[0], nothing], style_at_least=0.9)


def test_the_reference_is_drawn_once(model, vectors, monkeypatch):
    from lcm_lora.search import find, host

    def only_the_default(search):
        yield search.measured(search.default)

    monkeypatch.setattr(find.Search, "steps", only_the_default)
    drawn, two = [], {"prompts": "a cat\na dog", "pictures": 1}
    real = host.Studio.reference
    monkeypatch.setattr(host.Studio, "reference", lambda *a, **k: drawn.append(1) or real(*a, **k))
    execute(model, vectors, seed=77, **two)
    first = len(drawn)
    execute(model, vectors, seed=77, budget=9, highest=1.2, **two)
    assert first == len(drawn) == 3
    execute(model, vectors, seed=78, **two)
    assert len(drawn) == 6
    # Another encoding or another way to call the network leaves the patches as they are.
    clip, guided = model.toy.clip.clone(), model.clone()
    clip.clip_layer(-2)
    guided.set_model_sampler_cfg_function(lambda args: args["uncond"])
    execute(model, vectors, seed=78, clip=clip, **two)
    assert len(drawn) == 9
    guided.toy = model.toy
    execute(guided, vectors, seed=78, **two)
    assert len(drawn) == 12


def test_an_interruption_returns_what_is_found(model, vectors, monkeypatch):
    """ComfyUI raises it between two network calls."""
    import comfy.model_management as management
    from lcm_lora.nodes import search

    monkeypatch.setattr(
        search, "_show",
        lambda point, number: management.interrupt_current_processing(number == 4),
    )  # fmt: skip
    before = search.LCMWeightSearch.fingerprint_inputs()
    output = execute(model, vectors, seed=79)
    assert search.LCMWeightSearch.fingerprint_inputs() != before  # so that it runs again
    assert "Interrupted" in output.result[2]
    assert output.result[3].shape[-1] == 3 and output.result[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"budget": 2}, "between 6 and 200"),
        ({"lowest": 1.0, "highest": 1.0}, "expected a lower number first"),
        ({"lowest": 1.0, "highest": 0.5}, "expected a lower number first"),
        ({"highest": 0.9}, "outside the range"),
        ({"prompts": "# nothing\n# else"}, "no prompt in it"),
        ({"prompts": "a cat"}, "only one prompt"),
        ({"pictures": 0}, "expected 1 or more"),
        ({"latent": {"samples": torch.ones(1, 4, 4, 4)}}, "empty latent"),
    ],
)
def test_bad_input_gets_a_sentence(model, vectors, changes, says):
    with pytest.raises(ValueError, match=says):
        execute(model, vectors, **changes)


def test_a_model_with_an_acceleration_is_refused(model, vectors):
    from lcm_lora.samplers.host import patch_sampling

    with pytest.raises(ValueError, match="adds the acceleration itself"):
        patched = patch_sampling(model)
        patched.toy = model.toy
        execute(patched, vectors)


def test_a_reference_with_nan_is_refused(model, vectors):
    from dataclasses import replace

    broken = [vectors[0], replace(vectors[1], deltas={
        name: replace(delta, up=delta.up * float("nan"))
        for name, delta in vectors[1].deltas.items()
    })]  # fmt: skip
    with pytest.raises(ValueError, match="NaN"):
        execute(model, broken)


def test_a_style_for_another_architecture_is_refused(model, vectors):
    from lcm_lora.lora.formats.parse import parse

    module = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    tensors = {f"{module}.lora_up.weight": torch.ones(640, 2),
               f"{module}.lora_down.weight": torch.ones(2, 2048)}  # fmt: skip
    with pytest.raises(ValueError, match="made for"):
        execute(model, [vectors[0], parse(tensors, {}, "other.safetensors")])
