"""LoRA files: read with a clear word about what is wrong, written whole or not at all."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .acceleration import FAMILY, acceleration
from .delta import Delta, Vector
from .family import cross_attention_width
from .metadata import standard
from .peft_config import PEFT_METADATA
from .whole import sha256, whole_file
from .wire import for_host, one_change, parse

logger = logging.getLogger("lcm_lora")

SUFFIX = ".safetensors"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LOST = 0.02  # of a tensor's norm, by rounding to fewer bits, is worth a word; bf16 loses 0.002
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}  # in a file's header

# SD1 leads into its transformers by convolutions; LyCORIS' products do not tell that.
_PROJECTION = re.compile(r"lora_unet_.*_attentions_\d+_proj_(in|out)")
# Windows takes superscript digits for digits here (learn.microsoft.com, "Naming Files").
_WINDOWS_RESERVED = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])( *\..*)?", re.IGNORECASE
)
_FORBIDDEN = re.compile(r'[\x00-\x1f<>:"|?*]')

_DOWNLOAD = "The download went wrong: download the file again."
# What other files begin with. The first that matches counts.
_OTHER_FORMATS = tuple(
    (re.compile(beginning, re.DOTALL), kind)
    for beginning, kind in (
        (
            rb"PK|\x80",
            "a pickle (a .pt or .ckpt file, whatever its name); expected safetensors. Pickles can "
            "run code and are not opened here.",
        ),
        (
            rb"version https://git-lfs",
            "a Git LFS pointer, which names a file that was not downloaded; expected safetensors. "
            "Run `git lfs pull`, or download the file itself.",
        ),
        (rb"\s*<", f"a web page; expected safetensors. {_DOWNLOAD}"),
        (rb"\s*[{\[]", f"JSON text, such as a website's error; expected safetensors. {_DOWNLOAD}"),
        (rb"GGUF", "a GGUF file; expected safetensors. Load it with a loader for GGUF."),
    )
)


def read(path: Path) -> Vector:
    """A safetensors LoRA in any known key dialect.

    Raises:
        ValueError: the file is empty, truncated, of another format, or does not hold a plain LoRA.
    """
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError(f"{path.name} is empty (0 bytes); expected a safetensors LoRA.")
    # A header's length may begin with the same bytes; after it comes the header's brace.
    if start[8:9] != b"{":
        for beginning, kind in _OTHER_FORMATS:
            if beginning.match(start):
                raise ValueError(f"{path.name} is {kind}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}) | _beside(path)
            # Copies, for a mapped file that is overwritten later would change or crash under us.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path.name} is not a complete safetensors file ({path.stat().st_size} bytes): "
            f"{error}. It may be truncated; download or save it again."
        ) from error
    return parse(tensors, metadata, path.name)


def _beside(path: Path) -> dict[str, str]:
    """What PEFT keeps in a second file beside its own: the alphas, without which its strength is
    lost."""
    config = path.with_name("adapter_config.json")
    if path.name != "adapter_model.safetensors" or not config.is_file():
        return {}
    return {PEFT_METADATA: config.read_text("utf-8", errors="replace")}


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
        ValueError: the file exists and `overwrite` is False, it is a folder, or a value is too
            large for fp16.
        OSError: the disk is full or may not be written; an old file is then left as it was.
    """
    if path.is_dir():
        raise ValueError(f"{path.name} is a folder; choose another name.")
    if path.exists() and not overwrite:
        raise ValueError(f"{path.name} exists already; choose another name or switch overwrite on.")
    tensors = _tensors(vector, DTYPES[dtype])
    # Wide numbers first, so that every tensor begins at a multiple of its numbers' size.
    order = sorted(tensors, key=lambda key: (-tensors[key].kind.itemsize, key))
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as new, open(new, "wb") as file:
        file.write(_header({key: tensors[key] for key in order}, standard(vector)))
        for key in order:  # one by one, so that no second copy of them all is ever in memory
            file.write(_bytes(key, tensors[key].make(), tensors[key].kind))


@dataclass(frozen=True)
class _Tensor:
    """One of a file: its number type, its shape, and what gives it."""

    kind: torch.dtype
    shape: Sequence[int]
    make: Callable[[], torch.Tensor]


def _tensors(vector: Vector, kind: torch.dtype) -> dict[str, _Tensor]:
    """All of a vector's, in kohya names. Every delta is a plain pair of factors and its alpha, as
    every program reads it, and is formed when its turn comes."""
    vector = one_change(for_host(vector))
    width = cross_attention_width(vector.shapes)

    @lru_cache(maxsize=1)  # for up and down are written one after the other
    def formed(name: str) -> Delta:
        plain = vector.deltas[name].plain()
        return balanced(plain) if kind == torch.float16 else plain

    found = {}
    for name, delta in vector.deltas.items():
        out, columns, *kernel = delta.shape
        if not kernel and width == 768 and _PROJECTION.fullmatch(name):
            kernel = [1, 1]
        up, down = (out, delta.rank, *[1] * len(kernel)), (delta.rank, columns, *kernel)
        alpha = torch.tensor(float(delta.scale * delta.rank))
        found |= {
            f"{name}.lora_up.weight": _Tensor(kind, up, lambda n=name: formed(n).up),
            f"{name}.lora_down.weight": _Tensor(kind, down, lambda n=name: formed(n).down),
            f"{name}.alpha": _Tensor(torch.float32, (), lambda a=alpha: a),
        }
    whole = {f"{n}.{part}": t for n, module in vector.opaque.items() for part, t in module.items()}
    for key, tensor in (whole | vector.diffs).items():
        numbers = torch.float32 if key.endswith(".alpha") else kind
        found[key] = _Tensor(numbers, tensor.shape, lambda t=tensor: t)
    return found


def balanced(delta: Delta) -> Delta:
    """The same delta with each rank's row and column about equally large, which fp16 likes best.

    By powers of two, so that the product stays the same to the bit: an alpha of 1 at rank 128 in
    the up factor leaves numbers that fp16 keeps in part only. Factors in fp16 stay as they are.
    """
    if delta.up.dtype == delta.down.dtype == torch.float16:
        return delta
    up, down = delta.up.float(), delta.down.float()
    columns, rows = up.flatten(1).abs().amax(0), down.flatten(1).abs().amax(1)
    shift = ((rows.log2() - columns.log2()) / 2).round().nan_to_num(0, 0, 0)
    up = up * 2.0 ** shift.reshape(1, -1, *[1] * (up.dim() - 2))
    down = down * 2.0 ** -shift.reshape(-1, *[1] * (down.dim() - 1))
    return replace(delta, up=up, down=down)


def _header(entries: Mapping[str, _Tensor], metadata: Mapping[str, str]) -> bytes:
    """How a safetensors file begins: the length of a JSON text, and the text.

    Our own, for the library writes the metadata in an order of chance, and from a copy of all the
    tensors; so the same vector is always the same file.
    """
    told: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    begin = 0
    for key, each in entries.items():
        end = begin + math.prod(each.shape) * each.kind.itemsize
        told[key] = {
            "dtype": NAMES[each.kind], "shape": list(each.shape), "data_offsets": [begin, end]
        }  # fmt: skip
        begin = end
    text = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _bytes(key: str, tensor: torch.Tensor, kind: torch.dtype) -> memoryview:
    given = tensor.detach().cpu()
    if given.itemsize == 1:  # fp8, which PyTorch neither compares nor promotes
        given = given.float()
    cast = given.to(kind).contiguous()
    if torch.promote_types(kind, given.dtype) != kind:  # not every number fits
        if (cast.isinf() & given.isfinite()).any():
            raise ValueError(
                f"{key} has values too large for {_called(kind)}; save as bf16 or fp32."
            )
        lost, whole = (float(each.float().norm()) for each in (cast - given, given))
        if lost > LOST * whole:
            logger.warning(
                "%s is so small that %s keeps it with an error of %.0f %%; bf16 or fp32 would keep "
                "it.", key, _called(kind), 100 * lost / whole,
            )  # fmt: skip
    return memoryview(cast.reshape(-1).view(torch.uint8).numpy())


def _called(kind: torch.dtype) -> str:
    return next(name for name, each in DTYPES.items() if each == kind)


def inside(folder: Path, name: str) -> Path:
    """Path of the LoRA that a user calls `name` (subfolders as `a/b`) within `folder`.

    `.safetensors` is added where it is missing.

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
        and not any("\ud800" <= character <= "\udfff" for character in part)  # halves of one
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
