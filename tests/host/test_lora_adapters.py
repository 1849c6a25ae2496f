"""Adapters that are more than a sum, on a real model of the host, against their owners' merges."""

from __future__ import annotations

import pytest
import torch
from lcm_lora.tests.host.tiny_lora import dialects, patched_weights, some_layers, tiny_model
from lcm_lora.tests.unit.elsewhere import Arrivals, Elsewhere
from lcm_lora.tests.unit.owners import LYCORIS, of_lycoris, of_peft

STRENGTHS = (1.0, 0.5, -0.5, 2.0)


@pytest.fixture(scope="module")
def model(comfy):
    return tiny_model()


def made(model, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A file of this kind for some layers, and the merged weights by their keys."""
    tensors, expected, there = {}, {}, model.model.state_dict()
    for seed, (path, key) in enumerate(some_layers(model).items()):
        if kind == "PEFT":
            module, expected[key] = of_peft(f"unet.{path}", there[key].float(), seed)
        else:
            name = f"lora_unet_{path.replace('.', '_')}"
            module, expected[key] = of_lycoris(kind, name, there[key].float(), seed)
        tensors |= module
    return tensors, expected


def apply(model, tensors, strength=1.0):
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.host import apply

    patched, _, coverage = apply(model, None, parse(tensors, {}, "a"), strength, 0.0)
    assert coverage.taken == coverage.total and not coverage.left_over
    return patched


def assert_near(actual, expected, before) -> None:
    """Equal up to a thousandth of the change."""
    assert (actual - expected).norm() < 1e-3 * (expected - before).norm()
    assert (expected - before).norm() > 0.01 * before.norm()


@pytest.mark.parametrize("kind", [*LYCORIS, "PEFT"])
def test_a_strength_is_so_much_of_the_owners_change(model, kind):
    tensors, expected = made(model, kind)
    there = model.model.state_dict()
    for strength in STRENGTHS:
        actual = patched_weights(apply(model, tensors, strength))
        assert actual.keys() == expected.keys()
        for key, merged in expected.items():
            before = there[key].float()
            assert_near(actual[key], before + strength * (merged - before), before)


@pytest.mark.parametrize("kind", ["DoRA", "BOFT, bound and rescaled", "GLoRA"])
def test_the_host_patches_its_model_and_takes_the_patches_back(model, kind):
    """The host does this to sample and to save, also with a clone."""
    tensors, expected = made(model, kind)
    before = {key: model.model.state_dict()[key].clone() for key in expected}
    patched = apply(model, tensors).clone()
    patched.patch_model(device_to=torch.device("cpu"))
    try:
        for key, merged in expected.items():
            assert_near(patched.model.state_dict()[key], merged, before[key])
    finally:
        patched.unpatch_model()
    for key, weight in before.items():
        assert torch.equal(model.model.state_dict()[key], weight)


@pytest.mark.parametrize("kind", ["DoRA", "OFT, bound and rescaled", "GLoRA"])
def test_the_host_patches_weights_on_their_way_to_the_device(model, kind):
    """With little memory: each time the layer is used, in its number type, the patches moved into
    one buffer before where the host does that."""
    from comfy.model_patcher import LowVramPatch

    tensors, expected = made(model, kind)
    patched = apply(model, tensors)
    for key, merged in expected.items():
        before = model.model.state_dict()[key]
        patch = LowVramPatch(key, patched.patches, None, None)
        if hasattr(patch, "prepare"):
            patch.prepare(torch.zeros(patch.memory_required(), dtype=torch.uint8), None)
            assert patch.prepared_patches
        assert_near(patch(before.clone()), merged, before)
        half = patch(before.half()).float()
        assert (half - merged).norm() < 2e-3 * merged.norm()


@pytest.mark.parametrize("kind", ["DoRA", "OFT, bound and rescaled", "GLoRA"])
def test_a_weight_on_a_device_without_float64(model, kind):
    """This holds even if the file is in float64."""
    import comfy.lora

    tensors, expected = made(model, kind)
    patched = apply(model, {key: t.double() for key, t in tensors.items()}, 0.5)
    key, merged = next(iter(expected.items()))
    before = model.model.state_dict()[key].float()
    with Arrivals():
        actual = comfy.lora.calculate_weight(patched.patches[key], Elsewhere(before.clone()), key)
    assert actual.device.type == "mps"
    assert_near(actual.cpu(), before + 0.5 * (merged - before), before)


def test_the_hosts_patches_before_and_after(model):
    """A MODEL patched before: the magnitude is that of the weight as it comes. After: added."""
    import comfy.sd
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.opaque import merged

    tensors, _ = made(model, "DoRA")
    plain = {key: t for key, t in dialects(model)["kohya"].items()}
    host, _ = comfy.sd.load_lora_for_models(model, None, plain, 0.7, 0.0)
    with_plain, there = patched_weights(host), model.model.state_dict()
    before = patched_weights(apply(host, tensors, 0.5))
    after, _ = comfy.sd.load_lora_for_models(apply(model, tensors, 0.5), None, plain, 0.7, 0.0)
    after = patched_weights(after)
    vector = parse(tensors, {}, "a")
    for path, key in some_layers(model).items():
        parts = dict(vector.opaque[f"lora_unet_{path.replace('.', '_')}"])
        alpha = float(parts.pop("alpha"))
        actual = with_plain[key] + 0.5 * (merged(parts, alpha, with_plain[key]) - with_plain[key])
        assert_near(before[key], actual, with_plain[key])
        weight = there[key].float()
        change = 0.5 * (merged(parts, alpha, weight) - weight)
        assert_near(after[key], with_plain[key] + change, with_plain[key])


def test_what_the_hosts_trainer_bounds_is_not_divided_by_the_outputs(model):
    """OFTDiff takes alpha as the bound itself, where LyCORIS takes alpha times outputs."""
    from comfy.weight_adapter.oft import OFTDiff

    path, key = next(iter(some_layers(model).items()))
    weight = model.model.state_dict()[key].float()
    torch.manual_seed(0)
    trained = OFTDiff((torch.randn(4, 80, 80), None, 1.0, None))
    name = key.removesuffix(".weight")
    tensors = {f"{name}.{part}": t.detach() for part, t in trained.named_parameters()}
    assert tensors.keys() == {f"{name}.oft_blocks", f"{name}.alpha"}
    actual = patched_weights(apply(model, tensors))[key]
    assert_near(actual, trained(weight).detach(), weight)


def test_a_difference_in_another_shape_of_the_same_weight_is_added(model):
    """The host leaves out what is not of exactly the weight's shape, and logs it."""
    name = "diffusion_model.input_blocks.1.1.proj_in"
    before = model.model.state_dict()[f"{name}.weight"]
    assert before.shape[2:] == (1, 1)
    tensors = {f"{name}.diff": torch.ones(before.shape[:2]), f"{name}.diff_b": torch.ones(320, 1)}
    actual = patched_weights(apply(model, tensors, 0.5))
    for part in ("weight", "bias"):
        expected = model.model.state_dict()[f"{name}.{part}"] + 0.5
        torch.testing.assert_close(actual[f"{name}.{part}"], expected)


def test_a_magnitude_that_does_not_fit_is_named_and_not_applied(model):
    """What a file alone does not tell: it divides the columns, and is neither of the two sides."""
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.host import apply

    tensors = dialects(model)["kohya"]
    name = next(key for key in tensors if "resnets_0_conv1.lora_up" in key).split(".")[0]
    tensors[f"{name}.dora_scale"] = torch.ones(1, 160, 1, 1)
    _, _, coverage = apply(model, None, parse(tensors, {}, "a"), 1.0, 0.0)
    assert coverage.taken == coverage.total - 1
    assert f"{name} (its dora_scale is [1, 160, 1, 1]" in str(coverage)
    assert "neither one number for each output nor one for each input" in str(coverage)


@pytest.mark.parametrize("held", [False, True], ids=["at rest", "held by the host"])
def test_what_was_applied_is_extracted_again(model, held):
    """The whole difference; also while the host has patched the weights that both models share."""
    from lcm_lora.lora.weights.host import differences

    tensors, expected = made(model, "DoRA")
    before = {key: model.model.state_dict()[key].clone() for key in expected}
    patched = apply(model, tensors)
    if held:
        patched.patch_model(device_to=torch.device("cpu"))
    try:
        changes = {name: weight for name, weight, _ in differences(patched, model)
                   if weight is not None and weight.any()}  # fmt: skip
    finally:
        if held:
            patched.unpatch_model()
    assert len(changes) == len(expected)
    for path, key in some_layers(model).items():
        change = changes[f"lora_unet_{path.replace('.', '_')}"]
        torch.testing.assert_close(change, expected[key] - before[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["DoRA", "OFT, bound and rescaled"])
def test_a_part_of_a_fused_weight_is_merged_alone(model, kind):
    """The host addresses q, k and v of a fused weight as (key, (axis, start, length))."""
    import comfy.lora
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.weights.host import Merge

    torch.manual_seed(0)
    weight = torch.randn(3 * 320, 320)
    part = weight[320:640].clone()
    tensors, expected = of_lycoris(kind, "lora_unet_mid_block_attentions_0_proj_in", part, 1)
    (module,) = parse(tensors, {}, "a").opaque.values()
    patcher = model.clone()
    key = "diffusion_model.input_blocks.1.1.proj_in.weight"
    assert patcher.add_patches({(key, (0, 320, 320)): Merge.of(module)}, 0.5) == [
        (key, (0, 320, 320))
    ]
    merged = comfy.lora.calculate_weight(patcher.patches[key], weight.clone(), key)
    assert torch.equal(merged[:320], weight[:320]) and torch.equal(merged[640:], weight[640:])
    assert_near(merged[320:640], part + 0.5 * (expected - part), part)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "part", ["lora_down.weight", "dora_scale", "hada_w2_b", "diff", "diff_b", "8 bits"]
)
def test_numbers_that_are_none_are_refused_with_file_and_module(model, part, number):
    """A model with them draws black pictures, and nothing says which LoRA it was."""
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.host import apply as apply_vector

    tensors = dialects(model)["kohya"]
    name = next(key for key in tensors if key.endswith("attn1_to_q.lora_up.weight"))
    name = name.removesuffix(".lora_up.weight")
    if part == "hada_w2_b":
        del tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
        for side in ("1", "2"):
            tensors[f"{name}.hada_w{side}_a"] = torch.ones(320, 2)
            tensors[f"{name}.hada_w{side}_b"] = torch.ones(2, 320)
    elif part == "dora_scale":
        tensors[f"{name}.dora_scale"] = torch.ones(320, 1)
    elif part.startswith("diff"):
        tensors[f"{name}.{part}"] = torch.ones(320, 320) if part == "diff" else torch.ones(320)
    key = f"{name}.{'lora_down.weight' if part == '8 bits' else part}"
    if part == "diff_b":  # of a layer that has a bias
        wanted = name.replace("attn1_to_q", "attn1_to_out_0")
        tensors[f"{wanted}.diff_b"], name, key = tensors.pop(key), wanted, f"{wanted}.diff_b"
    apply_vector(model, None, parse(tensors, {}, "good"), 1.0, 0.0)
    tensors[key] = tensors[key].clone()
    tensors[key].view(-1)[7 % tensors[key].numel()] = number
    if part == "8 bits":  # which have no infinity in this format
        tensors[key] = tensors[key].nan_to_num(float("nan"), float("nan")).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=f"bad contains NaN or infinity in 1 of .* {name}: .*"):
        apply_vector(model, None, parse(tensors, {}, "bad"), 1.0, 0.0)
