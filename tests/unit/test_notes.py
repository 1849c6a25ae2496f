"""The notes and titles of the templates in every language of locales/."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = sorted(path.parent.name for path in (ROOT / "locales").glob("*/commands.json"))
ADDRESS = re.compile(r"https://[^)]+|`[^`]+`|\*\*|\b\w+\.safetensors\b")


def english() -> set[str]:
    texts = set()
    for path in (ROOT / "workflows").glob("*.json"):
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            notes = node["widgets_values"] if node["type"] == "MarkdownNote" else []
            texts |= {*notes, *([node["title"]] if "title" in node else [])}
    return texts


def test_each_language_has_a_file():
    assert sorted(path.stem for path in (ROOT / "web" / "notes").iterdir()) == LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_note_and_title_is_there(language):
    path = ROOT / "web" / "notes" / f"{language}.json"
    texts = json.loads(path.read_text(encoding="utf-8"))
    assert sorted(english() - texts.keys()) == [], "not translated"
    assert sorted(texts.keys() - english()) == [], "of no template"
    for key, text in texts.items():
        assert text.strip() and text != key
        # Links, file names and the number of bold parts are the same.
        assert sorted(ADDRESS.findall(text)) == sorted(ADDRESS.findall(key)), key[:40]
        assert text.count("\n") == key.count("\n"), key[:40]
