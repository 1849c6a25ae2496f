"""What a vector, and its file, says about how it was made and what it is."""

from __future__ import annotations

import json

import pytest
import torch
from lcm_lora.lora.blocks import parse_weights, weighted
from lcm_lora.lora.combine import elementwise, exact
from lcm_lora.lora.delta import Delta, Vector
from lcm_lora.lora.elementwise.table import RULES
from lcm_lora.lora.extract import extract
from lcm_lora.lora.family import FAMILY
from lcm_lora.lora.formats.describe import RECIPE_SHOWN, describe, described
from lcm_lora.lora.formats.files import read, read_named, write
from lcm_lora.lora.formats.metadata import METHOD, RECIPE
from lcm_lora.lora.formats.wire import from_wire, to_wire
from lcm_lora.lora.protect import protected
from lcm_lora.lora.reduce import truncated

DOWN = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
UP = "lora_unet_up_blocks_0_attentions_1_proj_in"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def delta(seed: int = 0) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    return Delta(torch.randn(6, 2, generator=generator), torch.randn(2, 5, generator=generator))


def vector(name: str, modules=(DOWN, UP), **metadata: str) -> Vector:
    made = {module: delta(len(name)) for module in modules}
    return Vector(made, {}, metadata, name, sha256=f"hash of {name}")


LCM, STYLE = vector("lcm", **{FAMILY: "lcm"}), vector("style")


def recipe_of(made: Vector):
    return json.loads(made.metadata[RECIPE])


def test_a_recipe_holds_how_its_sources_were_made():
    half = weighted(STYLE, parse_weights("input=0.5"), "input=0.5")
    clear, _ = protected(half, LCM, 0.25)
    merged, _ = elementwise(
        [LCM, clear], [1.0, 0.8], RULES["ties"], 0.3, 3, 7, torch.device("cpu")
    )  # fmt: skip
    combined, _ = exact([merged], [2.0])
    (outer,) = recipe_of(combined)
    assert outer["method"] == "ties, density 0.3, rank 3, seed 7" and "sha256" not in outer
    lcm, protected_style = outer["recipe"]
    assert lcm == {"source": "lcm", "weight": 1.0, "sha256": "hash of lcm"}
    assert protected_style["method"] == "protected from lcm, share 0.25"
    weighted_style, kept_from = protected_style["recipe"]
    assert kept_from == {"source": "lcm", "weight": 0.0, "sha256": "hash of lcm"}
    assert weighted_style["method"] == "by blocks, input=0.5"
    assert weighted_style["recipe"] == [
        {"source": "style", "weight": 1.0, "sha256": "hash of style"}
    ]


@pytest.mark.parametrize(
    "made",
    [weighted(STYLE, parse_weights("input=0.5"), "so"), protected(STYLE, LCM, 1.0)[0]],
    ids=["blocks", "protect"],
)
def test_what_was_changed_has_not_the_hash_of_the_file(made):
    assert not from_wire(to_wire(made)).sha256
    (term, *_) = recipe_of(exact([made], [1.0])[0])
    assert "sha256" not in term and term["recipe"][0]["sha256"] == "hash of style"


def test_methods_name_their_settings():
    made, loss = truncated(exact([LCM, STYLE], [1.0, 0.8])[0], 3, 1 - 0.001**2)
    expected = f"svd, rank 3, keep_energy 0.999999, relative error {loss.error:.2e}"
    assert made.metadata[METHOD] == expected
    made, report = extract([(DOWN, torch.randn(20, 12), None)], 4, 5, "distilled - base")
    method, _, error = made.metadata[METHOD].partition(", relative error ")
    assert method == "extracted, rank 4, seed 5" and f"relative error {error}." in report
    assert [(term["source"], term["weight"]) for term in recipe_of(made)] == [
        ("distilled", 1.0), ("base", -1.0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("vectors", "weights", "family"),
    [
        ([STYLE, LCM], [1.0, -1.0], None),
        ([LCM], [-1.0], None),
        ([LCM, LCM], [-1.0, -0.5], None),
        ([LCM, vector("tcd", **{FAMILY: "tcd"})], [1.0, -0.5], "lcm"),
        ([LCM, LCM], [1.0, -0.5], "lcm"),
    ],
)
def test_what_is_taken_away_does_not_bring_its_acceleration(vectors, weights, family):
    assert exact(vectors, weights)[0].metadata.get(FAMILY) == family


@pytest.mark.parametrize(
    ("text", "family"),
    [("input=-1, output=0", None), ("input=0, output=0", None), ("input=0.5, output=-1", "lcm")],
)
def test_blocks_that_take_an_acceleration_away_do_not_bring_it(text, family):
    lcm = vector("lcm", (DOWN, UP, TEXT), **{FAMILY: "lcm"})
    assert weighted(lcm, parse_weights(text), text).metadata.get(FAMILY) == family


def test_the_info_shows_a_recipe_completely(tmp_path):
    for lora in (LCM, STYLE):
        write(tmp_path / lora.source, lora, "fp32", overwrite=False)
    lcm, style = (read_named(tmp_path / lora.source, lora.source) for lora in (LCM, STYLE))
    half = weighted(style, parse_weights("input=0.5"), "input=0.5")
    write(tmp_path / "both", exact([lcm, half], [1.0, -0.75])[0], "fp32", overwrite=False)
    lines = describe(read(tmp_path / "both")).splitlines()
    start = lines.index("made of (exact):")
    assert lines[start + 1 : start + 5] == [
        f"  1.0 x lcm, sha256 {lcm.sha256}",
        "  -0.75 x style [input=0.5]",
        "    made of (by blocks, input=0.5):",
        f"      1.0 x style, sha256 {style.sha256}",
    ]
    assert lines[start + 5 :] == sorted(lines[start + 5 :]) and "lcm_lora_" not in str(lines)


def test_a_recipe_of_somebody_else_is_shown_as_it_is():
    deep = "[" * 99_000 + "]" * 99_000
    for text in ("no JSON", '"a word"', "[1, 2]", '[{"recipe": 1}]', deep[:90_000], deep):
        (line,) = described({RECIPE: text, METHOD: "so"})
        assert line == (text if len(text) <= RECIPE_SHOWN else f"{text[:RECIPE_SHOWN]} ...")
    assert described({RECIPE: '[{"weight": null}]'}) == ["made of:\n  None x None"]
    assert described({METHOD: "so", "long": "x" * 500}) == [
        f"{METHOD}: so", f"long: {'x' * 120} ...",
    ]  # fmt: skip
    assert described({"a": "one\u202e\ntwo"}) == ["a: one two"]  # no change of direction
    many = json.dumps([{"source": "x" * 90, "weight": 1}] * 100)
    assert len(described({RECIPE: many})[0]) == RECIPE_SHOWN + len(" ...")


def test_what_is_of_another_files_tensors_is_not_written(tmp_path):
    stale = {
        "ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "loha"}',
        "ss_network_dim": "2", "ss_network_alpha": "1", "sshs_model_hash": "x",
        "modelspec.hash_sha256": "0xabc", "modelspec.title": "my LoHa", "modelspec.date": "2023",
    }  # fmt: skip
    unchanged = {"ss_output_name": "loha", "modelspec.author": "me"}
    norm = Vector({}, {f"{DOWN}.diff": torch.ones(2)}, stale | unchanged)
    write(tmp_path / "a.safetensors", norm, "fp32", overwrite=False)
    assert read(tmp_path / "a.safetensors").metadata == unchanged | {
        "ss_network_module": "networks.lora", "modelspec.sai_model_spec": "1.0.0"
    }  # fmt: skip
