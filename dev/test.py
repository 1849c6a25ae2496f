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
    status = pytest.main([*fixed, *arguments, *([] if named else [str(tests)])])
    log.info("%.0f s in all", time.monotonic() - begun)
    return int(status)
