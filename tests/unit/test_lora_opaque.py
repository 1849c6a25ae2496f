"""DoRA, OFT, BOFT and GLoRA, against the weights that the owners of the formats make."""

import pytest
import torch
from lcm_lora.lora.formats.files import read, write
from lcm_lora.lora.formats.parse import parse
from lcm_lora.lora.formats.wire import from_wire, to_wire
from lcm_lora.lora.opaque import merged
from lcm_lora.tests.unit.owners import LYCORIS, of_lycoris, of_peft

NAME = "lora_unet_down_blocks_0_resnets_0_conv1"
SHAPES = {"linear": (32, 48), "square": (32, 32), "conv": (32, 16, 3, 3), "1x1": (32, 32, 1, 1)}
OPAQUE = [kind for kind in LYCORIS if not kind.startswith("Lo")]


def weight_of(shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def merged_with(vector, weight, name=NAME) -> torch.Tensor:
    parts = dict(vector.opaque[name])
    alpha = float(parts.pop("alpha")) if "alpha" in parts else None
    return merged(parts, alpha, weight)


def assert_merges(tensors, expected, weight) -> None:
    """The vector as it is read, after a wire, and after a file."""
    vector = parse(tensors, {}, "a")
    assert not vector.ignored and vector.modules() == {NAME}
    before = weight.clone()
    for copy in (vector, from_wire(to_wire(vector))):
        actual = merged_with(copy, weight)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(weight, before), "the weight itself is left alone"
    assert (expected - weight).norm() > 0.05 * weight.norm(), "there is something to compare"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("kind", OPAQUE)
def test_what_lycoris_merges(kind, shape):
    weight = weight_of(shape)
    assert_merges(*of_lycoris(kind, NAME, weight, 1), weight)


@pytest.mark.parametrize("spelling", ["lora_unet_", "unet.", "base_model.model."])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_what_peft_merges(shape, spelling):
    weight, path = weight_of(shape), "down_blocks.0.resnets.0.conv1"
    name = spelling + (path.replace(".", "_") if spelling.endswith("_") else path)
    assert_merges(*of_peft(name, weight, 1), weight)


@pytest.mark.parametrize("form", ["[out]", "[1, out]", "[out, 1]", "magnitude", "in diffusers"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_every_form_of_a_magnitude_of_the_outputs(shape, form):
    """The magnitudes of PEFT under another name: ai-toolkit's, or those of a converted file."""
    weight = weight_of(shape)
    tensors, expected = of_peft(NAME, weight, 1)
    magnitude = tensors.pop(f"{NAME}.lora_magnitude_vector").flatten()
    key, magnitude = {
        "[out]": (f"{NAME}.dora_scale", magnitude),
        "[1, out]": (f"{NAME}.dora_scale", magnitude[None]),
        "[out, 1]": (f"{NAME}.dora_scale", magnitude.reshape(-1, *[1] * (len(shape) - 1))),
        "magnitude": (f"{NAME}.magnitude", magnitude),
        "in diffusers": ("unet.down_blocks.0.resnets.0.conv1.lora_magnitude_vector.weight",
                         magnitude),
    }[form]  # fmt: skip
    tensors[key] = magnitude
    if form == "[1, out]" and shape[0] == shape[1]:
        # A square layer alone does not show it, but another layer of the file does.
        other, _ = of_peft("lora_unet_conv_in", weight_of((32, 8, 1, 1)), 2)
        other["lora_unet_conv_in.dora_scale"] = other.pop("lora_unet_conv_in.lora_magnitude_vector")
        vector = parse(tensors | other, {}, "a")
        torch.testing.assert_close(merged_with(vector, weight), expected, rtol=1e-4, atol=1e-5)
    else:
        assert_merges(tensors, expected, weight)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("unet.down_blocks.0.resnets.0.conv1", NAME),
        ("base_model.model.down_blocks.0.resnets.0.conv1", "unet.down_blocks.0.resnets.0.conv1"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1",
         "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
    ],
)  # fmt: skip
def test_parts_of_a_module_in_two_spellings_are_one_module(one, other):
    """Factors in one, magnitude and alpha in the other, whichever comes first in the file."""
    weight = weight_of(SHAPES["linear"])
    tensors, expected = of_lycoris("DoRA", "x", weight, 1)
    for split in (("dora_scale", "alpha"), ("lora_up.weight", "alpha"), ("lora_down.weight",)):
        file = {(one if key[2:] in split else other) + key[1:]: t for key, t in tensors.items()}
        for spelled in (file, dict(reversed(file.items()))):
            vector = parse(spelled, {}, "a")
            (name,) = vector.modules()
            torch.testing.assert_close(
                merged_with(vector, weight, name), expected, rtol=1e-4, atol=1e-5
            )


def test_a_half_precision_weight_is_merged_in_float32():
    weight = weight_of(SHAPES["linear"]).half()
    tensors, expected = of_lycoris("DoRA", NAME, weight.float(), 1)
    torch.testing.assert_close(merged_with(parse(tensors, {}, "a"), weight), expected)


@pytest.mark.parametrize("kind", OPAQUE)
def test_what_is_written_merges_as_what_was_read(kind, tmp_path):
    weight = weight_of(SHAPES["square"])
    tensors, expected = of_lycoris(kind, NAME, weight, 1)
    write(tmp_path / "a.safetensors", parse(tensors, {}, "a"), "fp32", False)
    actual = merged_with(read(tmp_path / "a.safetensors"), weight)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_first_layout_of_glora():
    """LyCORIS had up and down the other way round once (b2 [out, r], b1 [r, in])."""
    weight = weight_of(SHAPES["square"])
    tensors, expected = of_lycoris("GLoRA", NAME, weight, 1)
    swapped = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    first = {f"{NAME}.{swapped[key.split('.')[-2]]}.weight": t
             for key, t in tensors.items() if not key.endswith("alpha")}  # fmt: skip
    assert_merges(first | {f"{NAME}.alpha": tensors[f"{NAME}.alpha"]}, expected, weight)


def test_the_prefix_of_sd_scripts_oft():
    """networks/oft.py is LyCORIS' OFT in another name, whose constraint is alpha times outputs."""
    weight = weight_of(SHAPES["linear"])
    tensors, expected = of_lycoris("OFT", NAME, weight, 1)
    kohya = {key.replace("lora_unet_", "oft_unet_"): t for key, t in tensors.items()}
    assert_merges(kohya, expected, weight)


@pytest.mark.parametrize("kind", ["OFT", "OFT, bound and rescaled"])
@pytest.mark.parametrize("sizes", [(32,), (32, 32, 32), (32,) * 3 + (96,) * 8], ids=len)
def test_the_parts_of_a_fused_layer_are_turned_one_by_one(kind, sizes):
    """networks/oft_flux.py of sd-scripts (Comfy-Org/ComfyUI #5230): q, k, v and the MLP have blocks
    and a limit of their own. Expected: LyCORIS' merge of each part."""
    weight, tensors, expected, rescales = weight_of((sum(sizes), 48)), {}, [], []
    for number, rows in enumerate(weight.split(sizes)):
        of_part, merged_part = of_lycoris(kind, NAME, rows, number)
        tensors[f"{NAME}.oft_blocks.{number}"] = of_part.pop(f"{NAME}.oft_blocks")
        rescales.append(of_part.pop(f"{NAME}.rescale", None))
        tensors |= of_part
        expected.append(merged_part)
    if rescales[0] is not None:
        tensors[f"{NAME}.rescale"] = torch.cat(rescales)
    kohya = {key.replace("lora_unet_", "oft_unet_"): t for key, t in tensors.items()}
    assert_merges(kohya, torch.cat(expected), weight)


def test_nothing_stays_nothing():
    """A row of zeros has no direction that could get a magnitude."""
    weight = weight_of(SHAPES["linear"])
    weight[3] = 0
    tensors, _ = of_lycoris("DoRA", NAME, weight, 1)
    tensors[f"{NAME}.lora_up.weight"][3] = 0
    actual = merged_with(parse(tensors, {}, "a"), weight)
    assert actual.isfinite().all() and not actual[3].any()


PAIR = {"lora_up.weight": (8, 2), "lora_down.weight": (2, 6)}


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ({"dora_scale": (8,), "oft_blocks": (2, 4, 4)}, "parts of DoRA and OFT"),
        ({**PAIR, "oft_blocks": (2, 4, 4)}, "parts of LoRA and OFT"),
        ({**PAIR, "lokr_w1": (2, 2), "lokr_w2": (4, 3)}, "parts of LoKr and LoRA"),
        ({**PAIR, "dora_scale": (8,), "magnitude": (8,)}, "two magnitudes"),
        ({"oft_blocks": (3, 4, 3, 3)}, "cannot be paired in 3 stages"),
        ({"oft_blocks": (3, 2, 4, 4)}, "8 outputs cannot be paired in 3 stages"),
        ({**PAIR, "dora_scale": (5,)}, "5 numbers; expected one for each of the 8 outputs"),
        ({"oft_blocks": (2, 4, 4), "rescale": (6,)}, "s rescale has 6 numbers"),
        ({"oft_blocks.0": (2, 4, 4), "oft_blocks.2": (2, 4, 4)}, "has no oft_blocks.1"),
        ({"oft_blocks.0": (2, 4, 4), "oft_blocks": (2, 4, 4)}, "of the whole layer and of parts"),
    ],
)
def test_parts_that_make_no_module_are_refused(pieces, says):
    tensors = {f"{NAME}.{piece}": torch.ones(shape) for piece, shape in pieces.items()}
    with pytest.raises(ValueError, match=f"a, module {NAME}: it.*{says}"):
        parse(tensors, {}, "a")


def test_an_alpha_that_is_no_number_is_refused_at_reading():
    """It must not fail later when a weight is patched, where nobody sees the error."""
    for kind in ("DoRA", "DoRA of a LoHa", "GLoRA"):
        tensors, _ = of_lycoris(kind, NAME, weight_of(SHAPES["linear"]), 1)
        with pytest.raises(ValueError, match="alpha is"):
            parse(tensors | {f"{NAME}.alpha": torch.tensor(float("nan"))}, {}, "a")
