"""LoRA vectors on a real model of the host: every dialect lands whole, sums are sums."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from lcm_lora.tests.host.tiny_lora import dialects, factors, modules, patched_weights, tiny_model
from safetensors.torch import load_file, save_file

ALL = ["kohya", "kohya native", "native", "diffusers", "peft", "old"]
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"


@pytest.fixture(scope="module")
def model(comfy):
    return tiny_model()


@pytest.fixture
def loras(comfy) -> Path:
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def vector(tensors, source="a.safetensors"):
    from lcm_lora.lora.formats.parse import parse

    return parse(tensors, {}, source)


def apply(model, tensors, strength=1.0, clip=None, strength_clip=1.0):
    from lcm_lora.lora.host import apply

    return apply(model, clip, vector(tensors), strength, strength_clip)


@pytest.mark.parametrize("dialect", ALL)
def test_every_dialect_patches_every_module_alike(model, dialect):
    patched, _, coverage = apply(model, dialects(model)[dialect], 0.7)
    assert coverage.taken == coverage.total == len(modules(model)) and not coverage.left_over
    weights, before = patched_weights(patched), model.model.state_dict()
    assert not model.patches, "the incoming model is not touched"
    for path, (up, down) in factors(model).items():
        key = f"diffusion_model.{modules(model)[path]}.weight"
        delta = (0.7 * up.flatten(1) @ down.flatten(1)).reshape(before[key].shape)
        torch.testing.assert_close(weights[key], before[key] + delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("per_level", "depth", "depth_out", "middle"),
    [
        pytest.param([2] * 4, [1] * 6 + [0] * 2, [1] * 9 + [0] * 3, 1, id="SD1.5"),
        pytest.param([2] * 3, [0, 0, 2, 2, 10, 10], [0] * 3 + [2] * 3 + [10] * 3, 10, id="SDXL"),
        pytest.param([2] * 3, [0, 0, 2, 2, 4, 4], [0] * 3 + [1, 1, 2, 10, 4, 4], -1, id="SSD-1B"),
        pytest.param([1] * 3, [0, 2, 5], [0, 0, 2, 2, 5, 5], -2, id="KOALA"),
    ],
)
def test_native_names_are_the_hosts_for_every_module(comfy, per_level, depth, depth_out, middle):
    import comfy.utils
    from lcm_lora.lora.formats.module_names import canonical_names

    config = {
        "num_res_blocks": per_level,
        "channel_mult": per_level,
        "transformer_depth": depth,
        "transformer_depth_output": depth_out,
        "transformer_depth_middle": middle,
    }
    expected = {
        f"diffusion_model.{native.removesuffix('.weight')}": path
        for path, native in comfy.utils.unet_to_diffusers(config).items()
        # Another name for add_embedding.
        if native.endswith(".weight") and not path.startswith("class_embedding")
    }
    paths = {path.removesuffix(".weight") for path in expected.values()}
    again = canonical_names(path.replace("add_embedding", "class_embedding") for path in paths)
    assert set(again.values()) == {f"lora_unet_{path.replace('.', '_')}" for path in paths}
    for native, name in canonical_names(expected).items():
        path = expected[native].removesuffix(".weight").replace(".", "_")
        assert name == f"lora_unet_{path}"
    assert len(expected) > 200


def test_our_wire_is_taken_whole_by_the_hosts_own_loader(model):
    import comfy.sd
    from lcm_lora.lora.formats.wire import to_wire

    wire = to_wire(vector(dialects(model)["peft"]))
    patched, _ = comfy.sd.load_lora_for_models(model, None, wire, 1.0, 0.0)
    assert len(patched.patches) == len(modules(model))


def test_two_applications_equal_one_of_the_sum(model):
    from lcm_lora.lora.combine import exact
    from lcm_lora.lora.host import apply

    lcm = vector(dialects(model, rank=4)["kohya"])
    style = vector(dialects(model, rank=7, seed=1)["peft"])
    twice = apply(apply(model, None, lcm, 1.0, 0)[0], None, style, -0.8, 0)[0]
    once = apply(model, None, exact([lcm, style], [1.0, -0.8])[0], 1.0, 0)[0]
    one, two = patched_weights(once), patched_weights(twice)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-5, atol=1e-6)


def test_full_differences_of_the_hosts_trainer_are_added(model):
    tensors = dialects(model)["native"]
    tensors["diffusion_model.input_blocks.1.1.norm.diff"] = torch.ones(320)
    tensors["diffusion_model.input_blocks.1.1.norm.diff_b"] = torch.ones(320)
    patched, _, coverage = apply(model, tensors, 0.5)
    assert coverage.taken == len(modules(model)) + 1
    for part in ("weight", "bias"):
        key = f"diffusion_model.input_blocks.1.1.norm.{part}"
        expected = model.model.state_dict()[key] + 0.5
        torch.testing.assert_close(patched_weights(patched)[key], expected)


def test_a_sum_with_factors_and_a_full_difference_of_one_module_adds_both(model):
    key = "diffusion_model.time_embed.0"
    tensors = {f"{key}.lora_up.weight": torch.ones(1280, 1), f"{key}.diff": torch.ones(1280, 320)}
    tensors[f"{key}.lora_down.weight"] = torch.ones(1, 320)
    patched, _, _ = apply(model, tensors)
    expected = model.model.state_dict()[f"{key}.weight"] + 2
    torch.testing.assert_close(patched_weights(patched)[f"{key}.weight"], expected)
    # The host's own loader keeps one change per weight.
    from comfy.sd import load_lora_for_models
    from lcm_lora.lora.formats.wire import to_wire

    theirs, _ = load_lora_for_models(model, None, to_wire(vector(tensors)), 1.0, 0)
    torch.testing.assert_close(patched_weights(theirs)[f"{key}.weight"], expected)


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_of_another_family_is_refused_by_name(model, dora):
    name = "lora_unet_down_blocks_2_attentions_0_transformer_blocks_9_attn2_to_k"
    tensors = {f"{name}.lora_up.weight": torch.ones(1280, 2)}
    tensors[f"{name}.lora_down.weight"] = torch.ones(2, 2048)
    if dora:
        tensors[f"{name}.dora_scale"] = torch.ones(1280, 1)
    words = r"a.safetensors was made for SDXL \(.*2048\), but the model is SD1.5 \(.*768\)"
    with pytest.raises(ValueError, match=words):
        apply(model, tensors)


def test_a_lora_of_which_nothing_fits_is_refused(model):
    tensors = {"lora_unet_double_blocks_0_img.lora_up.weight": torch.ones(8, 2)}
    tensors["lora_unet_double_blocks_0_img.lora_down.weight"] = torch.ones(2, 8)
    with pytest.raises(ValueError, match="takes none of the 1 modules.*double_blocks_0_img"):
        apply(model, tensors)


def test_left_over_modules_are_named_and_the_rest_is_applied(model, caplog):
    tensors = dialects(model)["kohya"]
    tensors["lora_unet_up_blocks_3_x.lora_up.weight"] = torch.ones(8, 2)
    tensors["lora_unet_up_blocks_3_x.lora_down.weight"] = torch.ones(2, 8)
    tensors["lora_unet_conv_in.lora_up.weight"] = torch.ones(320, 2, 1, 1)
    tensors["lora_unet_conv_in.lora_down.weight"] = torch.ones(2, 9, 3, 3)
    with caplog.at_level(logging.WARNING, "lcm_lora"):
        patched, _, coverage = apply(model, tensors)
    assert coverage.taken == len(patched.patches) == len(modules(model))
    assert coverage.left_over == (
        "lora_unet_conv_in (shape [320, 9, 3, 3], the model has [320, 4, 3, 3])",
        "lora_unet_up_blocks_3_x (not in the model)",
    )
    assert "2 left over: lora_unet_conv_in (shape" in caplog.text


def test_a_module_for_a_layer_of_another_size_is_reported_whatever_its_kind(model):
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {f"{name}.oft_blocks": torch.zeros(3, 4, 4)}
    with pytest.raises(ValueError, match=r"shape \[12\], the model has"):
        apply(model, tensors)


def test_strength_zero_leaves_the_model_as_it_is(model):
    patched, _, coverage = apply(model, dialects(model)["kohya"], 0.0)
    assert patched is not model and not patched.patches and coverage.taken == 0


def text_lora() -> dict[str, torch.Tensor]:
    return {
        f"{TEXT}.lora_up.weight": torch.ones(3072, 2),
        f"{TEXT}.lora_down.weight": torch.ones(2, 768),
    }


def test_text_encoder_modules_without_a_clip_are_mentioned_not_missed(model, caplog):
    _, clip, coverage = apply(model, dialects(model)["kohya"] | text_lora())
    assert clip is None and coverage.skipped == 1 and not coverage.left_over
    assert "1 not used here (no CLIP connected" in str(coverage) and not caplog.records


def test_a_lora_for_the_text_encoder_alone_needs_a_clip(model):
    with pytest.raises(ValueError, match="text encoder modules only"):
        apply(model, text_lora())


LAYER = "text_model.encoder.layers.0.mlp.fc1.weight"


def text_clip():
    """A CLIP of one layer."""
    import comfy.sd

    return comfy.sd.load_text_encoder_state_dicts(
        [{LAYER.replace("fc1", "fc2"): torch.zeros(768, 3072), LAYER: torch.zeros(3072, 768)}],
        clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION,
        model_options={"clip_l_model_config": {"num_hidden_layers": 1}},
    )


def test_the_text_encoder_is_patched_where_a_clip_is_connected(model):
    clip = text_clip()
    tensors = dialects(model)["kohya"] | text_lora()
    patched, new_clip, coverage = apply(model, tensors, 1.0, clip, 0.5)
    assert coverage.taken == coverage.total == len(modules(model)) + 1
    ((key, patches),) = new_clip.patcher.patches.items()
    assert key.endswith(LAYER) and patches[0][0] == 0.5 and not clip.patcher.patches
    assert len(patched.patches) == len(modules(model))


def test_a_dora_of_the_text_encoder(model):
    """The same merge as in the UNet: the zeros of this layer become the LoRA's direction."""
    tensors = text_lora()
    tensors[f"{TEXT}.dora_scale"] = torch.full((3072, 1), 2.0)
    _, clip, coverage = apply(model, dialects(model)["kohya"] | tensors, 1.0, text_clip(), 0.5)
    assert not coverage.left_over
    (weight,) = patched_weights(clip.patcher).values()
    torch.testing.assert_close(weight.norm(dim=1), torch.full((3072,), 0.5 * 2.0))


def test_the_nodes_load_combine_save_and_offer_the_file(model, loras):
    from lcm_lora.nodes import vectors as nodes
    from lcm_lora.nodes.combine import LCMLoRACombine

    save_file(dialects(model, rank=4)["kohya"], loras / "lcm.safetensors")
    save_file(dialects(model, rank=7, seed=1)["diffusers"], loras / "style.safetensors")
    (lcm, info), (style, _) = (
        nodes.LCMLoRAVectorLoader.execute(name).result
        for name in ("lcm.safetensors", "style.safetensors")
    )
    assert f"SD1.5 (cross-attention width 768)\n{len(modules(model))} modules" in info
    count = {"count": "2", "vector_1": lcm, "weight_1": 1.0, "vector_2": style, "weight_2": 0.8}
    combined, report, _ = LCMLoRACombine.execute(count, "exact", 0, 1.0).result
    assert "rank 11" in report
    (name,) = nodes.LCMLoRASave.execute(combined, "made/both", "fp32", False).result
    assert Path(name) == Path("made/both.safetensors")
    offered = nodes.LCMLoRAVectorLoader.INPUT_TYPES()["required"]["lora_name"][1]["options"]
    assert name in offered
    patched, _ = nodes.LCMLoRAApply.execute(model, combined, 1.0, 1.0).result
    again, _ = nodes.LCMLoRAApply.execute(model, load_file(loras / name), 1.0, 1.0).result
    weights = patched_weights(again)
    for key, weight in patched_weights(patched).items():
        torch.testing.assert_close(weights[key], weight)
    with pytest.raises(ValueError, match="both.safetensors exists already"):
        nodes.LCMLoRASave.execute(combined, "made/both", "fp32", False)
    with pytest.raises(ValueError, match="cannot be used"):
        nodes.LCMLoRASave.execute(combined, "../both", "fp32", False)


@pytest.mark.parametrize(("rank", "energy"), [(8, 1.0), (0, 0.9)])
def test_settings_that_exact_cannot_honour_are_refused(comfy, rank, energy):
    from lcm_lora.nodes.combine import LCMLoRACombine

    with pytest.raises(ValueError, match="set rank to 0, keep_energy to 1"):
        LCMLoRACombine.execute({"count": "2"}, "exact", rank, energy)


def test_svd_makes_the_same_sum_smaller_and_reports_its_error(model):
    from lcm_lora.lora.formats.wire import from_wire, to_wire
    from lcm_lora.nodes.combine import LCMLoRACombine

    one, two = (vector(dialects(model, 4, seed)["kohya"]) for seed in (0, 1))
    count = {"count": "2", "vector_1": to_wire(one), "vector_2": to_wire(two)}
    count |= {"weight_1": 1.0, "weight_2": 0.8}
    exact = from_wire(LCMLoRACombine.execute(count, "exact", 0, 1.0).args[0])
    reduced, report, _ = LCMLoRACombine.execute(count, "svd", 5, 1.0).args
    truncated = from_wire(reduced)
    assert {delta.rank for delta in truncated.deltas.values()} == {5}
    lost = total = 0.0
    for name, delta in exact.deltas.items():
        lost += float((truncated.deltas[name].matrix() - delta.matrix()).square().sum())
        total += float(delta.matrix().square().sum())
    assert f"relative error {(lost / total) ** 0.5:.2e}" in report


def test_a_count_shows_its_vectors_and_weights(comfy):
    """What the host makes of a prompt's dotted inputs, by its own code."""
    from comfy_api.latest import _io
    from lcm_lora.nodes.combine import LCMLoRACombine

    live = {"count": "3", "method": "exact", "rank": 0, "keep_energy": 1.0}
    live |= {f"count.weight_{i}": float(i) for i in (1, 2, 3)}
    inputs, _, data = _io.get_finalized_class_inputs(LCMLoRACombine.INPUT_TYPES(), live)
    expected = [f"count.{kind}_{i}" for i in (1, 2, 3) for kind in ("vector", "weight")]
    assert [name for name in inputs["required"] if name.startswith("count.")] == expected
    nested = _io.build_nested_inputs(dict(live), data)
    assert nested["count"]["count"] == "3" and nested["count"]["weight_3"] == 3.0


def test_what_was_applied_in_the_graph_is_extracted_again(model):
    """A LoRA, a bias and a norm are applied; the difference to the model is what was applied."""
    from lcm_lora.lora.extract import extract
    from lcm_lora.lora.formats.wire import from_wire
    from lcm_lora.lora.weights.host import differences
    from lcm_lora.nodes.extract import LCMLoRAExtract

    tensors = dialects(model)["kohya"]
    there = model.model.state_dict()
    norm = "diffusion_model.input_blocks.1.0.in_layers.0"
    tensors |= {f"{norm}.diff": torch.randn(there[f"{norm}.weight"].shape)}
    tensors |= {f"{norm}.diff_b": torch.randn(there[f"{norm}.bias"].shape)}
    changed, _, coverage = apply(model, tensors, 0.5)
    assert coverage.taken == coverage.total
    wire, report = LCMLoRAExtract.execute(changed, model, 4).args
    extracted, expected = from_wire(wire), vector(tensors)
    assert extracted.modules() == expected.modules()
    for name, delta in expected.deltas.items():
        assert (
            extracted.deltas[name].matrix() - 0.5 * delta.matrix()
        ).norm() < 1e-4 * delta.matrix().norm()
    for name, diff in expected.diffs.items():
        torch.testing.assert_close(extracted.diffs[name], 0.5 * diff, rtol=1e-4, atol=1e-5)
    assert "100.000 % of the energy kept" in report
    with pytest.raises(ValueError, match="do not differ"):
        extract(differences(model, model.clone()), 4, 0, "x")


def test_a_stack_does_what_its_loras_do_one_after_the_other(model, loras, comfy):
    import comfy.sd
    from lcm_lora.nodes.stack import LCMLoRAFromStack, LCMLoRAToStack

    clip = text_clip()
    for name, seed in (("one", 3), ("two", 4)):
        tensors = dialects(model, 3 + seed, seed)["kohya"] | text_lora()
        save_file(tensors, loras / f"{name}.safetensors")
    stack, theirs = None, (model, clip)
    for name, strength, text in (("one", 0.7, 0.4), ("two", -0.3, 1.1)):
        file = f"{name}.safetensors"
        (stack,) = LCMLoRAToStack.execute(file, strength, text, stack).args
        theirs = comfy.sd.load_lora_for_models(*theirs, load_file(loras / file), strength, text)
    assert stack == [("one.safetensors", 0.7, 0.4), ("two.safetensors", -0.3, 1.1)]
    wire, report = LCMLoRAFromStack.execute([*stack, ("None", 1.0, 1.0)]).args
    assert "1 x two.safetensors [model -0.3, CLIP 1.1]" in report and "rank 4 to 13" in report
    ours = apply(model, wire, 1.0, clip, 1.0)
    for pair in zip(ours[:2], theirs, strict=True):
        actual, expected = (
            patched_weights(target if hasattr(target, "patches") else target.patcher)
            for target in pair
        )
        assert actual.keys() == expected.keys() and actual
        for key, weight in expected.items():
            torch.testing.assert_close(actual[key], weight, rtol=1e-5, atol=1e-6)


def test_what_only_a_name_tells_of_a_stacks_lora_goes_into_the_sum(model, loras):
    from lcm_lora.lora.atomic import sha256
    from lcm_lora.lora.family import FAMILY
    from lcm_lora.lora.formats.metadata import RECIPE
    from lcm_lora.nodes.stack import LCMLoRAFromStack

    path = loras / "hyper-sd-8steps.safetensors"
    save_file(dialects(model)["kohya"], path)
    wire, _ = LCMLoRAFromStack.execute([(path.name, 1.0, 1.0)]).args
    assert wire.metadata[FAMILY] == "hyper-sd"
    assert sha256(path) in wire.metadata[RECIPE]


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        ([], "is empty"),
        (None, "is empty"),
        ([("one.safetensors", 0, 0)], "all its strengths are 0"),
        ([("one.safetensors", 1.0)], "expected .file name, model strength, CLIP strength"),
        (["one.safetensors"], "expected .file name"),
        ([("one.safetensors", float("nan"), 1.0)], "one.safetensors has the strengths nan and 1.0"),
        ([("one.safetensors", 1, float("inf"))], "one.safetensors has the strengths 1 and inf"),
    ],
)
def test_a_stack_that_is_none_is_explained(comfy, stack, words):
    from lcm_lora.nodes.stack import LCMLoRAFromStack

    with pytest.raises(ValueError, match=words):
        LCMLoRAFromStack.execute(stack)


@pytest.mark.parametrize("strength", [0.8, 1.0])
def test_a_file_of_a_stack_that_is_no_sum_is_refused_at_any_strength(loras, strength):
    from lcm_lora.nodes.stack import LCMLoRAFromStack

    name = "lora_unet_conv_in"
    tensors = {f"{name}.lora_up.weight": torch.ones(8, 2), f"{name}.dora_scale": torch.ones(8, 1)}
    tensors |= {f"{name}.lora_down.weight": torch.ones(2, 8)} | text_lora()
    save_file(tensors, loras / "dora.safetensors")
    words = "dora.safetensors holds DoRA weights.* with Apply LoRA Vector"
    with pytest.raises(ValueError, match=words):
        LCMLoRAFromStack.execute([("dora.safetensors", strength, strength)])
    wire, _ = LCMLoRAFromStack.execute([("dora.safetensors", 0, strength)]).args
    assert {key.partition(".")[0] for key in wire} == {TEXT}


def test_the_nodes_for_parts_and_rules(model):
    from lcm_lora.lora.formats.wire import from_wire, to_wire
    from lcm_lora.nodes.combine import LCMLoRACombine
    from lcm_lora.nodes.weigh import LCMLoRABlocks, LCMLoRAProtect

    lcm, style = (to_wire(vector(dialects(model, 4, seed)["kohya"], str(seed))) for seed in (0, 1))
    (attention,) = LCMLoRABlocks.execute(style, "attention only", "output=0.5", 1.0).args
    names = from_wire(attention).deltas
    assert names and all("attentions" in name for name in names)
    assert attention.source == "1 [attention=1, rest=0; output=0.5]"
    clear, report = LCMLoRAProtect.execute(style, lcm, 1.0).args
    assert "% of the energy of 1 removed" in report
    count = {"count": "2", "vector_1": lcm, "vector_2": clear, "weight_1": 1.0, "weight_2": 0.8}
    merged, report, _ = LCMLoRACombine.execute(count, "ties", 6, 1.0, 0.0, 0.5, 0).args
    assert {delta.rank for delta in from_wire(merged).deltas.values()} == {6}
    assert "Rank 8 becomes 6" in report
    by_error, report, _ = LCMLoRACombine.execute(count, "svd", 0, 1.0, 0.3).args
    assert 0.25 < float(report.split("relative error ")[1].split(".\n")[0]) <= 0.3
    assert "Cosine of 1 and 2" in report
    with pytest.raises(ValueError, match="The method ties reduces only to a rank"):
        LCMLoRACombine.execute(count, "ties", 6, 0.9)


def test_names_without_modules_are_reported_and_misspelt_blocks_are_refused(model, monkeypatch):
    from lcm_lora.lora.blocks import PRESETS
    from lcm_lora.lora.formats.wire import to_wire
    from lcm_lora.nodes.weigh import LCMLoRABlocks

    wire = to_wire(vector(dialects(model)["kohya"], "style"))
    output = LCMLoRABlocks.execute(wire, "all", "input=0.5, down_blocks_0=2", 1.0)
    assert output.ui == {"lcm_lora_text": []}
    monkeypatch.setitem(PRESETS, "of another family", "up_blocks_9=0")
    output = LCMLoRABlocks.execute(wire, "of another family", "", 0.5)
    ((text, values, _),) = output.ui["lcm_lora_text"]
    assert text.format(**values) == "style has no modules for up_blocks_9, text."
    with pytest.raises(ValueError, match="down_blocks_9 fits no module of style"):
        LCMLoRABlocks.execute(wire, "all", "down_blocks_9=0", 1.0)


@pytest.mark.parametrize(
    ("processor", "expected"),
    [("cuda:0", "cuda"), ("cpu", "cpu"), ("mps", "cpu"), ("xpu", "cpu"), ("privateuseone", "cpu")],
)
def test_whole_changes_are_worked_on_where_there_are_decompositions(comfy, monkeypatch, processor,
                                                                    expected):  # fmt: skip
    import comfy.model_management
    from lcm_lora.nodes.host import device

    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device(processor))
    assert device().type == expected
