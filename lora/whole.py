"""A file that is there whole or not at all, and the hash by which it is known."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"
IN_USE = 5, 32, 33  # Windows: access denied, sharing violation, lock violation
PATIENCE = 2.0  # seconds


def temporary_beside(path: Path) -> Path:
    """A new name in the same folder, which tells the process that works on it."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{uuid.uuid4().hex}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the body ends well.

    It lies in the same folder, for a rename is atomic only within one file system. Raises OSError
    when the disk is full or may not be written; an old file is then left as it was.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
        sync(temporary)
        patiently(os.replace, temporary, path)
        sync(path.parent)
    finally:
        patiently(temporary.unlink, missing_ok=True)


def patiently(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a call gives; tried again for 2 s where Windows says that a file is in use.

    There a file that another process has open, a reader or a virus scanner, can be neither replaced
    nor removed. Raises OSError as the call does.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return call(*arguments, **options)
        except OSError as error:
            on_windows = os.name == "nt" and isinstance(error, PermissionError)
            in_use = on_windows or getattr(error, "winerror", None) in IN_USE
            if not in_use or time.monotonic() > until:
                raise
        time.sleep(0.02)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders, and needs no such call
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Of the whole file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
