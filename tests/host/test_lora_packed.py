"""LoRAs on models with packed weights: the shape is the logical one, and what changes is the
unpacked weight."""

from __future__ import annotations

import pytest
import torch
from lcm_lora.tests.host import packed
from lcm_lora.tests.host.tiny_lora import dialects, factors, modules, tiny_model
from lcm_lora.tests.unit.owners import of_lycoris

FORMATS = (
    "float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise",
    "int8_tensorwise, rotated", "convrot_w4a4",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(comfy):
    return tiny_model()


def vector(tensors):
    from lcm_lora.lora.formats.parse import parse

    return parse(tensors, {}, "a")


def in_format(model, name: str):
    if name not in packed.formats():
        pytest.skip(f"this ComfyUI has no {name}")
    return packed.packed(model, name)


def unpacked(patcher, key) -> torch.Tensor:
    """The weight in float32 with its patches, by the host's own functions."""
    import comfy.lora
    from comfy.model_patcher import get_key_weight

    weight, _, convert = get_key_weight(patcher.model, key)
    dense = convert(weight.to(torch.float32, copy=True), inplace=True)
    return comfy.lora.calculate_weight(patcher.patches.get(key, []), dense, key)


def test_every_packed_format_of_the_host_is_tried(comfy):
    assert packed.formats().keys() <= set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_lora_lands_on_every_layer(model, name):
    from lcm_lora.lora.host import apply

    base = in_format(model, name)
    patched, _, coverage = apply(base, None, vector(dialects(model)["kohya"]), 0.7, 0.0)
    assert coverage.taken == coverage.total == len(modules(model)) and not coverage.left_over
    paths = {f"diffusion_model.{native}.weight": path for path, native in modules(model).items()}
    for key in packed.keys_of(model):
        up, down = factors(model)[paths[key]]
        expected = unpacked(base, key) + 0.7 * up @ down
        torch.testing.assert_close(unpacked(patched, key), expected, rtol=1e-4, atol=1e-5)
    # And the host packs it again.
    expected = unpacked(patched, key)
    patched.patch_weight_to_device(key)
    actual = patched.model.get_parameter(key).dequantize()
    patched.unpatch_model()
    assert 0 < (actual - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize("name", FORMATS)
def test_a_dora_is_of_the_unpacked_weight(model, name):
    from lcm_lora.lora.host import apply

    base, tensors, expected = in_format(model, name), {}, {}
    paths = {f"diffusion_model.{native}.weight": path for path, native in modules(model).items()}
    for key in packed.keys_of(model):
        name = f"lora_unet_{paths[key].replace('.', '_')}"
        module, expected[key] = of_lycoris("DoRA", name, unpacked(base, key), 1)
        tensors |= module
    patched, _, coverage = apply(base, None, vector(tensors), 1.0, 0.0)
    assert coverage.taken == coverage.total == len(expected)
    for key, merged in expected.items():
        torch.testing.assert_close(unpacked(patched, key), merged, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_applied_is_extracted_from_a_packed_model(model, name):
    from lcm_lora.lora.host import apply
    from lcm_lora.lora.weights.host import differences

    base, expected = in_format(model, name), vector(dialects(model)["kohya"])
    patched, _, _ = apply(base, None, expected, 0.5, 0.0)
    actual = {name: weight for name, weight, _ in differences(patched, base)
             if weight is not None and weight.any()}  # fmt: skip
    assert actual.keys() == expected.deltas.keys()
    for name, change in actual.items():
        matrix = 0.5 * expected.deltas[name].matrix().reshape(change.shape)
        torch.testing.assert_close(change, matrix, rtol=1e-4, atol=1e-5)
    # A packed model and the one it was made of differ by what packing loses.
    lost = dict((name, weight) for name, weight, _ in differences(base, model))
    for key in packed.keys_of(model):
        native = key.removeprefix("diffusion_model.").removesuffix(".weight")
        path = next(path for path, its in modules(model).items() if its == native)
        change = lost[f"lora_unet_{path.replace('.', '_')}"]
        assert 0 < change.norm() < 0.3 * unpacked_plain(model, key).norm()


def unpacked_plain(model, key):
    return model.model.state_dict()[key].float()


def test_a_layer_that_scales_its_inputs(model):
    """W (s x), ModelOpt's smoothing: the LoRA is of the inputs before that."""
    from comfy.quant_ops import QUANT_ALGOS
    from lcm_lora.lora.host import apply
    from lcm_lora.lora.weights.host import differences

    base, scale = in_format(model, "nvfp4"), 0.5 + torch.rand(320)
    if "pre_quant_scale" not in QUANT_ALGOS["nvfp4"]["parameters"]:
        pytest.skip("this ComfyUI scales no inputs")
    key = packed.keys_of(model)[0]
    layer = base.model.get_submodule(key.removesuffix(".weight"))
    layer.pre_quant_scale = torch.nn.Parameter(scale, requires_grad=False)
    tensors = dialects(model)["kohya"]
    patched, _, coverage = apply(base, None, vector(tensors), 0.5, 0.0)
    assert not coverage.left_over
    x = torch.randn(3, 320)
    native = key.removeprefix("diffusion_model.").removesuffix(".weight")
    path = next(path for path, its in modules(model).items() if its == native)
    up, down = factors(model)[path]
    plain = layer(x)
    layer.weight_function = [lambda weight: _patched(patched, key, weight)]
    try:
        change = layer(x) - plain
    finally:
        layer.weight_function = []
    torch.testing.assert_close(change, 0.5 * x @ down.T @ up.T, rtol=1e-2, atol=1e-2)
    actual = {name: weight for name, weight, _ in differences(patched, base) if weight is not None}
    torch.testing.assert_close(actual[f"lora_unet_{path.replace('.', '_')}"], 0.5 * up @ down,
                               rtol=1e-3, atol=1e-4)  # fmt: skip
    name = f"lora_unet_{path.replace('.', '_')}"
    tensors[f"{name}.dora_scale"] = torch.ones(320, 1)
    _, _, coverage = apply(base, None, vector(tensors), 0.5, 0.0)
    assert len(coverage.left_over) == 1 and "multiplies its inputs by a scale" in str(coverage)


def _patched(patcher, key, weight):
    import comfy.lora

    return comfy.lora.calculate_weight(patcher.patches[key], weight.clone(), key)


def test_a_gguf_model_takes_every_module_and_is_not_extracted(comfy):
    import comfy.lora
    from lcm_lora.lora.host import apply
    from lcm_lora.lora.weights.host import differences

    plain = tiny_model()
    base = packed.as_gguf(tiny_model())
    key = packed.keys_of(base)[0]
    assert tuple(base.model.state_dict()[key].shape) == (320, 340)
    patched, _, coverage = apply(base, None, vector(dialects(plain)["kohya"]), 0.7, 0.0)
    assert coverage.taken == coverage.total == len(modules(plain)) and not coverage.left_over
    native = {path: f"diffusion_model.{its}.weight" for path, its in modules(plain).items()}
    for path, (up, down) in factors(plain).items():
        if native[path] in packed.keys_of(base):
            weight = packed.unpack(base.model.get_parameter(native[path]))
            actual = comfy.lora.calculate_weight(
                patched.patches[native[path]], weight.clone(), native[path]
            )
            torch.testing.assert_close(actual, weight + 0.7 * up @ down, rtol=1e-4, atol=1e-5)
    for pair in ((patched, plain), (plain, patched)):
        with pytest.raises(ValueError, match="packed as torch.uint8 in a way that only the nodes"):
            list(differences(*pair))


class OfAnotherPack(torch.nn.Parameter):
    """As bitsandbytes' Params4bit: a parameter of bytes that only its own layer reads."""


@pytest.mark.parametrize("kind", [torch.nn.Parameter, OfAnotherPack])
def test_integers_that_nobody_unpacks_are_named_and_not_applied(model, kind):
    """A pack that stores integers beside a scale, on the host's own patcher: it would add to the
    integers, or fail with a line in the log."""
    from lcm_lora.lora.host import apply

    base = tiny_model()
    key = packed.keys_of(base)[0]
    layer = base.model.get_submodule(key.removesuffix(".weight"))
    integers = (layer.weight * 1000).round().to(torch.int8)
    layer.weight = kind(integers, requires_grad=False)
    _, _, coverage = apply(base, None, vector(dialects(model)["kohya"]), 1.0, 0.0)
    assert len(coverage.left_over) == 1
    assert "stored as torch.int8, to which ComfyUI cannot add" in str(coverage)
