"""What the registry and managers of packs read: metadata, requirements, and the archive."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from lcm_lora.dev.environment import HOSTS
from lcm_lora.tests import tools
from PIL import Image

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, COMFY = METADATA["project"], METADATA["tool"]["comfy"]
ALONE = {
    "CHANGELOG.md", "LICENSE", "README.md", "__init__.py", "pyproject.toml", "requirements.txt",
}  # fmt: skip
TOP = ALONE | {
    "locales", "lora", "nodes", "samplers", "search", "subgraphs", "training", "web",
    "workflows",
}  # fmt: skip


def tracked(*options: str) -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("this is no git checkout, and the archive is made of what git tracks")
    return set(filter(None, listed.stdout.split("\0")))


@pytest.fixture
def archived() -> set[str]:
    """What the archive holds: it is made of what git tracks, less what .comfyignore names."""
    return tracked() - tracked("--cached", "--ignored", "--exclude-from=.comfyignore")


def test_the_archive_holds_what_a_user_needs(archived):
    assert {path.partition("/")[0] for path in archived} == TOP
    for folder in sorted(TOP - ALONE):
        assert {path for path in tracked() if path.startswith(f"{folder}/")} <= archived
    assert sum((ROOT / path).stat().st_size for path in archived) < 3_000_000


def test_nothing_is_installed():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert all(line.startswith("#") for line in lines)
    assert PROJECT["dependencies"] == []
    assert not (ROOT / "install.py").exists()


def test_versions_agree():
    assert re.fullmatch(r"\d+\.\d+\.\d+", PROJECT["version"])
    assert f"\n## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    oldest = min(HOSTS, key=lambda version: [int(part) for part in version.split(".")])
    assert COMFY["requires-comfyui"] == f">={oldest}"
    page = (ROOT / "web" / "offers.mjs").read_text(encoding="utf-8")
    assert f'VERSION = "{PROJECT["version"]}"' in page
    assert f'HOME = "{PROJECT["urls"]["Repository"]}"' in page
    for path in [*(ROOT / "workflows").glob("*.json"), *(ROOT / "subgraphs").glob("*.json")]:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        inner = workflow.get("definitions", {}).get("subgraphs", [])
        for node in [node for graph in (workflow, *inner) for node in graph["nodes"]]:
            properties = node["properties"]
            if node["type"].startswith("LCM"):
                assert properties["cnr_id"] == PROJECT["name"]
                assert properties["ver"] == PROJECT["version"]


@pytest.mark.parametrize(("key", "shape"), [("Icon", (1, 1)), ("Banner", (21, 9))])
def test_pictures_have_the_shape_that_the_registry_shows(key, shape):
    path = ROOT / COMFY[key].partition("/main/")[2]
    assert path.stat().st_size < 100_000
    with Image.open(path) as picture:
        width, height = picture.size
    assert width * shape[1] == height * shape[0]
    assert key != "Icon" or width <= 400


@pytest.mark.usefixtures("network")
def test_the_registrys_own_tool_finds_nothing(archived, tmp_path):
    output = tools.comfy("node", "validate", cwd=tools.clone(tmp_path / "pack"))
    assert "warning" not in output.lower()
    with tools.archive(tmp_path) as made:
        assert set(made.namelist()) == archived
