"""The weighted sum of LoRAs is exact as a matrix, for all ranks and kinds of layers."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from lcm_lora.lora.combine import elementwise, exact
from lcm_lora.lora.delta import Delta, Vector
from lcm_lora.lora.elementwise.table import RULES
from lcm_lora.lora.family import FAMILY
from lcm_lora.lora.formats.describe import describe
from lcm_lora.lora.formats.metadata import METHOD, RECIPE
from lcm_lora.lora.formats.parse import parse
from lcm_lora.lora.formats.wire import from_wire, to_wire
from torch import nn

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CROSS = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
TEXT = "text_model_encoder_layers_0_mlp_fc1"


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def linear(rank: int, alpha: float | None = None, seed: int = 0) -> Delta:
    return Delta(rand(20, rank, seed=seed), rand(rank, 12, seed=seed), alpha=alpha)


def conv(rank: int, alpha: float | None = None, tucker: bool = False) -> Delta:
    if tucker:
        return Delta(rand(20, rank, 1, 1), rand(rank, 12, 1, 1), rand(rank, rank, 3, 3), alpha)
    return Delta(rand(20, rank, 1, 1), rand(rank, 12, 3, 3), alpha=alpha)


def true_sum(terms: list[tuple[Delta, float]]) -> torch.Tensor:
    """The dense sum in float64, from the definition."""
    total = torch.zeros((), dtype=torch.float64)
    for delta, weight in terms:
        up, down = delta.up.double().flatten(1), delta.down.double()
        if delta.mid is not None:
            down = torch.einsum("pqhw,qi->pihw", delta.mid.double(), down.flatten(1))
        scale = 1.0 if delta.alpha is None else delta.alpha / delta.rank
        total = total + weight * scale * (up @ down.flatten(1)).reshape(20, *down.shape[1:])
    return total


@pytest.mark.parametrize("weights", [(1.0, 0.8), (-0.7, 2.5), (1e-3, -1.0)])
@pytest.mark.parametrize(
    "pair",
    [
        (linear(4, 8.0), linear(7, 1.0, seed=5)),
        (linear(4), linear(64, 64.0, seed=5)),
        (conv(4, 2.0), conv(3)),
        (conv(4, 2.0, tucker=True), conv(3, 9.0)),
        (conv(4, tucker=True), conv(3, 1.0, tucker=True)),
    ],
)
def test_the_sum_is_exact(pair, weights):
    vectors = [Vector({CONV: delta}, source=str(i)) for i, delta in enumerate(pair)]
    combined, _ = exact(vectors, weights)
    delta, expected = combined.deltas[CONV], true_sum(list(zip(pair, weights, strict=True)))
    assert delta.rank == sum(d.rank for d in pair) and delta.alpha == delta.rank
    assert delta.mid is None
    error = (delta.matrix().double() - expected).norm() / expected.norm()
    assert error < 1e-6


def test_factors_kept_as_matrices_join_with_those_kept_as_kernels():
    kernel = conv(4, 4.0)
    matrix = Delta(rand(20, 3), rand(3, 12 * 9), alpha=1.0)
    combined, _ = exact([Vector({CONV: matrix}), Vector({CONV: kernel})], [1.0, 1.0])
    delta = combined.deltas[CONV]
    assert delta.up.shape == (20, 7, 1, 1) and delta.down.shape == (7, 12, 3, 3)
    expected = matrix.matrix().reshape(20, 12, 3, 3) + kernel.matrix()
    torch.testing.assert_close(delta.matrix(), expected)


def test_adding_factors_would_be_wrong():
    """Some tools do this; the test's tolerance distinguishes it from the true sum."""
    one, two = linear(4, seed=1), linear(4, seed=2)
    wrong = Delta(one.up + two.up, one.down + two.down).matrix()
    combined, _ = exact([Vector({LINEAR: one}), Vector({LINEAR: two})], [1.0, 1.0])
    right = combined.deltas[LINEAR].matrix()
    assert (wrong - right).norm() / right.norm() > 0.5


def test_peft_agrees():
    """PEFT's own exact way, combination_type "cat", on a layer with two adapters."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20, bias=False))
    config = {"target_modules": ["0"], "init_lora_weights": False}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, **config), "lcm")
    model.add_adapter("style", peft.LoraConfig(r=6, lora_alpha=3, **config))
    layer = model.base_model.model[0]
    vectors = [
        Vector({LINEAR: Delta(layer.lora_B[n].weight, layer.lora_A[n].weight, alpha=alpha)})
        for n, alpha in (("lcm", 8.0), ("style", 3.0))
    ]
    weights = [1.0, 0.8]
    model.add_weighted_adapter(["lcm", "style"], weights, "sum", combination_type="cat")
    with torch.no_grad():
        combined, _ = exact(vectors, weights)
        torch.testing.assert_close(
            combined.deltas[LINEAR].matrix(), layer.get_delta_weight("sum"), rtol=1e-5, atol=1e-6
        )


def test_modules_of_one_vector_only_are_kept_and_reported():
    style = Vector({LINEAR: linear(4), CONV: conv(3)}, source="style")
    lcm = Vector({LINEAR: linear(8, 8.0)}, source="lcm")
    combined, report = exact([lcm, style], [1.0, 0.5])
    assert set(combined.deltas) == {LINEAR, CONV}
    torch.testing.assert_close(combined.deltas[CONV].matrix(), 0.5 * style.deltas[CONV].matrix())
    assert "2 modules, rank 3 to 12; 1 in more than one vector, 1 in one only" in report


def test_weight_zero_leaves_a_vector_out():
    vectors = [Vector({LINEAR: linear(4)}), Vector({LINEAR: linear(8), CONV: conv(2)})]
    combined, _ = exact(vectors, [1.0, 0.0])
    assert set(combined.deltas) == {LINEAR} and combined.deltas[LINEAR].rank == 4


def test_full_differences_add_up():
    key = "lora_unet_conv_norm_out.diff"
    vectors = [Vector({}, {key: rand(8, seed=s)}) for s in (1, 2)]
    combined, _ = exact(vectors, [2.0, -1.0])
    expected = 2 * vectors[0].diffs[key] - vectors[1].diffs[key]
    torch.testing.assert_close(combined.diffs[key], expected)


def test_the_first_text_encoder_is_one_module_however_it_is_spelled():
    sdxl = Vector({CROSS: Delta(rand(20, 4), rand(4, 2048)), f"lora_te1_{TEXT}": linear(4)})
    text = Vector({f"lora_te_{TEXT}": linear(3, seed=3)})
    combined, _ = exact([sdxl, text], [1.0, 1.0])
    assert combined.deltas[f"lora_te1_{TEXT}"].rank == 7 and len(combined.deltas) == 2


def test_metadata_says_how_the_sum_was_made():
    one = Vector({LINEAR: linear(4)}, {}, {"base": "sd15", "title": "a"}, "a.safetensors")
    two = Vector({LINEAR: linear(4)}, {}, {"base": "sd15", "title": "b"}, "b.safetensors")
    two = replace(two, sha256="12ab")
    combined, _ = exact([one, two], [1.0, 0.8])
    assert combined.metadata["base"] == "sd15" and "title" not in combined.metadata
    assert json.loads(combined.metadata[RECIPE]) == [
        {"source": "a.safetensors", "weight": 1.0},
        {"source": "b.safetensors", "weight": 0.8, "sha256": "12ab"},
    ]
    assert combined.metadata[METHOD] == "exact"
    (outer,) = json.loads(exact([combined], [2.0])[0].metadata[RECIPE])
    assert outer["recipe"] == json.loads(combined.metadata[RECIPE])


def test_the_acceleration_survives_a_style_and_two_of_them_are_reported():
    lcm, tcd, style = (
        Vector({LINEAR: linear(2)}, metadata={FAMILY: family} if family else {}, source=str(family))
        for family in ("lcm", "tcd", None)
    )
    combined, report = exact([style, lcm], [0.8, 1.0])
    assert combined.metadata[FAMILY] == "lcm" and "different families" not in report
    combined, report = exact([combined, tcd], [1.0, 0.5])
    assert combined.metadata[FAMILY] == "lcm + tcd"
    assert "different families (lcm + tcd)" in report
    assert FAMILY not in exact([style, lcm], [1.0, 0.0])[0].metadata


def test_vectors_of_different_families_are_refused():
    sd15 = Vector({CROSS: Delta(rand(20, 4), rand(4, 768))}, source="a")
    sdxl = Vector({CROSS: Delta(rand(20, 4), rand(4, 2048))}, source="b")
    with pytest.raises(ValueError, match=r"a was made for SD1.5 .* and b for SDXL"):
        exact([sd15, sdxl], [1.0, 1.0])


def test_modules_of_different_shapes_are_refused_by_name():
    one, two = Vector({CONV: conv(4)}, source="a"), Vector({CONV: linear(4)}, source="b")
    with pytest.raises(ValueError, match=rf"{CONV} has different shapes: .* in a, \[20, 12\] in b"):
        exact([one, two], [1.0, 1.0])


@pytest.mark.parametrize(
    ("weights", "words"), [([0.0, 0.0], "All weights are 0"), ([1.0, float("nan")], "is nan")]
)
def test_weights_that_give_no_sum_are_refused(weights, words):
    with pytest.raises(ValueError, match=words):
        exact([Vector({LINEAR: linear(4)})] * 2, weights)


def test_a_full_difference_and_factors_of_other_shapes_are_refused():
    """For example conv_in of a model and of its inpainting version."""
    full = Vector({}, {f"{CONV}.diff": rand(20, 4, 3, 3)}, source="A")
    with pytest.raises(ValueError, match=r"\[20, 12, 3, 3\] in B, \[20, 4, 3, 3\] in A"):
        exact([full, Vector({CONV: conv(2)}, source="B")], [1.0, 1.0])
    tensors = {f"{CONV}.lora_up.weight": rand(20, 2), f"{CONV}.lora_down.weight": rand(2, 12)}
    with pytest.raises(ValueError, match=r"factors make \[20, 12\].*difference is \[20, 4, 3, 3\]"):
        parse(tensors | full.diffs, {}, "a")


@pytest.mark.parametrize("rule", [None, *RULES])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused_with_file_and_module(rule, number):
    good, bad = linear(2), linear(2)
    bad = replace(bad, up=bad.up.index_fill(0, torch.tensor([3]), number))
    vectors = Vector({LINEAR: good}, source="good"), Vector({LINEAR: bad}, source="bad")
    with pytest.raises(ValueError, match=f"^bad contains NaN or infinity in {LINEAR}"):
        if rule is None:
            exact(vectors, [1.0, 1.0])
        else:
            cpu = torch.device("cpu")
            elementwise(vectors, [1.0, 1.0], RULES[rule], 0.5, 2, 0, cpu)


def test_keys_that_are_no_part_of_a_lora_are_named():
    tensors = {f"{LINEAR}.lora_up.weight": rand(20, 2), f"{LINEAR}.lora_down.weight": rand(2, 12)}
    vector = from_wire(to_wire(parse(tensors | {"bundle_emb.x": torch.ones(2)}, {}, "a")))
    assert vector.ignored == ("bundle_emb.x",)
    assert "1 keys are not part of the LoRA and were left out: bundle_emb.x (an" in describe(vector)
    assert "1 keys are not part of the LoRA" in exact([vector], [1.0])[1]


PROJ = "lora_unet_input_blocks_5_1_proj_in"  # attentions_1 of block 1 in SD, 0 of block 2 in KOALA


def native(source: str, *others: str) -> Vector:
    tensors = {}
    for name in (PROJ, *others):
        tensors |= {f"{name}.lora_up.weight": rand(20, 2), f"{name}.lora_down.weight": rand(2, 20)}
    return parse(tensors, {}, source)


def test_another_file_of_a_sum_tells_how_blocks_are_counted():
    one = native("one")
    name = "lora_unet_down_blocks_1_attentions_1_proj_in"
    tensors = {f"{name}.lora_up.weight": rand(20, 1), f"{name}.lora_down.weight": rand(1, 20)}
    other = parse(tensors, {}, "other")
    total, _ = exact([one, other], [1.0, 1.0])
    assert PROJ in one.deltas and PROJ not in total.deltas
    expected = one.deltas[PROJ].matrix() + other.deltas[name].matrix()
    torch.testing.assert_close(total.deltas[name].matrix(), expected)


def test_blocks_counted_in_two_ways_that_nothing_tells_apart_are_refused():
    one = native("one")
    total, _ = exact([one, native("two")], [1.0, 1.0])
    assert total.deltas.keys() == {PROJ}, "one way of counting needs no model"
    name = "lora_unet_down_blocks_1_attentions_0_proj_in"
    tensors = {f"{name}.lora_up.weight": rand(20, 2), f"{name}.lora_down.weight": rand(2, 20)}
    with pytest.raises(ValueError, match=f"^The block number in {PROJ} of one can.* and B numbers"):
        exact([one, parse(tensors, {}, "B")], [1.0, 1.0])


def test_a_file_that_another_one_shows_to_hold_a_module_twice_is_refused():
    names = "lora_unet_output_blocks_3_1_norm", "lora_unet_up_blocks_1_attentions_0_norm"
    both = native("both", *names)
    assert both.deltas.keys() > set(names)
    tells = native("tells", "lora_unet_up_blocks_0_attentions_2_norm")
    with pytest.raises(ValueError, match="both holds two LoRAs for the module"):
        exact([both, tells], [1.0, 1.0])
