"""What a distillation job is told: one JSON file, checked before anything is loaded."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from . import disk

OBJECTIVES = ("lcm", "phased")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
DECAYS = ("constant", "cosine", "linear")
CHECKPOINTING = ("auto", "on", "off")
# Settings that name files. Python spells bytes that are not UTF-8 as halves of characters.
PATHS = ("host", "checkpoint", "output", "banks", "embeddings", "path", "style_lora")


@dataclass(frozen=True)
class Data:
    """Where the clean latents come from.

    Attributes:
        kind: "prompts" (the teacher draws the latents itself) or "pictures".
        path: "prompts": a UTF-8 text file, one prompt a line, or empty for the list that the pack
            brings; "pictures": a folder with captions, a WebDataset tar, or a folder of those.
        prompts: given here instead of in a file.
        count: "prompts": how many latents to draw.
        draw_steps: "prompts": DDIM steps of each.
        crops, flip: "pictures": crops of each picture, and whether half of them are mirrored.
        skip_limit: "pictures": the share that may be unreadable before the job fails.
    """

    kind: str = "prompts"
    path: str = ""
    prompts: tuple[str, ...] = ()
    count: int = 1000
    draw_steps: int = 25
    crops: int = 1
    flip: bool = True
    skip_limit: float = 0.05


@dataclass(frozen=True)
class StyleLoRA:
    """A LoRA that is baked into the teacher before the distillation."""

    path: str
    strength: float = 1.0


@dataclass(frozen=True)
class Spec:
    """One distillation. Paths are absolute; the job's folder is where the spec lies.

    Attributes:
        host: ComfyUI's folder. host_flags: its command line flags, as the server was started.
        checkpoint: the teacher. loras: baked into it first. embeddings: folders of embeddings, of
            which the first that has one of the name counts.
        output: the LoRA file to write; overwrite: whether it may replace one.
        banks: folder of the latent banks, which jobs share. data: see Data.
        resolution: side of the square, in pixels, whose area the pictures have.
        steps: optimiser steps. batch: pictures a step on each process. micro_batch: pictures at a
            time on the device, 0 for the whole batch.
        rank, alpha: of every LoRA layer; alpha 0 means alpha = rank.
        guidance: the usual CFG scale, one number or the two ends of a range.
        objective: "lcm", or "phased" with `phases` segments.
        lr: AdamW's learning rate; warmup: steps; decay: "constant", "cosine" or "linear".
        clip: limit of the gradient's norm.
        precision: of the frozen network: "auto", "fp32", "bf16" or "fp16".
        checkpointing: recompute blocks in backward: "auto" when memory runs out, "on", "off".
        compile: torch.compile for each block.
        checkpoint_every, keep: steps between checkpoints, and how many are kept beside the best.
        log_every: steps between lines of metrics.jsonl.
        sample_every: steps between sample pictures, 0 for none; sample_prompts: what they show.
        patience: stop when that many samplings in a row were no better; 0 never stops early.
        seed: of everything that is drawn.
        passes: how many passes over the bank, one after the other, use the same noise and timestep
            of each row; the teacher is asked in the first of them only.
    """

    host: str
    checkpoint: str
    output: str
    banks: str
    host_flags: tuple[str, ...] = ()
    loras: tuple[StyleLoRA, ...] = ()
    embeddings: tuple[str, ...] = ()
    overwrite: bool = False
    data: Data = field(default_factory=Data)
    resolution: int = 512
    steps: int = 1000
    batch: int = 12
    micro_batch: int = 0
    rank: int = 64
    alpha: float = 0.0
    guidance: tuple[float, ...] = (7.5,)
    objective: str = "lcm"
    phases: int = 4
    lr: float = 1e-4
    warmup: int = 0
    decay: str = "constant"
    clip: float = 1.0
    precision: str = "auto"
    checkpointing: str = "auto"
    compile: bool = False
    checkpoint_every: int = 100
    keep: int = 2
    log_every: int = 10
    sample_every: int = 250
    sample_prompts: tuple[str, ...] = ()
    patience: int = 0
    seed: int = 0
    passes: int = 1

    def __post_init__(self) -> None:
        for name in ("host", "checkpoint", "output", "banks"):
            if not Path(getattr(self, name)).is_absolute():
                raise ValueError(f"{name} must be an absolute path, found {getattr(self, name)!r}.")
        if not self.output.endswith(".safetensors"):
            raise ValueError(f"output must end in .safetensors, found {self.output!r}.")
        at_least_one = (
            "steps", "batch", "rank", "phases", "checkpoint_every", "keep", "log_every", "passes"
        )  # fmt: skip
        for name in at_least_one:
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("micro_batch", "alpha", "warmup", "sample_every", "patience", "seed"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        for name, known in (
            ("objective", OBJECTIVES), ("precision", PRECISIONS), ("decay", DECAYS),
            ("checkpointing", CHECKPOINTING),
        ):  # fmt: skip
            _require(getattr(self, name) in known, name, _any(known), getattr(self, name))
        w = self.guidance
        fine = len(w) in (1, 2) and 1 <= w[0] <= w[-1] <= 30
        _require(fine, "guidance", "one number from 1 to 30, or a range of two", list(w))
        _require(0 < self.lr <= 1, "lr", "above 0 and at most 1", self.lr)
        _require(self.clip > 0, "clip", "above 0", self.clip)
        _require(self.phases <= 50, "phases", "at most 50", self.phases)
        side = self.resolution
        _require(64 <= side <= 4096 and side % 8 == 0, "resolution", "64 to 4096, by 8", side)
        data = self.data
        kinds = ("prompts", "pictures")
        _require(data.kind in kinds, "data.kind", _any(kinds), data.kind)
        _require(data.count >= 1, "data.count", "at least 1", data.count)
        _require(1 <= data.draw_steps <= 1000, "data.draw_steps", "1 to 1000", data.draw_steps)
        _require(data.crops >= 1, "data.crops", "at least 1", data.crops)
        _require(0 <= data.skip_limit <= 1, "data.skip_limit", "0 to 1", data.skip_limit)
        if data.kind == "pictures" and not data.path:
            raise ValueError("data.path is empty: name the folder of pictures or the tar file.")

    @property
    def lora_alpha(self) -> float:
        return self.alpha or float(self.rank)

    def to_json(self) -> str:
        """Valid Unicode, and for `read` the same description, whatever the paths hold."""
        return disk.json_text(json.dumps(asdict(self), indent=1, ensure_ascii=False)) + "\n"


def read(path: Path) -> Spec:
    """The job described in a JSON file.

    Raises ValueError for what is missing, unknown, of another type, or out of range.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"There is no job description {path}.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} is not JSON: {error}.") from None
    if isinstance(found, dict) and isinstance(found.get("guidance"), int | float):
        found["guidance"] = [found["guidance"]]
    if isinstance(found, dict) and isinstance(found.get("embeddings"), str):  # of an older version
        found["embeddings"] = [found["embeddings"]] if found["embeddings"] else []
    return build(Spec, found, path.name)


def build(kind: type, found: Any, where: str) -> Any:
    """A dataclass out of parsed JSON, every field checked against its annotation.

    Raises ValueError for what is missing, unknown, or of another type.
    """
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be a JSON object, found {type(found).__name__}.")
    known = get_type_hints(kind)
    if unknown := sorted(found.keys() - known.keys()):
        raise ValueError(f"{where} has unknown settings: {', '.join(unknown)}.")
    required = {
        each.name for each in fields(kind)
        if each.default is MISSING and each.default_factory is MISSING
    }  # fmt: skip
    if missing := sorted(required - found.keys()):
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    return kind(**{name: _cast(known[name], found[name], name) for name in found})


def _cast(kind: Any, value: Any, name: str) -> Any:
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list, found {value!r}.")
        return tuple(_cast(get_args(kind)[0], each, name) for each in value)
    if is_dataclass(kind):
        return build(kind, value, name)
    if kind is float and type(value) is int:
        value = float(value)
    # `type(...) is`, for True is an int to isinstance.
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        words = {str: "text", int: "a whole number", float: "a number", bool: "true/false"}
        raise ValueError(f"{name} must be {words[kind]}, found {value!r}.")
    if kind is str and name not in PATHS:
        _require_unicode(value, name)
    return value


def _require_unicode(text: str, name: str) -> None:
    """Raises ValueError for half of a character, which JSON can hold but nothing can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        raise ValueError(
            f"{name} contains half of a character ({text[error.start]!a}) in line {line}, which is "
            "not valid Unicode. Type the text again."
        ) from None


def _any(known: tuple[str, ...]) -> str:
    return "one of " + ", ".join(known)


def _require(fine: bool, name: str, expected: str, found: object) -> None:
    if not fine:
        raise ValueError(f"{name} must be {expected}, found {found!r}.")
