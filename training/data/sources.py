"""Where the bank's latents come from: the teacher itself, or pictures."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ...samplers.noise import picture_seed
from ..disk import shown
from ..memory import in_parts
from ..objectives.solver import ddim
from ..spec import Spec
from . import bank
from .captions import decoded
from .pictures import Example, Pictures

log = logging.getLogger("lcm_lora")
AT_ONCE = 16  # latents that are drawn, or pictures that are encoded, in one call
PROMPTS = Path(__file__).with_name("prompts.txt")


class Drawn:
    """Latents that the teacher draws from prompts: nobody needs a data set.

    Guided DDIM from noise that follows from (seed, number); the prompts are taken in turn.
    unused: (prompt, reason) of those that never have their turn.
    """

    def __init__(self, spec: Spec, teacher):
        self.teacher = teacher
        self.prompts = spec.data.prompts or tuple(read_prompts(spec.data.path))
        self.spec = spec
        self.cfg = sum(spec.guidance) / len(spec.guidance)
        reason = f"count is {len(self)}, so only that many prompts are used"
        self.unused = [(prompt[:60], reason) for prompt in self.prompts[len(self) :]]

    def __len__(self) -> int:
        return self.spec.data.count

    def captions(self) -> list[str]:
        return [self.prompts[i % len(self.prompts)] for i in range(len(self))]

    def settings(self) -> dict[str, Any]:
        told = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
        spec = self.spec
        return {
            "prompts": told, "count": len(self), "steps": spec.data.draw_steps, "cfg": self.cfg,
            "resolution": spec.resolution, "seed": spec.seed, "dtype": str(self.teacher.dtype),
        }  # fmt: skip

    def rows(
        self, numbers: Sequence[int], text: Callable[[int], dict[str, torch.Tensor]],
        between: Callable[[], None],
    ) -> list[bank.Row]:  # fmt: skip
        return in_parts(numbers, AT_ONCE, lambda part: self._drawn(part, text, between))

    def _drawn(self, numbers, text, between) -> list[bank.Row]:
        side, teacher = self.spec.resolution, self.teacher
        sizes = (side, side, 0, 0, side, side)
        noise = torch.empty(len(numbers), teacher.channels, side // 8, side // 8)
        generator = torch.Generator()
        for i, number in enumerate(numbers):
            noise[i].normal_(
                generator=generator.manual_seed(picture_seed(self.spec.seed, number, 0))
            )
        cond = bank.together([text(number) for number in numbers])
        cond["sizes"] = torch.tensor([sizes] * len(numbers))
        cond, uncond = teacher.conditions(cond)
        latents = ddim(
            teacher, teacher.schedule, noise.to(teacher.device), self.spec.data.draw_steps,
            cond, uncond, self.cfg, between,
        )  # fmt: skip
        return [bank.Row(latent, sizes) for latent in latents.cpu()]


class Encoded:
    """Latents of pictures with captions. unused: as captioned.DataSet has it."""

    def __init__(self, spec: Spec, teacher):
        self.teacher = teacher
        data = spec.data
        multiple = 64 if spec.resolution >= 256 else 8
        self.pictures = Pictures(
            Path(data.path), spec.resolution, data.crops, data.flip, spec.seed, multiple
        )
        self.unused = self.pictures.found.unused

    def __len__(self) -> int:
        return len(self.pictures)

    def captions(self) -> list[str]:
        return self.pictures.captions()

    def settings(self) -> dict[str, Any]:
        return self.pictures.settings()

    def rows(
        self, numbers: Sequence[int], text: Callable[[int], dict[str, torch.Tensor]],
        between: Callable[[], None],
    ) -> list[bank.Row | bank.Unreadable]:  # fmt: skip
        examples = []
        for number in numbers:
            between()
            examples.append(self._read(number))
        found: dict[int, bank.Row | bank.Unreadable] = {
            i: each for i, each in enumerate(examples) if isinstance(each, bank.Unreadable)
        }
        good = [i for i in range(len(examples)) if i not in found]
        shape = lambda i: tuple(examples[i].pixels.shape)  # noqa: E731
        for _, group in groupby(sorted(good, key=shape), key=shape):
            same = list(group)
            for start in range(0, len(same), AT_ONCE):
                between()
                part = same[start : start + AT_ONCE]
                latents = self.teacher.encode(torch.stack([examples[i].pixels for i in part]))
                for i, latent in zip(part, latents, strict=True):
                    found[i] = bank.Row(latent, examples[i].sizes)
        return [found[i] for i in range(len(examples))]

    def _read(self, number: int) -> Example | bank.Unreadable:
        try:
            return self.pictures.example(number)
        except bank.Unreadable as error:
            return error


def source(spec: Spec, teacher) -> Drawn | Encoded:
    """What the job's data setting names. Raises ValueError for data that is not there."""
    return (Drawn if spec.data.kind == "prompts" else Encoded)(spec, teacher)


def read_prompts(path: str) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; empty lines and lines with # are left out."""
    file = Path(path) if path else PROMPTS
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"There is no file of prompts {shown(file)}.") from None
    # Not splitlines, which ends a line at what Unicode has for paragraphs too.
    lines = re.split("\r\n?|\n", decoded(data, shown(file.name)))
    prompts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{shown(file.name)} holds no prompt: expected one a line.")
    return prompts
