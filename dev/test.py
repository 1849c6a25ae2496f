"""`python3 dev test [pytest arguments]`: everything CI runs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from .environment import ROOT, cache, tool

log = logging.getLogger("lcm_lora")
PRODUCT = ("lora", "nodes", "samplers", "search", "training")
MYPY = "mypy==2.4.1"


def main(arguments: list[str], host: Path) -> int:
    begun = time.monotonic()
    ruff = [sys.executable, "-m", "ruff"]
    for check in (["check"], ["format", "--check"]):
        if subprocess.run([*ruff, *check, str(ROOT)]).returncode:
            return 1
    os.environ["LCM_LORA_TEST_HOST"] = str(host)
    # Otherwise each process that the tests start would compile all of ComfyUI again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    tests = ROOT / "tests"
    # pytest collects below tests/ only: the __init__ above it imports ComfyUI.
    fixed = [
        "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tests), "--confcutdir", str(tests),
    ]  # fmt: skip
    paths = [Path(word.partition("::")[0]).resolve() for word in arguments]
    named = any(path.exists() and path.is_relative_to(tests) for path in paths)
    if not named:
        if _check_types():
            return 1
        fixed += [str(tests), *(_side_by_side() if "-m" not in arguments else ())]
    status = pytest.main([*fixed, *arguments])
    log.info("%.0f s in all", time.monotonic() - begun)
    return int(status)


def _check_types() -> int:
    """mypy on the product; -> its exit status.

    The parts import each other as subpackages, so mypy gets a folder with a package's name that
    contains them. The checkout's own name may be no valid package name.
    """
    command = [
        str(tool(MYPY) / "mypy"), "--config-file", str(ROOT / "pyproject.toml"),
        "--python-executable", sys.executable, "--cache-dir", str(cache() / "mypy"),
    ]  # fmt: skip
    for part in PRODUCT:
        command += ["-p", f"lcm_lora.{part}"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "lcm_lora").symlink_to(ROOT, target_is_directory=True)
        return subprocess.run(command, cwd=folder).returncode


def _side_by_side() -> list[str]:
    """Arguments for two processes that share the tests, because most tests spend time waiting.

    tests/conftest.py says which tests stay in one process, and which run first. Each process gets
    half of the threads, because two programs that both use every core slow each other down.
    """
    cores = os.cpu_count() or 1
    if cores < 2:
        return []
    os.environ["OMP_NUM_THREADS"] = str(cores // 2)
    return ["-n", "2", "--dist", "loadgroup", "--no-loadscope-reorder"]
