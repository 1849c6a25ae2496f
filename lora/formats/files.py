"""LoRA files in the safetensors format. A file is written completely or not at all."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..architecture import cross_attention_width
from ..atomic import sha256, whole_file
from ..delta import Delta, Vector
from ..family import made_for
from .metadata import standard
from .parse import parse
from .peft_config import PEFT_METADATA
from .spelling import for_host
from .wire import one_change

logger = logging.getLogger("lcm_lora")

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LONGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
LOST = 0.02  # share of a tensor's norm; a warning if rounding loses more. bf16 loses 0.002
NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}  # in a file's header

_DOWNLOAD = "The download went wrong: download the file again."
_BYTE_ORDER_MARK = rb"(?:\xef\xbb\xbf)?"
# The first bytes of files in other formats. The first match counts.
_OTHER_FORMATS = tuple(
    (re.compile(beginning), kind)
    for beginning, kind in (
        (
            rb"PK|\x80",
            "a pickle (a .pt or .ckpt file) or a zip archive, whatever its name; expected "
            "safetensors. Pickles can run code, so these nodes do not open them.",
        ),
        (
            rb"version https://git-lfs",
            "a Git LFS pointer, which names a file that was not downloaded; expected safetensors. "
            "Run `git lfs pull`, or download the file itself.",
        ),
        (_BYTE_ORDER_MARK + rb"\s*<", f"a web page; expected safetensors. {_DOWNLOAD}"),
        (
            _BYTE_ORDER_MARK + rb"\s*[{\[]",
            f"JSON text, such as a website's error; expected safetensors. {_DOWNLOAD}",
        ),
        (rb"\x1f\x8b", "a gzip archive; expected safetensors. Unpack it first."),
        (rb"GGUF", "a GGUF file; expected safetensors. Load it with a loader for GGUF."),
    )
)

# The projections around SD1's transformers are convolutions; LyCORIS' products do not show that.
_PROJECTION = re.compile(r"lora_unet_.*_attentions_\d+_proj_(in|out)")


def read(path: Path, mapped: bool = False) -> Vector:
    """A safetensors LoRA in any known key dialect.

    mapped: leaves the numbers in the file until they are used. For a short look at a large file,
    which must not be overwritten meanwhile.

    Raises:
        ValueError: the file is empty, incomplete, of another format, or holds no LoRA.
    """
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError(f"{path.name} is empty (0 bytes); expected a safetensors LoRA.")
    # A safetensors file begins with the length of its header and then a brace. Text and most
    # signatures of other formats, read as a length, are far above the limit.
    length = int.from_bytes(start[:8], "little")
    if length > LONGEST_HEADER or start[8:9] not in (b"{", b""):
        for beginning, kind in _OTHER_FORMATS:
            if beginning.match(start):
                raise ValueError(f"{path.name} is {kind}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}) | _beside(path)
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            if not mapped:
                # A mapped file that is overwritten later would change the tensors.
                tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{path.name} is not a complete safetensors file ({path.stat().st_size} bytes): "
            f"{error}. It may be truncated; download or save it again."
        ) from error
    return parse(tensors, metadata, path.name)


def _beside(path: Path) -> dict[str, str]:
    """The metadata in PEFT's second file, which holds the alphas."""
    config = path.with_name("adapter_config.json")
    if path.name != "adapter_model.safetensors" or not config.is_file():
        return {}
    return {PEFT_METADATA: config.read_text("utf-8", errors="replace")}


def read_named(path: Path, name: str) -> Vector:
    """Reads a file that will be combined with others. Raises as `read`.

    Adds the file's hash and what the LoRA was made for, because the sum has another name.

    name: the file's name, with its folders as the user sees them.
    """
    vector = replace(read(path), sha256=sha256(path))
    made = made_for(vector.metadata, name)
    return replace(vector, metadata={**vector.metadata, **made.metadata()}) if made else vector


def write(path: Path, vector: Vector, dtype: str, overwrite: bool) -> None:
    """Writes a vector with kohya names and alphas. An old file stays as it is until the new one is
    complete.

    Args:
        dtype: "fp16", "bf16" or "fp32", for the factors; alphas stay float32.

    Raises:
        ValueError: the file exists and `overwrite` is False, it is a folder, or a value is too
            large for fp16.
        OSError: the disk is full, or writing is not allowed.
    """
    if path.is_dir():
        raise ValueError(f"{path.name} is a folder; choose another name.")
    if path.exists() and not overwrite:
        raise ValueError(f"{path.name} exists already; choose another name or switch overwrite on.")
    tensors = _tensors(vector, DTYPES[dtype])
    # The widest numbers come first, so that every tensor begins at a multiple of their size.
    order = sorted(tensors, key=lambda key: (-tensors[key].kind.itemsize, key))
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as new, open(new, "wb") as file:
        file.write(_header({key: tensors[key] for key in order}, standard(vector)))
        for key in order:  # one by one, so that memory never holds a second copy of them all
            file.write(_bytes(key, tensors[key].make(), tensors[key].kind))


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a file: its number type, its shape, and a function that makes it."""

    kind: torch.dtype
    shape: Sequence[int]
    make: Callable[[], Tensor]


def _tensors(vector: Vector, kind: torch.dtype) -> dict[str, _Tensor]:
    """The tensors of a vector, with kohya names. Every delta becomes a plain pair of factors and an
    alpha, which every program can read. The factors are computed only when they are written."""
    vector = one_change(for_host(vector))
    width = cross_attention_width(vector.shapes)

    @lru_cache(maxsize=1)  # up and down are written one after the other
    def formed(name: str) -> Delta:
        plain = vector.deltas[name].plain()
        return balanced(plain) if kind == torch.float16 else plain

    def factor(name: str, part: str) -> Tensor:
        return formed(name).up if part == "up" else formed(name).down

    entries: dict[str, _Tensor] = {}
    for name, delta in vector.deltas.items():
        out, columns, *kernel = delta.shape
        if not kernel and width == 768 and _PROJECTION.fullmatch(name):
            kernel = [1, 1]
        up, down = (out, delta.rank, *[1] * len(kernel)), (delta.rank, columns, *kernel)
        alpha = torch.tensor(float(delta.scale * delta.rank))
        entries |= {
            f"{name}.lora_up.weight": _Tensor(kind, up, partial(factor, name, "up")),
            f"{name}.lora_down.weight": _Tensor(kind, down, partial(factor, name, "down")),
            f"{name}.alpha": _Tensor(torch.float32, (), partial(Tensor.detach, alpha)),
        }
    opaque = {f"{n}.{part}": t for n, parts in vector.opaque.items() for part, t in parts.items()}
    for key, tensor in {**opaque, **vector.diffs}.items():
        numbers = torch.float32 if key.endswith(".alpha") else kind
        entries[key] = _Tensor(numbers, tensor.shape, partial(Tensor.detach, tensor))
    return entries


def balanced(delta: Delta) -> Delta:
    """The same delta with the row and the column of each rank about equally large.

    fp16 then keeps the most bits; otherwise the up factor of a LoRA with alpha 1 at rank 128, for
    example, would be too small for fp16. Multiplying by powers of two keeps the product exactly the
    same. Factors in fp16 stay as they are.
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
    """The beginning of a safetensors file: the length of a JSON text, and the text.

    The safetensors library writes the metadata in random order and needs a copy of all tensors.
    With this header, the same vector always gives the same file.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    begin = 0
    for key, entry in entries.items():
        end = begin + math.prod(entry.shape) * entry.kind.itemsize
        header[key] = {
            "dtype": NAMES[entry.kind],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _bytes(key: str, tensor: Tensor, kind: torch.dtype) -> memoryview:
    """The numbers of a tensor in another type. Raises ValueError if one is too large for it."""
    exact = tensor.detach().cpu()
    if exact.itemsize == 1:  # fp8, which PyTorch neither compares nor promotes
        exact = exact.float()
    cast = exact.to(kind).contiguous()
    if torch.promote_types(kind, exact.dtype) != kind:  # not every number fits
        name = next(name for name, dtype in DTYPES.items() if dtype == kind)
        if (cast.isinf() & exact.isfinite()).any():
            raise ValueError(f"{key} has values too large for {name}; save as bf16 or fp32.")
        lost, norm = float((cast - exact).float().norm()), float(exact.float().norm())
        if lost > LOST * norm:
            message = "%s is so small that %s keeps it with an error of %.0f %%; use bf16 or fp32."
            logger.warning(message, key, name, 100 * lost / norm)
    return cast.reshape(-1).view(torch.uint8).numpy().data


def fingerprint(path: Path) -> tuple[str, int, int]:
    """(path, modification time in ns, size in bytes): changes whenever the file does."""
    stat = path.stat()
    return str(path), stat.st_mtime_ns, stat.st_size
