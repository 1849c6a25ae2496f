"""LoRA files: read with a clear word about what is wrong, written whole or not at all."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .acceleration import FAMILY, acceleration
from .delta import Vector
from .metadata import standard
from .whole import sha256, whole_file
from .wire import parse, to_wire

logger = logging.getLogger("lcm_lora")

SUFFIX = ".safetensors"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}  # in a file's header

_WINDOWS_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[\x00-\x1f<>:"|?*]')


def read(path: Path) -> Vector:
    """A safetensors LoRA in any known key dialect.

    Raises:
        ValueError: the file is empty, truncated, a pickle, no safetensors, or holds no plain LoRA.
    """
    with open(path, "rb") as file:
        start = file.read(9)
    if not start:
        raise ValueError(f"{path.name} is empty (0 bytes); expected a safetensors LoRA.")
    # A header's length may begin with the same bytes; after it comes the header's brace.
    if start.startswith((b"PK", b"\x80")) and not start.endswith(b"{"):
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


def read_named(path: Path, name: str) -> Vector:
    """A file for sums: with its hash, and with the family in its metadata where only `name`, the
    user's name of the file, tells it, for a sum has another name. Raises as `read`."""
    vector = replace(read(path), sha256=sha256(path))
    found, _ = acceleration(vector.metadata, name)
    return replace(vector, metadata={**vector.metadata, FAMILY: found}) if found else vector


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
    tensors = to_wire(vector)
    kinds = {key: torch.float32 if key.endswith(".alpha") else DTYPES[dtype] for key in tensors}
    # Wide numbers first, so that every tensor begins at a multiple of its numbers' size.
    order = sorted(tensors, key=lambda key: (-kinds[key].itemsize, key))
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as new, open(new, "wb") as file:
        # Not kohya's checksums, which are of the tensors of another file.
        told = {k: v for k, v in vector.metadata.items() if not k.startswith("sshs_")}
        metadata = told | standard(vector)
        file.write(_header({key: (kinds[key], tensors[key].shape) for key in order}, metadata))
        for key in order:  # one by one, so that no second copy of them all is ever in memory
            file.write(_bytes(key, tensors[key], kinds[key]))


def _header(
    entries: Mapping[str, tuple[torch.dtype, torch.Size]], metadata: Mapping[str, str]
) -> bytes:
    """How a safetensors file begins: the length of a JSON text, and the text.

    Our own, for the library writes the metadata in an order of chance, and from a copy of all the
    tensors; so the same vector is always the same file.
    """
    told: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    begin = 0
    for key, (kind, shape) in entries.items():
        end = begin + shape.numel() * kind.itemsize
        told[key] = {
            "dtype": NAMES[kind], "shape": list(shape), "data_offsets": [begin, end]
        }  # fmt: skip
        begin = end
    text = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _bytes(key: str, tensor: torch.Tensor, kind: torch.dtype) -> memoryview:
    cast = tensor.detach().cpu().to(kind).contiguous()
    if torch.promote_types(kind, tensor.dtype) != kind:  # not every number fits
        if cast.isinf().any() and not tensor.isinf().any():
            raise ValueError(f"{key} has values too large for fp16; save as bf16 or fp32.")
        if not cast.any() and tensor.any():
            logger.warning("%s is so small that fp16 makes it 0; bf16 or fp32 would keep it.", key)
    return memoryview(cast.reshape(-1).view(torch.uint8).numpy())


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
