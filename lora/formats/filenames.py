"""The names that users give to LoRA files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

SUFFIX = ".safetensors"
# Windows reserves names with superscript digits too (learn.microsoft.com, "Naming Files").
_WINDOWS_RESERVED = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])( *\..*)?", re.IGNORECASE
)
_FORBIDDEN = re.compile(r'[\x00-\x1f<>:"|?*]')


def inside(folder: Path, name: str) -> Path:
    """The path of the LoRA that a user calls `name`, such as `a` or `subfolder/a`, in `folder`.

    `.safetensors` is added if it is missing.

    Raises:
        ValueError: the name would leave the folder, or is not valid on Windows, Linux and macOS.
    """
    parts = name.strip().replace("\\", "/").split("/")
    if parts[-1] in ("", SUFFIX) or not all(map(_is_portable, parts)):
        raise ValueError(
            f"The file name {name!r} cannot be used: expected a name such as `my lora` or "
            "`folder/my lora`, without `..`, drive letters, a leading slash, control characters, "
            'any of <>:"|?*, or names reserved by Windows.'
        )
    if not parts[-1].endswith(SUFFIX):
        parts[-1] += SUFFIX
    if too_long := [part for part in parts if len(part.encode()) > 255]:
        raise ValueError(f"The file name {too_long[0][:40]}... is longer than 255 bytes.")
    return folder.joinpath(*parts)


def _is_portable(part: str) -> bool:
    return (
        bool(part)
        and part == part.strip(" ")
        and not part.endswith(".")
        and not any(
            "\ud800" <= character <= "\udfff" for character in part
        )  # half a surrogate pair
        and not _FORBIDDEN.search(part)
        and not _WINDOWS_RESERVED.fullmatch(part)
    )


def offered(names: Iterable[str]) -> list[str]:
    """The names of the files that `files.read` can open."""
    return [name for name in names if name.lower().endswith((SUFFIX, ".sft"))]
