"""Every word of every node in every language of locales/; the English is the schemas' own."""

import json
import re
from pathlib import Path

import pytest

LOCALES = Path(__file__).resolve().parents[2] / "locales"
LANGUAGES = sorted(path.parent.name for path in LOCALES.glob("*/commands.json"))
# What is called the same everywhere.
PROPER = {"LCM KSampler", "cfg", "eta", "clip", "CLIP"}
NUMBER = re.compile(r"\d+(?:\.\d+)?")
SYNTAX = re.compile(r"[{}|@]")  # has a meaning for the front end's translator


def translated(language: str, file: str) -> dict:
    return json.loads((LOCALES / language / f"{file}.json").read_text(encoding="utf-8"))


def of_inputs(inputs, before="") -> dict:
    """By the front end's keys: an input of a dynamic combo has its combo's name before its own."""
    words = {}
    for item in inputs:
        words[before + item.id] = {"name": item.display_name or item.id, "tooltip": item.tooltip}
        if item.get_io_type() == "COMFY_DYNAMICCOMBO_V3":
            for option in item.options:
                words |= of_inputs(option.inputs, f"{before}{item.id}_")
    return words


def english() -> dict:
    """As a nodeDefs.json has it."""
    from lcm_lora.nodes.catalogue import NODES

    schemas = [node.define_schema() for node in NODES]
    return {
        schema.node_id: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": of_inputs(schema.inputs),
            "outputs": {
                str(place): {"name": output.display_name, "tooltip": output.tooltip}
                for place, output in enumerate(schema.outputs)
            },
        }
        for schema in schemas
    }


def flat(words: dict, before="") -> dict[str, str]:
    texts = {}
    for key, value in words.items():
        if isinstance(value, dict):
            texts |= flat(value, f"{before}{key}.")
        else:
            texts[before + key] = value
    return texts


def test_there_are_languages():
    assert {"ko", "ja", "zh"} <= set(LANGUAGES)
    assert "en" not in LANGUAGES, "it would hide the schemas' words"


def of_combos(inputs, before="") -> dict:
    """The names that inputs of dynamic combos have besides their ids."""
    names = {}
    for item in inputs:
        if before and item.display_name:
            names[before + item.id] = {"name": item.display_name}
        for option in item.options if item.get_io_type() == "COMFY_DYNAMICCOMBO_V3" else ():
            names |= of_combos(option.inputs, f"{before}{item.id}_")
    return names


def test_english_has_only_the_names_that_the_front_end_does_not_take_from_the_schemas(comfy):
    from lcm_lora.nodes.catalogue import NODES

    schemas = [node.define_schema() for node in NODES]
    named = {schema.node_id: {"inputs": of_combos(schema.inputs)} for schema in schemas}
    expected = {node: words for node, words in named.items() if words["inputs"]}
    assert translated("en", "nodeDefs") == expected


def test_the_template_browser_calls_the_pack_by_its_name():
    """It knows the folder only, which `git clone` and the registry name differently."""
    for path in LOCALES.iterdir():
        names = translated(path.name, "main")["templateWorkflows"]["category"]
        assert names == dict.fromkeys(("lcm-lora", "comfyui-lcm-lora"), "LCM-LoRA"), path.name


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_word_of_the_nodes_is_there(comfy, language):
    ours, theirs = flat(english()), flat(translated(language, "nodeDefs"))
    assert sorted(ours.keys() - theirs.keys()) == [], "not translated"
    assert sorted(theirs.keys() - ours.keys()) == [], "of no node"
    for key, text in theirs.items():
        unchanged = text in PROPER or (key.endswith(".name") and text.isupper())  # a wire's type
        assert text.strip() and (unchanged or text != ours[key]), f"{key} is still English"
        assert not SYNTAX.search(text), key
        missing = set(NUMBER.findall(ours[key])) - set(NUMBER.findall(text))
        assert key.endswith(".name") or not missing, f"{key} does not say {missing}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_folders_and_wires_have_names(comfy, language):
    from lcm_lora.nodes.catalogue import NODES

    schemas = [node.define_schema() for node in NODES]
    main = translated(language, "main")
    folders = {folder for schema in schemas for folder in schema.category.split("/")[1:]}
    types = {output.get_io_type() for schema in schemas for output in schema.outputs}
    assert set(main["nodeCategories"]) == folders
    assert set(main["dataTypes"]) == {name for name in types if name.startswith("LCM_")}
