"""Every word of the page in every language of locales/."""

import ast
import json
import re
from pathlib import Path

import pytest
from lcm_lora.lora.architecture import DOUBT
from lcm_lora.lora.family import CHOSEN, IN_METADATA, IN_NAME, UNNAMED
from lcm_lora.lora.formats.facts import LABELS

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = sorted(path.parent.name for path in (ROOT / "locales").glob("*/commands.json"))
PAGE = "".join(
    path.read_text(encoding="utf-8") for path in sorted((ROOT / "web").glob("*.*js"))
    if path.name != "words.mjs"
)  # fmt: skip
TABLE = re.search(
    r"const WORDS = (\{.*?\n\});", (ROOT / "web" / "words.mjs").read_text(encoding="utf-8"), re.S
)
WORDS = json.loads(TABLE[1])
PLACES = re.compile(r"\{\w+\}")


def of_nodes() -> set[str]:
    """What nodes say: the first argument of a Line, or a variable `text` that becomes one. A line
    of values alone has no words of ours."""
    files = [*(ROOT / "nodes").rglob("*.py"), ROOT / "samplers" / "report.py"]
    said = {DOUBT, CHOSEN, UNNAMED, IN_METADATA, IN_NAME}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Line":
                value = node.args[0]
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "text":
                value = node.value
            else:
                continue
            if isinstance(value, ast.Constant):
                said.add(value.value)
    return {text for text in said if PLACES.sub("", text).strip()}


def of_jobs() -> set[str]:
    """The messages of jobs that are the same each time: the argument `message` of any call, and
    what goes with a state in the table of states."""
    said = []
    for file in (ROOT / "training").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "message":
                said.append(node.value)
            elif file.stem == "states" and isinstance(node, ast.Return):
                said += node.value.elts[1:] if isinstance(node.value, ast.Tuple) else []
    said += [part.body for part in said if isinstance(part, ast.IfExp)]
    return {part.value for part in said if isinstance(part, ast.Constant)} - {""}


def english() -> set[str]:
    """What the page says: as it stands there, the names of buttons, the states, activities and
    messages of jobs, what nodes say, and the names of facts about a LoRA."""
    openapi = json.loads((ROOT / "training/jobs/openapi.json").read_text(encoding="utf-8"))
    job = openapi["components"]["schemas"]["Job"]["properties"]
    named = {*job["state"]["enum"], *job["activity"]["enum"]} - {""}
    said = re.findall(r'(?:\bsay\(|offers\.push\(\[)"([^"]+)"', PAGE)
    return {*said, *named, *of_nodes(), *of_jobs(), *LABELS}


def test_the_languages_of_page_and_nodes_are_the_same():
    assert sorted(WORDS) == LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_word_of_the_page_is_there(language):
    words = WORDS[language]
    assert sorted(english() - words.keys()) == [], "not translated"
    assert sorted(words.keys() - english()) == [], "not said anywhere"
    for key, text in words.items():
        assert text.strip() and text != key, f"{key} is still English"
        assert sorted(PLACES.findall(text)) == sorted(PLACES.findall(key)), key


def test_the_page_does_not_count_on_the_name_of_the_packs_folder():
    # `git clone` names it comfyui-lcm-lora, the registry lcm-lora.
    assert not re.findall(r"/(?:comfyui-)?lcm-lora/", PAGE.replace("github.com/lcm-lora/", ""))


@pytest.mark.parametrize("language", LANGUAGES)
def test_commands_have_names(language):
    path = ROOT / "locales" / language / "commands.json"
    commands = json.loads(path.read_text(encoding="utf-8"))
    declared = re.findall(r'id: "([\w.]+)", label: "([^"]+)"', PAGE)
    assert commands.keys() == {name.replace(".", "_") for name, _ in declared}
    for name, label in declared:
        assert commands[name.replace(".", "_")]["label"] not in ("", label)


@pytest.mark.parametrize("language", LANGUAGES)
def test_settings_have_names(language):
    path = ROOT / "locales" / language / "settings.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    declared = re.findall(r'id: "([\w.]+)", name: "([^"]+)",\s+tooltip: "([^"]+)"', PAGE)
    assert declared
    assert settings.keys() == {name.replace(".", "_") for name, *_ in declared}
    for name, *english in declared:
        words = settings[name.replace(".", "_")]
        for text, own in zip(english, (words["name"], words["tooltip"]), strict=True):
            assert own not in ("", text)
