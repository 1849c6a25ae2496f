"""What developers' commands prepare: front ends in the cache, and the device."""

import os
import zipfile

import pytest
import torch
from lcm_lora.dev import commands, environment

VERSION = "9.8.7"


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder for packages, all that pip finds; the cache is empty."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("LCM_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    (tmp_path / "cache").mkdir()
    return folder


def pack(folder) -> None:
    """A package of a front end."""
    info = f"comfyui_frontend_package-{VERSION}.dist-info"
    files = {
        "comfyui_frontend_package/static/index.html": "the page",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {environment.FRONT_END}\n"
        f"Version: {VERSION}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    path = folder / f"comfyui_frontend_package-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)


def test_a_front_end_is_fetched_once_and_whole(wheels):
    pack(wheels)
    pages = environment.front_end(VERSION)
    assert (pages / "index.html").read_text() == "the page"
    for wheel in wheels.iterdir():
        wheel.unlink()  # no network from here on
    assert environment.front_end(VERSION) == pages

    kept = pages.parents[1]
    (kept / "complete").unlink()  # as an interruption would leave it
    with pytest.raises(environment.SetupError):
        environment.front_end(VERSION)
    assert list(kept.parent.iterdir()) == []


def test_without_network_it_says_what_to_do(wheels):
    with pytest.raises(environment.SetupError, match=rf"(?s){VERSION} failed.*, and the network"):
        environment.front_end(VERSION)


def test_every_host_has_its_own_front_end():
    requirements = "comfyui-frontend-package==1.47.12\ncomfyui-workflow-templates==0.11.27\n"
    assert environment._front_end_of(requirements) == "1.47.12"
    assert environment._front_end_of("comfyui-frontend-package>=1.4\n") == ""


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        (["test"], ("0.30.0", "", ["test"])),
        (["test", "--host", "0.16.3", "-k", "x"], ("0.16.3", "", ["test", "-k", "x"])),
        (["--front-end=1.58.1", "--host=0.24.1", "test"], ("0.24.1", "1.58.1", ["test"])),
    ],
)
def test_a_run_chooses_host_and_front_end(arguments, chosen):
    assert environment.chosen(arguments) == chosen


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--front-end"], "found nothing"),
        (["--front-end", "latest"], "found latest"),
        (["--host", "0.1"], "found 0.1"),
    ],
)
def test_what_is_no_version_is_refused(arguments, found):
    with pytest.raises(environment.SetupError, match=found):
        environment.chosen(arguments)


def test_device_is_chosen_by_hiding_the_others(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert commands.choose_device(["merge", "--device", "cpu", "--runs", "1"]) == [
        "merge", "--runs", "1",
    ]  # fmt: skip
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    with pytest.raises(SystemExit, match="expected cpu or the number of a GPU, found gpu"):
        commands.choose_device(["--device", "gpu"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="sees no GPU 7"):
            commands.choose_device(["--device", "7"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert commands.choose_device(["merge"]) == ["merge"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
