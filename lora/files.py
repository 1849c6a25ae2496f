"""LoRA files: read with a clear word about what is wrong, written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .delta import Vector
from .whole import whole_file
from .wire import parse, to_wire

SUFFIX = ".safetensors"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

_WINDOWS_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[\x00-\x1f<>:"|?*]')


def read(path: Path) -> Vector:
    """A safetensors LoRA in any known key dialect.

    Raises:
        ValueError: the file is empty, truncated, a pickle, no safetensors, or holds no plain LoRA.
    """
    with open(path, "rb") as file:
        start = file.read(2)
    if not start:
        raise ValueError(f"{path.name} is empty (0 bytes); expected a safetensors LoRA.")
    if start == b"PK" or start[:1] == b"\x80":
        raise ValueError(
            f"{path.name} is a pickle (a .pt or .ckpt file, whatever its name); expected "
            "safetensors. Pickles can run code and are not opened here."
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies, for a mapped file that is overwritten later would change or crash under us.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path.name} is no whole safetensors file, {path.stat().st_size} bytes long: {error}. "
            "It may be truncated; download or save it again."
        ) from error
    return parse(tensors, metadata, path.name)


def write(path: Path, vector: Vector, dtype: str, overwrite: bool) -> None:
    """Writes a vector in kohya names with alphas: the file is there whole, or not at all.

    Args:
        dtype: "fp16", "bf16" or "fp32", of the factors; alphas stay float32.

    Raises:
        ValueError: the file exists and `overwrite` is False, or a value is too large for fp16.
        OSError: the disk is full or may not be written; an old file is then left as it was.
    """
    if path.exists() and not overwrite:
        raise ValueError(f"{path.name} exists already; choose another name or switch overwrite on.")
    tensors = {}
    for key, tensor in to_wire(vector).items():
        cast = tensor.detach().cpu()
        if not key.endswith(".alpha"):
            cast = cast.to(DTYPES[dtype])
            if cast.isinf().any() and not tensor.isinf().any():
                raise ValueError(f"{key} has values too large for {dtype}; save as bf16 or fp32.")
        tensors[key] = cast.contiguous()

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as new, open(new, "wb") as file:
        for part in _serialised(tensors, dict(vector.metadata)):
            file.write(part)


def _serialised(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> tuple[bytes, bytes, memoryview]:
    """A safetensors file in three parts: the header's length, the header, the tensors.

    The library writes the metadata in an order of chance; sorted, the same vector is always the
    same file.
    """
    data = memoryview(save(tensors, metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8:end]))
    if "__metadata__" in header:
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little"), text, data[end:]


def inside(folder: Path, name: str) -> Path:
    """Path of the LoRA that a user calls `name` (subfolders as `a/b`) within `folder`.

    `.safetensors` is added where it is missing.

    Raises:
        ValueError: the name would leave the folder, or is not valid on Windows, Linux and macOS.
    """
    parts = name.strip().replace("\\", "/").split("/")
    if not name.strip() or not all(map(_is_portable, parts)):
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
        and not _FORBIDDEN.search(part)
        and not _WINDOWS_RESERVED.fullmatch(part)
    )


def offered(names: Iterable[str]) -> list[str]:
    """The file names that `read` can open."""
    return [name for name in names if name.lower().endswith((SUFFIX, ".sft"))]


def fingerprint(path: Path) -> tuple[str, int, int]:
    """Changes whenever the file does: path, modification time in ns, size in bytes."""
    stat = path.stat()
    return str(path), stat.st_mtime_ns, stat.st_size
