"""What a file says about itself: other people's metadata as short plain text."""

from __future__ import annotations

import json

import pytest
import torch
from lcm_lora.lora.delta import Delta, Vector
from lcm_lora.lora.formats.describe import describe, public
from lcm_lora.lora.formats.facts import LABELS, LONGEST, MOST_TAGS, facts, of_metadata, plain
from lcm_lora.lora.formats.metadata import METHOD, RECIPE

NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
KOHYA = {
    "ss_output_name": "papercut",
    "ss_sd_model_name": "model.ckpt",
    "ss_base_model_version": "sd_v1",
    "ss_num_train_images": "40",
    "ss_num_epochs": "10",
    "ss_steps": "1200",
    "ss_unet_lr": "None",
    "ss_learning_rate": "0.0001",
    "ss_resolution": "(512, 512)",
    "ss_tag_frequency": json.dumps(
        {"10_papercut": {"papercut": 40, "a fox": 3}, "1_more": {"papercut": 2, "a": 1}}
    ),
    "modelspec.license": "MIT",
}


def vector(name: str = "a.safetensors", **metadata: str) -> Vector:
    delta = Delta(torch.ones(320, 4), torch.ones(4, 768), None, 2.0)
    return Vector({NAME: delta, TEXT: delta}, {}, metadata, name)


def test_it_tells_what_a_trainers_file_is():
    assert facts(vector(**KOHYA), "styles/a.safetensors") == {
        "architecture": "SD1.5",
        "modules": "2",
        "text encoder modules": "1",
        "rank": "4",
        "alpha / rank": "0.5",
        "title": "papercut",
        "base model": "model.ckpt",
        "frequent tags": "papercut (42), a fox (3), a (1)",
        "training pictures": "40",
        "epochs": "10",
        "training steps": "1200",
        "learning rate": "0.0001",
        "resolution": "(512, 512)",
        "licence": "MIT",
    }
    assert "frequent tags: papercut (42)" in describe(vector(**KOHYA))


def test_an_acceleration_is_told_from_its_metadata_or_its_folder():
    made = {"lcm_lora.family": "phased", "lcm_lora.made_for_steps": "4"}
    shown = facts(vector(**made, **{"modelspec.trigger_phrase": "fast"}), "a.safetensors")
    assert (shown["family"], shown["made for steps"], shown["trigger words"]) == (
        "phased", "4", "fast"
    )  # fmt: skip
    assert facts(vector(), "Hyper-SD15-8steps/a.safetensors")["family"] == "hyper-sd"


def test_every_fact_has_a_name_that_the_page_knows():
    everything = dict.fromkeys(
        ["modelspec.title", "ss_sd_model_name", "modelspec.trigger_phrase", "ss_num_train_images",
         "ss_epoch", "ss_steps", "lcm_lora.batch", "ss_unet_lr", "modelspec.resolution",
         "lcm_lora.guidance", "modelspec.author", "modelspec.license", "modelspec.date",
         "modelspec.description", "modelspec.usage_hint"], "x",
    )  # fmt: skip
    everything |= {"ss_tag_frequency": '{"a": {"b": 1}}', "lcm_lora.family": "lcm"}
    everything |= {"lcm_lora.made_for_steps": "4"}
    shown = facts(vector(**everything), "a")
    assert set(shown) == set(LABELS) - {"kind"}  # of a file that is no sum


@pytest.mark.parametrize(
    "text",
    ["", "None", "no JSON", "[1, 2]", "null", '{"a": [1], "b": {"c": "many", "d": -1, "": 4}}',
     "[" * 90_000 + "]" * 90_000, '{"a": ' * 90_000, "9" * 9_000_000],
)  # fmt: skip
def test_tags_that_are_none_tell_nothing(text):
    assert of_metadata({"ss_tag_frequency": text}) == {}


def test_values_are_short_and_plain():
    assert plain(" a\x00b\n\tc\u202ed\u200be\ud800 ") == "ab cde"
    assert plain("<b>&</b>") == "<b>&</b>"
    assert plain("x" * 10**7) == "x" * LONGEST + " ..."
    many = {f"tag {i} " + "y" * 100: 1000 - i for i in range(500)}
    tags = of_metadata({"ss_tag_frequency": json.dumps({"f": many})})["frequent tags"]
    assert tags.startswith("tag 0 y") and len(tags) <= 3 * LONGEST + 4
    few = of_metadata({"ss_tag_frequency": json.dumps({"f": {f"t{i}": 1 for i in range(99)}})})
    assert few["frequent tags"].count("(1)") == MOST_TAGS


def test_what_the_page_gets_is_limited():
    metadata = {f"key {i}{'k' * 500}": "v" * 5000 for i in range(1000)} | {METHOD: "exact"}
    metadata[RECIPE] = json.dumps([{"source": "s" * 5000, "weight": 1}])
    shown = public(vector(**metadata), "a.safetensors")
    assert len(json.dumps(shown)) < 120_000 and len(shown["metadata"]) <= 200
    assert shown["made_of"][0] == "made of (exact):" and RECIPE not in shown["metadata"]
    assert public(vector(), "a.safetensors")["made_of"] == []
