"""Every word of the page in every language of locales/."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = sorted(path.name for path in (ROOT / "locales").iterdir())
PAGE = "".join(
    path.read_text(encoding="utf-8") for path in sorted((ROOT / "web").glob("*.*js"))
    if path.name != "words.mjs"
)  # fmt: skip
TABLE = re.search(
    r"const WORDS = (\{.*?\n\});", (ROOT / "web" / "words.mjs").read_text(encoding="utf-8"), re.S
)
WORDS = json.loads(TABLE[1])
PLACES = re.compile(r"\{\w+\}")


def english() -> set[str]:
    """What the page says: as it stands there, the names of buttons, and the states of jobs."""
    openapi = json.loads((ROOT / "training/jobs/openapi.json").read_text(encoding="utf-8"))
    states = openapi["components"]["schemas"]["Job"]["properties"]["state"]["enum"]
    return {*re.findall(r'(?:\bsay\(|offers\.push\(\[)"([^"]+)"', PAGE), *states}


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


@pytest.mark.parametrize("language", LANGUAGES)
def test_commands_have_names(language):
    path = ROOT / "locales" / language / "commands.json"
    commands = json.loads(path.read_text(encoding="utf-8"))
    declared = re.findall(r'id: "([\w.]+)", label: "([^"]+)"', PAGE)
    assert commands.keys() == {name.replace(".", "_") for name, _ in declared}
    for name, label in declared:
        assert commands[name.replace(".", "_")]["label"] not in ("", label)
