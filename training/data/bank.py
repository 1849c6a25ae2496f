"""The latent bank on disk: clean latents and text embeddings, computed once, read by row.

    <banks>/<key>/texts-00000.safetensors    "0.context", "0.pooled", ... by number of the caption
                  rows-00000.safetensors     "0" [C, h, w], ... and "sizes", "captions", "numbers"
                  index.json                 written last: the bank is complete

The key is made of the checkpoint and of everything that decides the rows, so a second job with the
same teacher and data finds the bank there. A file is written whole or not at all, and what it holds
follows from its number: an interrupted build goes on at the first file that is missing, and several
ranks build every so many files each.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open

from .. import disk
from ..ranks import Ranks
from ..tensors import save

log = logging.getLogger("lcm_lora")
VERSION = 2
ROWS, TEXTS = 16, 64  # in a file; also what an interrupted build loses at most
OPEN = 64  # files of rows, and of texts, that stay open
INDEX = "index.json"


class Unreadable(ValueError):
    """One example could not be used; the message names it and says why."""


@dataclass(frozen=True)
class Row:
    """One clean latent [C, h, w] at diffusion scale; the picture's sizes as in Teacher.sized."""

    latent: torch.Tensor
    sizes: tuple[int, int, int, int, int, int]


class Source(Protocol):
    """Where rows come from: example `number` is the same whenever it is asked for."""

    def __len__(self) -> int: ...

    def captions(self) -> list[str]:
        """The caption of each example."""

    def rows(
        self, numbers: Sequence[int], text: Callable[[int], dict[str, torch.Tensor]],
        between: Callable[[], None],
    ) -> list[Row | Unreadable]:  # fmt: skip
        """The examples of these numbers; text(number) gives an example's text embeddings.

        between() is called before each call of a network, for a file of them may take minutes.
        """


def key(checkpoint_hash: str, settings: dict[str, Any]) -> str:
    """The name of the bank's folder."""
    told = json.dumps([VERSION, checkpoint_hash, settings], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def build(
    folder: Path, source: Source, encode: Callable[[str], dict[str, torch.Tensor]],
    skip_limit: float, ranks: Ranks, progress: Callable[[str, int, int], None],
    after_texts: Callable[[], None] = lambda: None, between: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Makes the bank in `folder`, or what is missing of it. Every process of the job calls it.

    encode: a caption's text embeddings; after_texts is called when no more of them are wanted.
    progress(what, done, of) is called first and after each file, between() before each call of a
    network: what it raises ends the build, and the files that are whole stay. Raises ValueError
    when more than `skip_limit` of the examples cannot be used, or when latents or texts are not
    finite in half precision.
    """
    if (folder / INDEX).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    unique = list(dict.fromkeys(source.captions()))

    def text(number: int) -> dict[str, torch.Tensor]:
        between()
        return encode(unique[number])

    _files(folder, "texts", len(unique), TEXTS, ranks, progress, lambda numbers: _texts(
        numbers, [unique[n] for n in numbers], [text(n) for n in numbers]
    ))  # fmt: skip
    after_texts()
    ranks.wait()
    texts = Texts(folder)
    of = {caption: i for i, caption in enumerate(unique)}
    caption_of = [of[caption] for caption in source.captions()]

    def rows(numbers: range) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        found = source.rows(numbers, lambda number: texts[caption_of[number]], between)
        return _rows(numbers, found, caption_of)

    _files(folder, "rows", len(source), ROWS, ranks, progress, rows)
    ranks.wait()
    if ranks.first:
        _finish(folder, len(source), unique, skip_limit)
    ranks.wait()
    if not (folder / INDEX).exists():
        raise ValueError(f"The latent bank {folder.name} could not be finished.")


def _files(folder, kind, count, size, ranks, progress, make) -> None:
    """Writes the files of one kind that are missing and are this process's to write."""
    total = math.ceil(count / size)
    progress(kind, 0, count)
    for number in range(ranks.rank, total, ranks.world):
        path = folder / f"{kind}-{number:05d}.safetensors"
        if not path.exists():
            tensors, metadata = make(range(number * size, min(count, (number + 1) * size)))
            save(path, tensors, metadata)
        progress(kind, min(count, (number + 1) * size), count)


def _texts(numbers: range, captions: list[str], texts: list[dict[str, torch.Tensor]]):
    tensors: dict[str, torch.Tensor] = {}
    for number, caption, text in zip(numbers, captions, texts, strict=True):
        for name, tensor in text.items():
            half = tensor.half().contiguous()
            if not half.isfinite().all():
                raise ValueError(
                    f"The text encoder's output for {caption[:60]!r} {_wrong(tensor)}. A text "
                    "encoder in half precision is the usual cause: start ComfyUI with "
                    "--fp32-text-enc. Damaged weights or a damaged embedding are another."
                )
            tensors[f"{number}.{name}"] = half
    return tensors, {}


def _wrong(tensor: torch.Tensor) -> str:
    """What is wrong with numbers that half precision does not hold."""
    if not tensor.isfinite().all():
        return "is not finite"
    return f"is not finite in half precision: it reaches {float(tensor.abs().max()):.3g} of 65504"


def _rows(numbers: range, found: list[Row | Unreadable], caption_of: list[int]):
    used = [(n, row) for n, row in zip(numbers, found, strict=True) if isinstance(row, Row)]
    skipped = [str(row) for row in found if isinstance(row, Unreadable)]
    for reason in skipped:
        log.warning("skipped: %s", reason)
    tensors = {str(i): row.latent.half().contiguous() for i, (_, row) in enumerate(used)}
    for half, (number, row) in zip(tensors.values(), used, strict=True):
        if not half.isfinite().all():
            raise ValueError(
                f"The latent of example {number} {_wrong(row.latent)}. A VAE in half precision is "
                "the usual cause (SDXL's overflows in fp16): start ComfyUI with --fp32-vae or "
                "--bf16-vae. For latents that the teacher draws, precision bf16 or fp32 helps."
            )
    tensors["sizes"] = torch.tensor([row.sizes for _, row in used], dtype=torch.int32).view(-1, 6)
    tensors["captions"] = torch.tensor([caption_of[n] for n, _ in used], dtype=torch.int32)
    tensors["numbers"] = torch.tensor([n for n, _ in used], dtype=torch.int32)
    return tensors, {"skipped": json.dumps(skipped)}


def _finish(folder: Path, count: int, captions: list[str], skip_limit: float) -> None:
    files: dict[str, Any] = {}
    skipped: list[str] = []
    for path in sorted(folder.glob("rows-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            skipped += json.loads(file.metadata()["skipped"])
            rows = len(file.get_slice("numbers").get_shape() and file.get_tensor("numbers"))
            shapes = [file.get_slice(str(i)).get_shape() for i in range(rows)]
        files[path.name] = {"bytes": path.stat().st_size, "shapes": shapes}
    if len(skipped) > skip_limit * count:
        raise ValueError(
            f"{len(skipped)} of {count} examples cannot be used, more than the limit of "
            f"{skip_limit:.0%}. The first: {'; '.join(skipped[:3])}"
        )
    disk.clear_dead(folder)  # another job may be writing the same bank
    index = {
        "version": VERSION, "rows": files, "skipped": skipped, "captions": captions,
        "made": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip
    disk.replace(folder / INDEX, json.dumps(index, ensure_ascii=False))


def _opener(folder: Path) -> Callable[[str], Any]:
    """Opens a folder's safetensors files by name, and keeps the OPEN that were used last: a bank of
    a million rows has more files than a process may map."""
    return lru_cache(OPEN)(lambda name: safe_open(folder / name, framework="pt"))


class Texts:
    """Text embeddings by number of the caption: {"context": [L, D], "pooled": [P]}, float32."""

    def __init__(self, folder: Path):
        self._opened = _opener(folder)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        file = self._opened(f"texts-{number // TEXTS:05d}.safetensors")
        names = [name for name in ("context", "pooled") if f"{number}.{name}" in file.keys()]
        return {name: file.get_tensor(f"{number}.{name}").float() for name in names}


class Bank:
    """A complete bank. Rows are numbered without the skipped examples, of which `skipped` has the
    names and reasons.

    Raises ValueError where a file is missing or has another size than was written, and OSError
    where the disk fails.
    """

    def __init__(self, folder: Path):
        index = disk.read_surely(folder / INDEX)
        if index is None:
            raise ValueError(f"{folder} holds no complete latent bank.")
        self.folder, self.texts = folder, Texts(folder)
        self.shapes: list[tuple[int, ...]] = []
        self.skipped: list[str] = index["skipped"]
        self._where: list[tuple[str, int]] = []
        self._opened = _opener(folder)
        for name, told in index["rows"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != told["bytes"]:
                raise ValueError(
                    f"{name} of the latent bank {folder} is damaged or gone. Delete that folder; "
                    "the next run builds it again."
                )
            self._where += [(name, i) for i in range(len(told["shapes"]))]
            self.shapes += [tuple(shape) for shape in told["shapes"]]
        if not self.shapes:
            raise ValueError(f"The latent bank {folder} is empty.")

    def __len__(self) -> int:
        return len(self.shapes)

    def batch(self, rows: Sequence[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """-> latents [B, C, h, w] of one shape, and "context" [B, L, D], "sizes" [B, 6] and, where
        the family has it, "pooled" [B, P]; all on the CPU."""
        latents, sizes, texts = [], [], []
        for row in rows:
            name, at = self._where[row]
            file = self._opened(name)
            latents.append(file.get_tensor(str(at)).float())
            sizes.append(file.get_slice("sizes")[at])
            texts.append(self.texts[int(file.get_slice("captions")[at])])
        return torch.stack(latents), {"sizes": torch.stack(sizes), **together(texts)}


def together(texts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Text embeddings as one batch.

    Captions have one, two or three windows of 77; the shorter are repeated, which attention does
    not notice: the weights of equal keys add up to what one of them had.
    """
    length = math.lcm(*(len(text["context"]) for text in texts))
    contexts = [text["context"].repeat(length // len(text["context"]), 1) for text in texts]
    batch = {"context": torch.stack(contexts)}
    if "pooled" in texts[0]:
        batch["pooled"] = torch.stack([text["pooled"] for text in texts])
    return batch
