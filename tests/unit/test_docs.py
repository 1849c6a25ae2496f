"""The pages for readers: what they link to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "web" / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if not link.startswith(("http", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("page", (ROOT / "web" / "docs").glob("*.md"), ids=lambda page: page.stem)
def test_a_help_page_has_a_picture(page):
    assert re.search(r"!\[[^]]+\]\(\w+\.jpg\)", page.read_text(encoding="utf-8"))


def test_every_picture_of_a_help_page_is_shown():
    pages = ROOT / "web" / "docs"
    text = "".join(page.read_text(encoding="utf-8") for page in pages.glob("*.md"))
    shown = re.findall(r"\]\((\w+\.jpg)\)", text)
    assert set(shown) == {file.name for file in pages.glob("*.jpg")}
