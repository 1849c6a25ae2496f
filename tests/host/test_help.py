"""The help pages of the nodes, in every language: they name every input and say the same."""

import re
from pathlib import Path

import pytest
from lcm_lora.tests.host.test_locales import LANGUAGES, english, translated

DOCS = Path(__file__).resolve().parents[2] / "web" / "docs"
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
# Where a page presents what it names: the first cell of a row, bold, or code.
PRESENTED = re.compile(r"^\| ([^|]+) \||\*\*([^*]+)\*\*|`([^`]+)`", re.M)


def page(node: str, language: str = "") -> str:
    """As the front end asks for it: docs/NODE/LANGUAGE.md, else docs/NODE.md."""
    path = DOCS / node / f"{language}.md" if language else DOCS / f"{node}.md"
    return path.read_text(encoding="utf-8")


def presented(text: str) -> set[str]:
    parts = ("".join(found) for found in PRESENTED.findall(text))
    return {name.strip() for part in parts for name in re.split("[,、，]", part)}


def numbered(name: str) -> str:
    """vector_1 -> vector_N"""
    return re.sub(r"\d+", "N", name)


@pytest.mark.parametrize("language", ["", *LANGUAGES])
def test_every_node_has_a_page_that_names_its_inputs(comfy, language):
    for node, words in english().items():
        own = translated(language, "nodeDefs")[node] if language else words
        text = page(node, language)
        assert text.startswith(f"# {own['display_name']}\n"), node
        # An axis has the same inputs as the other, named once on the page: values (columns).
        names = {
            numbered(re.sub(r" ?[(（][^)）]+[)）]$", "", item["name"]))
            for item in own["inputs"].values()
        }
        assert sorted(names - presented(text)) == [], node


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_pages_say_the_same(comfy, language):
    for node in english():
        own, other = page(node), page(node, language)
        for what in (r"^#+ ", r"^- ", r"^\|", r"!\[[^\]]*\]\(([^)]+)\)"):
            found = [re.findall(what, text, re.M) for text in (own, other)]
            assert found[0] == found[1], f"{node}: {what}"
        # A word may become a number, but no number is lost.
        assert not set(NUMBER.findall(own)) - set(NUMBER.findall(other)), node
