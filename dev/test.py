"""`python3 dev test [pytest arguments]`: everything CI runs."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .environment import ROOT

log = logging.getLogger("lcm_lora")


def main(arguments: list[str], host: Path) -> int:
    begun = time.monotonic()
    if subprocess.run([sys.executable, "-m", "ruff", "check", str(ROOT)]).returncode:
        return 1
    os.environ["LCM_LORA_TEST_HOST"] = str(host)
    tests = ROOT / "tests"
    # The root of the collection is tests/: above it lies the pack's __init__, which wants ComfyUI.
    fixed = [
        "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tests), "--confcutdir", str(tests),
    ]  # fmt: skip
    paths = [Path(word.partition("::")[0]).resolve() for word in arguments]
    named = any(path.exists() and path.is_relative_to(tests) for path in paths)
    if not named:
        fixed += [str(tests), *(_side_by_side() if "-m" not in arguments else ())]
    status = pytest.main([*fixed, *arguments])
    log.info("%.0f s in all", time.monotonic() - begun)
    return int(status)


def _side_by_side() -> list[str]:
    """Two processes share the tests (tests/conftest.py says which go together), for they wait much.

    Each has half of the threads: where two programs want every core, both crawl.
    """
    cores = os.cpu_count() or 1
    if cores < 2:
        return []
    os.environ["OMP_NUM_THREADS"] = str(cores // 2)
    return ["-n", "2", "--dist", "loadgroup"]
