"""What the developer's commands understand before there is an environment."""

import subprocess
import sys
from pathlib import Path

import pytest
from lcm_lora.dev import environment
from lcm_lora.dev.environment import SetupError

DEV = Path(environment.__file__).parent


@pytest.mark.parametrize(
    ("given", "version", "rest"),
    [
        (["test"], "0.30.0", ["test"]),
        (["test", "--host", "0.16.3", "-k", "x"], "0.16.3", ["test", "-k", "x"]),
        (["demo", "--host=0.24.1"], "0.24.1", ["demo"]),
    ],
)
def test_the_host_is_chosen_by_an_option(given, version, rest):
    assert environment.chosen_host(given) == (version, rest)


@pytest.mark.parametrize("given", [["test", "--host"], ["test", "--host", "1.0"]])
def test_an_unknown_host_is_refused_with_the_known_ones(given):
    with pytest.raises(SetupError, match="0.30.0, 0.24.1, 0.16.3"):
        environment.chosen_host(given)


def test_the_developers_packages_are_those_of_pyproject():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((DEV.parent / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["project"]["optional-dependencies"]["dev"]
    assert environment._developer_packages() == listed


def test_a_folder_without_comfyui_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.setenv("LCM_LORA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SetupError, match="holds no main.py"):
        environment.prepare("0.30.0")


def test_a_full_disk_is_said_before_anything_is_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("LCM_LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(environment, "NEEDED", 10**18)
    with pytest.raises(SetupError, match="LCM_LORA_CACHE"):
        environment._environment("numpy\n")
    assert not (tmp_path / "envs").exists()


def test_a_step_that_fails_shows_its_last_words_and_what_to_do():
    command = [sys.executable, "-c", "print('no such package'); raise SystemExit(3)"]
    with pytest.raises(SetupError, match="(?s)Fetching failed.*no such package.*again"):
        environment._step("Fetching", command)


def test_what_was_left_half_made_is_removed(tmp_path):
    (tmp_path / "half").mkdir()
    environment._wipe(tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_without_a_verb_it_explains_itself():
    shown = subprocess.run([sys.executable, str(DEV)], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0 and "demo | test | serve" in shown.stdout
