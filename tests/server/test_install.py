"""The pack as users get it: cloned by ComfyUI's Manager, or out of the registry's archive."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lcm_lora.tests import tools
from lcm_lora.tests.server.ground import done, order
from lcm_lora.tests.server.test_workflows import FOLDER, fitted, pictures
from lcm_lora.training.jobs.store import Store

pytestmark = pytest.mark.usefixtures("network")

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "nodes.json").read_text(encoding="utf-8"))
# Files in a ComfyUI's folder that are not part of ComfyUI.
OWN = {"custom_nodes", "models", "input", "output", "user", "temp", ".git"}


@pytest.fixture
def clean(host_folder, tmp_path) -> Path:
    """A ComfyUI that nobody has used yet."""

    def own(folder: str, names: list[str]) -> set[str]:
        return OWN & set(names) if Path(folder) == host_folder else set()

    made = shutil.copytree(host_folder, tmp_path / "ComfyUI", ignore=own)
    (made / "custom_nodes").mkdir()
    return made


@pytest.fixture(scope="module")
def python(host_folder) -> Iterator[Path]:
    """The Python of a copy of this environment that may be changed, with the Manager that belongs
    to this ComfyUI: its files are hard links to ours, which an installer replaces and never writes
    into. It has to be a full copy, because the Manager's uv looks only into the environment's own
    folder.
    """
    with tempfile.TemporaryDirectory(dir=Path(sys.prefix).parent) as folder:
        venv.create(folder)
        paths = sysconfig.get_paths("venv", {"base": folder, "platbase": folder})
        shutil.copytree(
            sysconfig.get_path("purelib"), paths["purelib"],
            copy_function=os.link, dirs_exist_ok=True,
        )  # fmt: skip
        made = Path(paths["scripts"]) / "python"
        manager = host_folder / "manager_requirements.txt"
        subprocess.run([made, "-m", "pip", "install", "-q", "-r", manager], check=True)
        yield made


@pytest.fixture(scope="module")
def before(python) -> list[str]:
    return packages(python)


def packages(python: Path) -> list[str]:
    return subprocess.run(
        [python, "-m", "pip", "freeze"], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def by_the_manager(host: Path, python: Path, scratch: Path) -> str:
    """-> the name of the pack's folder."""
    repository = tools.clone(scratch / "comfyui-lcm-lora")
    address = f"file://localhost/{repository.as_posix().lstrip('/')}"
    result = subprocess.run(
        [python, "-m", "cm_cli", "install", "--exit-on-fail", address, "--mode", "local"],
        env=os.environ | {"COMFYUI_PATH": str(host)}, capture_output=True, text=True, cwd=scratch,
    )  # fmt: skip
    output = result.stdout + result.stderr
    assert result.returncode == 0 and "[INSTALLED]" in output, output
    assert "PyTorch is not installed" not in output, "it did not see the environment"
    return repository.name


def from_the_archive(host: Path, _python: Path, scratch: Path) -> str:
    with tools.archive(scratch) as made:
        made.extractall(host / "custom_nodes" / "lcm-lora")
    return "lcm-lora"


@pytest.mark.parametrize("way", [by_the_manager, from_the_archive], ids=lambda way: way.__name__)
def test_a_clean_host_has_all_of_it_and_no_package_is_changed(
    way, clean, python, before, tmp_path, client, subject
):
    from lcm_lora.dev.server import Server, install
    from lcm_lora.dev.toy import assemble

    folder = way(clean, python, tmp_path)
    install(assemble.checkpoint(), clean / "models" / "checkpoints")
    install(assemble.lora(assemble.LCM_LORA), clean / "models" / "loras")
    with Server(clean, tmp_path, installed=True, python=python) as server:
        its = server.client()
        nodes = its.get("/object_info")
        for name in GOLDEN:
            assert nodes[name]["python_module"] == f"custom_nodes.{folder}"
        served(its, f"/extensions/{folder}", ROOT / "web")
        assert f"/extensions/{folder}/jobs.js" in its.get("/extensions")
        offered = its.get("/workflow_templates")[folder]
        assert set(offered) == {path.stem for path in FOLDER.glob("*.json")}
        served(its, f"/api/workflow_templates/{folder}", FOLDER)
        prompt = fitted(FOLDER / "1 Text to image (SD1.5).json", subject)
        assert torch.equal(pictures(its, prompt), pictures(client, prompt))
        store = Store(clean / "user" / "__lcm_lora" / "jobs")
        job = order(its, "installed", checkpoint=subject.checkpoint, steps=1, sample_every=0)
        assert done(store, job, 300)
        assert (clean / "models" / "loras" / "installed.safetensors").is_file()
    assert packages(python) == before


def served(client, address: str, folder: Path) -> None:
    """The server returns each file of the folder unchanged."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        part = urllib.request.quote(path.relative_to(folder).as_posix())
        with urllib.request.urlopen(f"{client.url}{address}/{part}", timeout=30) as answer:
            assert answer.read() == path.read_bytes(), part
