"""Files and folders that are written completely or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from ..lora.atomic import TEMPORARY, patiently, sync, temporary_beside, whole_file
from ..lora.atomic import sha256 as sha256

DISK_FULL = 75  # exit status of a process that paused because the disk is full


def disk_is_full(error: OSError) -> bool:
    """Whether an error means a full disk. Some libraries give only a text, so that is searched too
    (112 is Windows' number)."""
    numbers = errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)  # Windows has no EDQUOT
    words = r"No space left|quota exceeded|os error (28|112)\b"
    return error.errno in numbers or bool(re.search(words, str(error)))


def replace(path: Path, content: str) -> None:
    """Writes a small JSON file in one step: a reader gets either the old or the new content."""
    with whole_file(path) as new:
        new.write_bytes(json_text(content).encode())


def json_text(text: str) -> str:
    """JSON text that can be encoded: half of a character becomes its JSON escape. Python uses such
    halves in the names of files whose bytes are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def shown(path: Path | str) -> str:
    """A path as printable text: a byte that is not UTF-8 appears as \\xe9."""
    return os.fsencode(str(path)).decode("utf-8", "backslashreplace")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` if the body ends without an error. `path` must not
    exist."""
    temporary = temporary_beside(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        patiently(os.rename, temporary, path)
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_surely(path: Path) -> Any:
    """The parsed file, or None if it is missing or incomplete. Raises OSError if the disk fails.
    Otherwise a caller could overwrite a good file, or drop what the file describes."""
    try:
        return json.loads(patiently(path.read_text, encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def read_json(path: Path) -> Any:
    """The parsed file, or None if it is missing, incomplete or cannot be read at the moment."""
    try:
        return read_surely(path)
    except OSError:
        return None


def read_object(path: Path) -> dict[str, Any]:
    """The parsed file; {} if it is missing, incomplete, unreadable or not a JSON object."""
    content = read_json(path)
    return content if isinstance(content, dict) else {}


HIDDEN = "hidden: the name begins with a dot"


def files_under(root: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """(sorted files of a folder and its subfolders; (path, reason) of everything left out).

    Links to folders are followed, after the real folders. Each folder is read once, so a link to a
    folder above it ends. Raises OSError if the disk fails.
    """
    files: list[Path] = []
    left_out: list[tuple[Path, str]] = []
    read: set[str] = set()
    folders, linked = [root], list[Path]()
    while folders or linked:
        folder = folders.pop() if folders else linked.pop(0)
        real = os.path.realpath(folder)
        if real in read:
            left_out.append((folder, "this folder was already read under another name"))
            continue
        read.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except PermissionError:
            left_out.append((folder, "this folder may not be read"))
            continue
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith("."):
                left_out.append((path, HIDDEN))
            elif entry.is_dir():
                (linked if entry.is_symlink() else folders).append(path)
            elif entry.is_file():
                files.append(path)
            else:
                dangling = entry.is_symlink()
                reason = "a link that leads nowhere" if dangling else "neither a file nor a folder"
                left_out.append((path, reason))
    return sorted(files), left_out


def stamps(roots: Sequence[Path]) -> str:
    """A hash of the names, sizes and times of all files in these folders."""
    files = [(root, file) for root in roots if root.is_dir() for file in files_under(root)[0]]
    listed = [
        (str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns)
        for root, file in files
    ]
    return name_of(json.dumps(listed))


def clear_torn(folder: Path) -> None:
    """Removes temporary files of interrupted writers. No other process may write to the folder."""
    for left in folder.glob(f"{TEMPORARY}*"):
        _remove(left)


def clear_dead(folder: Path, deep: bool = False) -> None:
    """Removes temporary files of dead writers. Other processes may write to the folder meanwhile,
    but not this one. deep: also in subfolders."""
    for left in folder.glob(f"{'**/' if deep else ''}{TEMPORARY}*"):
        pid = left.name.removeprefix(TEMPORARY).partition("-")[0]
        if pid.isdigit() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            _remove(left)


def _remove(left: Path) -> None:
    shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def name_of(text: str) -> str:
    """A short file name for any text: 16 digits of its hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def numbered(folder: Path, prefix: str) -> list[int]:
    """The numbers of the files and folders named `prefix` and eight digits, in order."""
    paths = folder.glob(prefix + 8 * "[0-9]")
    return sorted(int(path.name.removeprefix(prefix)) for path in paths)
