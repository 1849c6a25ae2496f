"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from ..lora.whole import TEMPORARY, sync, temporary_beside, whole_file
from ..lora.whole import sha256 as sha256


def replace(path: Path, content: str | bytes) -> None:
    """Writes a small file at once: a reader sees the old one or the new one."""
    with whole_file(path) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the body ends well. `path` must not exist."""
    temporary = temporary_beside(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        os.rename(temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: Path) -> Any:
    """The parsed file, or None where it is not there or torn."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_object(path: Path) -> dict[str, Any]:
    """The parsed file; {} where it is not there, torn, or holds no JSON object."""
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def clear_torn(folder: Path) -> None:
    """Removes what an interrupted writer left. Only where no other process writes."""
    for left in folder.glob(f"{TEMPORARY}*"):
        _remove(left)


def clear_dead(folder: Path, deep: bool = False) -> None:
    """Removes what writers left that are no more, while others may be writing; this process must
    not. deep: in the folders within too."""
    for left in folder.glob(f"{'**/' if deep else ''}{TEMPORARY}*"):
        pid = left.name.removeprefix(TEMPORARY).partition("-")[0]
        if pid.isdigit() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            _remove(left)


def _remove(left: Path) -> None:
    shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def name_of(text: str) -> str:
    """A short file name that stands for any text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
