"""The latent bank on disk: clean latents and text embeddings, computed once, read by row.

    <banks>/<key>/texts-00000.safetensors    "0.context", "0.pooled", ... by number of the caption,
                                             named as Teacher.text names them
                  rows-00000.safetensors     "0" [C, h, w], ... and "sizes", "captions", "numbers"
                  index.json                 written last: the bank is complete

The key is a hash of the checkpoint and of everything that decides the rows, so a second job with
the same teacher and data uses the same bank. Files are written completely or not at all, and the
number of a file decides what is in it. So an interrupted build goes on at the first missing file,
and several processes share the files among them.
"""

from __future__ import annotations

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
import torch.nn.functional as F
from safetensors import safe_open

from .. import disk
from ..ranks import Ranks
from ..tensors import save

log = logging.getLogger("lcm_lora")
VERSION = 2
ROWS, TEXTS = 16, 64  # in a file, and the most that an interrupted build loses
OPEN = 64  # files of rows, and of texts, that stay open
INDEX = "index.json"
FEATURES = "cross_attn"  # a flow model's text features, as ComfyUI calls them
Sizes = tuple[int, int, int, int, int, int]  # as in Teacher.sized
Tensors = dict[str, torch.Tensor]
TextOf = Callable[[int], Tensors]
_Contents = tuple[Tensors, dict[str, str]]  # a file's tensors and metadata


class Unreadable(ValueError):
    """One example could not be used; the message names it and says why."""


@dataclass(frozen=True)
class Row:
    """A clean latent [C, h, w] at diffusion scale, and its picture's sizes."""

    latent: torch.Tensor
    sizes: Sizes


def square_sizes(side: int) -> Sizes:
    """The sizes of an uncropped square picture; side: in pixels."""
    return side, side, 0, 0, side, side


class Examples(Protocol):
    """Where rows come from. Example `number` is always the same."""

    def __len__(self) -> int: ...

    def captions(self) -> list[str]:
        """The caption of each example."""

    def rows(
        self, numbers: Sequence[int], text: TextOf, between: Callable[[], None]
    ) -> Sequence[Row | Unreadable]:
        """The examples of these numbers. text(number) gives an example's text embeddings.

        between() is called before each network call, because a file of rows can take minutes.
        """


def key(checkpoint_hash: str, settings: dict[str, Any]) -> str:
    """The name of the bank's folder."""
    return disk.name_of(json.dumps([VERSION, checkpoint_hash, settings], sort_keys=True))


def size(
    examples: Examples, latent_shape: torch.Size, encode: Callable[[str], Tensors]
) -> int:  # fmt: skip
    """Bytes of the complete bank: a latent for each example in float16, and each text once.

    A text is as large as two that are encoded here say: between none and the longest caption, it
    grows with the number of letters. encode: as of `build`.
    """
    captions = set(examples.captions())
    longest = max(captions, key=len, default="")
    least, most = (
        sum(tensor.nbytes for tensor in _texts(range(1), [text], [encode(text)])[0].values())
        for text in ("", longest)
    )
    letters = sum(map(len, captions)) / max(1, len(longest))  # in captions of the longest
    texts = len(captions) * least + (most - least) * letters
    return 2 * len(examples) * latent_shape.numel() + math.ceil(texts)


def build(
    folder: Path, examples: Examples, encode: Callable[[str], Tensors],
    skip_limit: float, ranks: Ranks, progress: Callable[[str, int, int], None],
    after_texts: Callable[[], None] = lambda: None, between: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Builds the bank in `folder`, or what is missing of it. Every process of the job calls this.

    encode: a caption's text embeddings; after_texts is called when they are all encoded.
    progress(kind, done, total) is called at the start and after each file, between() before each
    network call. If either raises, the build ends and the finished files stay. Raises ValueError if
    more than `skip_limit` of the examples cannot be used, or if latents or texts are not finite in
    half precision.
    """
    if (folder / INDEX).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    captions = examples.captions()
    unique = list(dict.fromkeys(captions))

    def encoded(numbers: range) -> _Contents:
        embeddings = []
        for number in numbers:
            between()
            embeddings.append(encode(unique[number]))
        return _texts(numbers, [unique[number] for number in numbers], embeddings)

    _write_files(folder, "texts", len(unique), TEXTS, ranks, progress, encoded)
    after_texts()
    ranks.wait()
    texts = Texts(folder)
    number_of = {caption: number for number, caption in enumerate(unique)}
    caption_of = [number_of[caption] for caption in captions]

    def read(numbers: range) -> _Contents:
        rows = examples.rows(numbers, lambda number: texts[caption_of[number]], between)
        return _rows(numbers, rows, caption_of)

    _write_files(folder, "rows", len(examples), ROWS, ranks, progress, read)
    ranks.wait()
    if ranks.first:
        _write_index(folder, len(examples), unique, skip_limit)
    ranks.wait()
    if not (folder / INDEX).exists():
        raise ValueError(f"The latent bank {folder.name} could not be finished.")


def _write_files(
    folder: Path, kind: str, count: int, per_file: int, ranks: Ranks,
    progress: Callable[[str, int, int], None], contents: Callable[[range], _Contents],
) -> None:  # fmt: skip
    """Writes the missing files of one kind that are this process's share."""
    progress(kind, 0, count)
    for number in range(ranks.rank, math.ceil(count / per_file), ranks.world):
        path = folder / f"{kind}-{number:05d}.safetensors"
        first, end = number * per_file, min(count, (number + 1) * per_file)
        if not path.exists():
            save(path, *contents(range(first, end)))
        progress(kind, end, count)


def _texts(numbers: range, captions: list[str], texts: list[Tensors]) -> _Contents:
    tensors: Tensors = {}
    for number, caption, text in zip(numbers, captions, texts, strict=True):
        for name, tensor in text.items():
            half = (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
            if name == FEATURES and not half.isfinite().all() and tensor.isfinite().all():
                half = tensor.contiguous()  # some language models' features are that large
            if not half.isfinite().all():
                raise ValueError(
                    f"The text encoder's output for {caption[:60]!r} {_fault(tensor)}. The usual "
                    "cause is a text encoder in half precision: start ComfyUI with "
                    "--fp32-text-enc. Damaged weights or a damaged embedding can cause it too."
                )
            tensors[f"{number}.{name}"] = half
    return tensors, {}


def _fault(tensor: torch.Tensor) -> str:
    """Why a tensor cannot be stored in half precision."""
    if not tensor.isfinite().all():
        return "is not finite"
    return f"is not finite in half precision: it reaches {float(tensor.abs().max()):.3g} of 65504"


def _rows(
    numbers: range, rows: Sequence[Row | Unreadable], caption_of: Sequence[int]
) -> _Contents:  # fmt: skip
    used = [(n, row) for n, row in zip(numbers, rows, strict=True) if isinstance(row, Row)]
    skipped = [str(row) for row in rows if isinstance(row, Unreadable)]
    for reason in skipped:
        log.warning("skipped: %s", reason)
    tensors = {str(i): row.latent.half().contiguous() for i, (_, row) in enumerate(used)}
    for half, (number, row) in zip(tensors.values(), used, strict=True):
        if not half.isfinite().all():
            raise ValueError(
                f"The latent of example {number} {_fault(row.latent)}. The usual cause is a VAE "
                "in half precision (SDXL's overflows in fp16): start ComfyUI with --fp32-vae or "
                "--bf16-vae. For latents that the teacher draws, choose precision bf16 or fp32."
            )
    tensors["sizes"] = torch.tensor([row.sizes for _, row in used], dtype=torch.int32).view(-1, 6)
    tensors["captions"] = torch.tensor([caption_of[n] for n, _ in used], dtype=torch.int32)
    tensors["numbers"] = torch.tensor([n for n, _ in used], dtype=torch.int32)
    return tensors, {"skipped": json.dumps(skipped)}


def _write_index(folder: Path, count: int, captions: list[str], skip_limit: float) -> None:
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
            f"{len(skipped)} of {count} examples cannot be used; the limit is {skip_limit:.0%}. "
            f"The first: {'; '.join(skipped[:3])}"
        )
    disk.clear_dead(folder)  # another job may be writing the same bank
    index = {
        "version": VERSION, "rows": files, "skipped": skipped, "captions": captions,
        "made": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip
    disk.replace(folder / INDEX, json.dumps(index, ensure_ascii=False))


def _opener(folder: Path) -> Callable[[str], Any]:
    """Opens a folder's safetensors files by name, and keeps the last OPEN of them: a bank of a
    million rows has more files than a process may map."""
    return lru_cache(OPEN)(lambda name: safe_open(folder / name, framework="pt"))


class Texts:
    """A caption's text embeddings by its number, as Teacher.text gave them, rounded."""

    def __init__(self, folder: Path):
        self._opened = _opener(folder)

    def __getitem__(self, number: int) -> Tensors:
        file = self._opened(f"texts-{number // TEXTS:05d}.safetensors")
        keys = [key for key in file.keys() if key.startswith(f"{number}.")]
        tensors = {key.partition(".")[2]: file.get_tensor(key) for key in keys}
        return {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }


class Bank:
    """A complete bank. Rows are numbered without the skipped examples; `skipped` has their names
    and the reasons.

    Raises ValueError if the bank is incomplete or damaged, and OSError if the disk fails.
    """

    def __init__(self, folder: Path):
        index = disk.read_surely(folder / INDEX)
        if index is None:
            raise ValueError(f"{folder} contains no complete latent bank.")
        self.folder, self.texts = folder, Texts(folder)
        self.shapes: list[tuple[int, ...]] = []
        self.skipped: list[str] = index["skipped"]
        self._where: list[tuple[str, int]] = []
        self._opened = _opener(folder)
        for name, entry in index["rows"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                raise ValueError(
                    f"{name} of the latent bank {folder} is damaged or missing. Delete that "
                    "folder; the next run builds it again."
                )
            self._where += [(name, i) for i in range(len(entry["shapes"]))]
            self.shapes += [tuple(shape) for shape in entry["shapes"]]
        if not self.shapes:
            raise ValueError(f"The latent bank {folder} is empty.")

    def __len__(self) -> int:
        return len(self.shapes)

    def batch(self, rows: Sequence[int]) -> tuple[torch.Tensor, Tensors, torch.Tensor]:
        """(latents [B, C, h, w], texts as `together` gives them, sizes [B, 6]), all on the CPU.

        The rows' latents must have one shape.
        """
        latents, sizes, texts = [], [], []
        for row in rows:
            name, at = self._where[row]
            file = self._opened(name)
            latents.append(file.get_tensor(str(at)).float())
            sizes.append(file.get_slice("sizes")[at])
            texts.append(self.texts[int(file.get_slice("captions")[at])])
        return torch.stack(latents), together(texts), torch.stack(sizes)


def together(texts: Sequence[Tensors]) -> Tensors:
    """Text embeddings as one batch.

    Of Stable Diffusion: "context" [B, L, D] and, if they have it, "pooled" [B, P]. Captions have
    one, two or three windows of 77. The shorter ones are repeated, which does not change attention:
    the weights of equal keys add up to the weight that one of them had.

    Of flow models: every tensor under its name, filled up with zeros to the largest of the batch,
    and its own shape [B, dimensions] under `shape_of(name)`, so that `apart` gives it back.
    """
    if FEATURES in texts[0]:
        batch = {}
        for name in texts[0]:
            tensors = [text[name] for text in texts]
            batch[shape_of(name)] = torch.tensor([tensor.shape for tensor in tensors])
            largest = batch[shape_of(name)].amax(0).tolist()
            batch[name] = torch.stack([grown(tensor, largest) for tensor in tensors])
        return batch
    length = math.lcm(*(len(text["context"]) for text in texts))
    contexts = [text["context"].repeat(length // len(text["context"]), 1) for text in texts]
    batch = {"context": torch.stack(contexts)}
    if "pooled" in texts[0]:
        batch["pooled"] = torch.stack([text["pooled"] for text in texts])
    return batch


def shape_of(name: str) -> str:
    """Where `together` says how large a tensor was."""
    return f"{name}.shape"


def grown(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor with zeros at the end of each dimension that is smaller than in `shape`."""
    missing = [wanted - had for wanted, had in zip(shape, tensor.shape, strict=True)]
    return F.pad(tensor, [n for more in reversed(missing) for n in (0, more)])


def apart(batch: Tensors) -> list[Tensors]:
    """What `together` joined, of flow models."""
    names = [name for name in batch if shape_of(name) in batch]
    shapes = {name: batch[shape_of(name)].tolist() for name in names}
    return [
        {name: batch[name][i][tuple(map(slice, shapes[name][i]))] for name in names}
        for i in range(len(batch[FEATURES]))
    ]
