"""Files that are written completely or not at all, and their hashes."""

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
    """A new name in the same folder. It contains the id of this process."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{uuid.uuid4().hex}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to. If the body raises nothing, the new file then replaces `path`;
    until then an old file stays as it is.

    The temporary file is in the same folder, because a rename is atomic only within a file system.

    Raises:
        OSError: the disk is full, or writing is not allowed.
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
    """The result of a call. If Windows reports that a file is in use, the call is repeated for 2 s.

    Windows can neither replace nor remove a file that another process has open, such as a reader or
    a virus scanner.

    Raises:
        OSError: as the call does.
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
    """Waits until a file, or the list of names in a folder, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders, and does not need this
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The hash of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
