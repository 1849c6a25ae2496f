"""Programs of other people that the tests run: the registry's tool and checkers of packs.

Their versions are fixed, so that such a test fails because of the pack and of nothing else.
"""

import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from lcm_lora.dev.environment import ROOT, tool

COMFY_CLI = "comfy-cli==1.23.0"


def run(package: str, *command, cwd: Path) -> subprocess.CompletedProcess:
    """Runs a program of a package; -> its output and status. Its home is next to cwd."""
    programs = tool(package)
    home = cwd.parent / "home"
    home.mkdir(exist_ok=True)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"  # also for the programs that it starts
    return subprocess.run(
        [programs / command[0], *command[1:]], cwd=cwd, capture_output=True, text=True,
        env=os.environ | {"HOME": str(home), "USERPROFILE": str(home), "PATH": path},
    )  # fmt: skip


def comfy(*words: str, cwd: Path) -> str:
    """Runs the registry's own tool; -> what it prints."""
    untracked = cwd.parent / "home" / "untracked"
    if not untracked.exists():
        off = run(COMFY_CLI, "comfy", "--skip-prompt", "tracking", "disable", cwd=cwd)
        assert off.returncode == 0, off.stdout + off.stderr
        untracked.touch()
    result = run(COMFY_CLI, "comfy", "--skip-prompt", *words, cwd=cwd)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def clone(folder: Path) -> Path:
    """The last commit as `git clone` brings it."""
    made = subprocess.run(["git", "clone", "-q", ROOT, folder], capture_output=True, text=True)
    if made.returncode:
        pytest.skip("this is no git checkout, and what users get is made of what git tracks")
    return folder


def archive(scratch: Path) -> zipfile.ZipFile:
    """The archive that the registry would make from the last commit."""
    copy = clone(scratch / "for the registry")
    comfy("node", "pack", cwd=copy)
    return zipfile.ZipFile(copy / "node.zip")
