"""ComfyUI's own unit tests say the same with the pack in its folder."""

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections.abc import Iterable
from pathlib import Path

import pytest
from lcm_lora.tests import tools

NEEDED = ("pytest-aiohttp", "pytest-asyncio", "websocket-client")


def outcomes(
    host: Path, plugins: Path, report: Path, tests: Iterable[str | Path]
) -> dict[tuple[str, str], bool]:
    """(module and class, name) -> whether it passed; those that were skipped are left out."""
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=",
         "--tb", "no", "--junitxml", report, *tests],
        cwd=host, capture_output=True, env=os.environ | {"PYTHONPATH": str(plugins)}, timeout=900,
    )  # fmt: skip
    passed = {}
    for case in xml.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if "skipped" not in kinds:
            passed[case.get("classname"), case.get("name")] = not kinds & {"failure", "error"}
    return passed


def file_of(host: Path, module: str) -> Path:
    path = host / module.replace(".", "/")
    while not path.with_suffix(".py").is_file():  # the last part is a class
        path = path.parent
    return path.with_suffix(".py")


@pytest.mark.usefixtures("network")
@pytest.mark.faults
def test_what_passes_without_the_pack_passes_with_it(host_folder, tmp_path):
    plugins = tmp_path / "plugins"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--target", plugins, *NEEDED], check=True
    )
    host = shutil.copytree(host_folder, tmp_path / "ComfyUI")
    pack = tools.clone(host / "custom_nodes" / "comfyui-lcm-lora")
    beside = outcomes(host, plugins, tmp_path / "beside.xml", ["tests-unit"])
    assert sum(beside.values()) > 300
    broken = {case for case, passed in beside.items() if not passed}
    if not broken:
        return
    # Some want a network; they fail without the pack too.
    shutil.rmtree(pack)
    files = {file_of(host, module) for module, _ in broken}
    alone = outcomes(host, plugins, tmp_path / "alone.xml", files)
    assert not [case for case in broken if alone[case]]
