"""Weights that depend on the place and the kind of a module."""

import json

import pytest
import torch
from lcm_lora.lora.blocks import PRESETS, group_of, parse_weights, weighted
from lcm_lora.lora.delta import Delta, Vector
from lcm_lora.lora.formats.metadata import METHOD, RECIPE

DOWN = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
FEED = "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"
UP = "lora_unet_up_blocks_0_attentions_1_proj_in"
CONV = "lora_unet_up_blocks_10_resnets_0_conv_shortcut"
TEXT = "lora_te1_text_model_encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize(
    ("module", "group"),
    [
        (DOWN, "input attention"),
        (FEED, "middle feed_forward"),
        (UP, "output attention"),
        (CONV, "output resnet"),
        ("lora_unet_down_blocks_0_downsamplers_0_conv", "input resnet"),
        ("lora_unet_down_blocks_0_resnets_1_time_emb_proj", "input resnet"),
        (TEXT, "text feed_forward"),
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", "text attention"),
        ("lora_unet_conv_in", "input resnet"),
        ("lora_unet_time_embedding_linear_1", "input other"),
        ("lora_transformer_single_blocks_0", "other other"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", "text other"),
        ("text_encoders.qwen25_7b.transformer.model.norm", "text other"),
        # Block numbers whose level depends on the model.
        ("lora_unet_input_blocks_5_1_proj_in", "input attention"),
        ("lora_unet_output_blocks_2_1_transformer_blocks_0_ff_net_2", "output feed_forward"),
        ("lora_unet_input_blocks_5_0_in_layers_2", "input resnet"),
    ],
)
def test_a_module_is_placed_by_its_name(module, group):
    assert group_of(module) == group


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", (1, 1, 1, 1, 1)),
        ("input=0.5, feed_forward = 2", (0.5, 2, 1, 1, 2)),
        ("output=2; attention=-.5\nrest=0", (-0.5, 0, -1, 2, 0)),
        # Names of blocks match completely: block 1 is not block 10.
        ("up_blocks_1=0", (1, 1, 1, 1, 1)),
        ("up_blocks_0_attentions_1=3, down_blocks_1=2, rest=0", (2, 0, 3, 0, 0)),
        ("text=0.25", (1, 1, 1, 1, 0.25)),
        ("input=1e-3, output=-2.5E+1", (1e-3, 1, -25, -25, 1)),
        (PRESETS["SDXL style"], (0, 0, 1, 0, 0)),
        (PRESETS["attention only"], (1, 0, 1, 0, 0)),
        (PRESETS["without feed-forward"], (1, 0, 1, 1, 0)),
    ],
)
def test_weights_are_products_of_all_that_fit(text, expected):
    weight = parse_weights(text)
    weights = tuple(weight(module) for module in (DOWN, FEED, UP, CONV, TEXT))
    assert weights == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("inputs=1", "names no part of a model"),
        ("up_blocks=1, up_blocks=2", "two weights"),
        ("input", "no weight"),
        ("input=much", "no weight"),
        ("input=nan", "no weight"),
        ("input=1e400", "'input=1e400' has no weight; expected a finite number"),
        (f"input={'9' * 400}", "9' has no weight; expected a finite number"),
        ("input=1_0", "no weight"),
    ],
)
def test_a_wrong_text_is_explained(text, words):
    with pytest.raises(ValueError, match=words):
        parse_weights(text)


@pytest.mark.parametrize("name", ["up_blocks_0_attention_1", "down_blocks_9", "down_blocks_x"])
def test_a_block_that_the_vector_does_not_have_is_named(name):
    vector = Vector({DOWN: delta(0), UP: delta(1)}, source="style")
    words = f"{name} fits no module of style; its nearest blocks are .*up_blocks_0_attentions_1"
    with pytest.raises(ValueError, match=words):
        parse_weights(f"input=0, {name}=0").require_blocks(vector)
    words = f"{name} fits no module of text; it has no blocks"
    with pytest.raises(ValueError, match=words):
        parse_weights(f"{name}=0").require_blocks(Vector({TEXT: delta(0)}, source="text"))


def test_what_a_lora_may_lack_is_no_mistake():
    vector = Vector({DOWN: delta(0)}, source="style")
    weights = parse_weights("text=0.5, middle=0, down_blocks_1=2, up_blocks_0=1, rest=0")
    assert weights.idle(vector) == ["text", "middle", "up_blocks_0"]
    parse_weights("text=0.5, middle=0, down_blocks_1_attentions_0=2").require_blocks(vector)


def delta(seed: int, alpha: float | None = None) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    return Delta(torch.randn(6, 2, generator=generator), torch.randn(2, 5, generator=generator),
                 alpha=alpha)  # fmt: skip


def test_a_change_is_multiplied_and_what_has_no_weight_is_left_out():
    vector = Vector(
        {DOWN: delta(0, 1.0), UP: delta(1), TEXT: delta(2)},
        {"lora_unet_up_blocks_0_resnets_0_norm1.diff_b": torch.ones(3)},
        {"note": "kept", RECIPE: "[]"},
        source="style",
    )
    scaled = weighted(vector, parse_weights("input=0.5, output=-2, text=0"), "so")
    assert scaled.deltas.keys() == {DOWN, UP} and scaled.source == "style [so]"
    for name, factor in ((DOWN, 0.5), (UP, -2.0)):
        expected = factor * vector.deltas[name].matrix()
        torch.testing.assert_close(scaled.deltas[name].matrix(), expected)
    assert scaled.metadata["note"] == "kept"
    assert json.loads(scaled.metadata[RECIPE]) == [{"source": "style", "weight": 1.0, "recipe": []}]
    assert scaled.metadata[METHOD] == "by blocks, so"
    (diff,) = scaled.diffs.values()
    assert diff.equal(torch.full((3,), -2.0))
    with pytest.raises(ValueError, match="No module of style"):
        weighted(vector, lambda _: 0.0, "none")
    with pytest.raises(ValueError, match="in style is inf; expected a finite number"):
        weighted(vector, lambda _: 1e300 * 1e300, "too much")


def test_what_is_no_sum_has_no_half():
    parts = {"dora_scale": torch.ones(2)}
    vector = Vector({}, opaque={UP: parts, DOWN: parts})
    scaled = weighted(vector, parse_weights("input=0"), "so")
    assert scaled.opaque.keys() == {UP}
    with pytest.raises(ValueError, match="DoRA weights, which cannot be scaled"):
        weighted(vector, parse_weights("input=0.5"), "so")


def test_a_block_of_which_only_the_model_tells_the_level_has_no_weight_of_its_own():
    unclear = "lora_unet_input_blocks_5_1_proj_in"
    assert parse_weights("input=0.5, attention=0.5")(unclear) == 0.25
    with pytest.raises(ValueError, match=f"number in {unclear}.*whether down_blocks_1 "):
        parse_weights("down_blocks_1=0")(unclear)
