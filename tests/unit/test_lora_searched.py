"""Weights that a search found, as text and in metadata."""

import json

import pytest
from lcm_lora.lora.formats.searched import SEARCH, lines, read_weights, written


def test_weights_are_read_by_name_in_any_order():
    text = "a report\n\n" + written(["a", "b"], [0.8, 0.5])
    assert read_weights(text, ["b", "a"]) == [0.5, 0.8]


def test_other_names_and_equal_names_are_read_in_order():
    text = written(["a", "b"], [0.8, 0.5])
    assert read_weights(text, ["x", "y"]) == [0.8, 0.5]
    assert read_weights(written(["a", "a"], [0.8, 0.5]), ["a", "a"]) == [0.8, 0.5]


def test_a_weight_never_goes_to_another_vector_of_the_same_text():
    with pytest.raises(ValueError, match="the vectors are a, b"):
        read_weights(written(["b", "c"], [0.8, 0.5]), ["a", "b"])


@pytest.mark.parametrize("number", [float("inf"), float("nan"), None, [], {}])
def test_metadata_that_nobody_wrote_is_not_shown(number):
    made = {
        "weights": [["a", 1]], "steps": number, "cfg": 1, "prompts": 4, "prompts_sha256": "ab",
        "reference": {"steps": 50, "guidance": 7},
    }  # fmt: skip
    assert lines({SEARCH: json.dumps(made | {"steps": 4})})
    assert lines({SEARCH: json.dumps(made)}) == []
    assert lines({SEARCH: json.dumps(made | {"steps": 4, "weights": [["a", 10**400]]})}) == []
