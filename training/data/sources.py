"""Where the bank's latents come from: the teacher itself, or pictures."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...samplers.noise import picture_seed
from ..disk import shown
from ..memory import in_parts
from ..objectives.solver import ddim
from ..spec import Spec
from ..teacher import Teacher
from . import bank
from .captions import decoded
from .draws import mean_guidance
from .pictures import Example, Pictures

BATCH = 16  # latents that are drawn, or pictures that are encoded, in one call
PROMPTS = Path(__file__).with_name("prompts.txt")


class Drawn:
    """Latents that the teacher draws from prompts, so that no data set is needed.

    Guided DDIM from noise that depends on (seed, number); the prompts are used in turn.
    unused: (prompt, reason) of the prompts that are not used.
    """

    def __init__(self, spec: Spec, teacher: Teacher):
        self.teacher = teacher
        self.prompts = spec.data.prompts or tuple(read_prompts(spec.data.path))
        self.spec = spec
        self.cfg = mean_guidance(spec.guidance)
        reason = f"count is {len(self)}, so only that many prompts are used"
        self.unused = [(prompt, reason) for prompt in self.prompts[len(self) :]]

    def __len__(self) -> int:
        return self.spec.data.count

    def captions(self) -> list[str]:
        return [self.prompts[i % len(self.prompts)] for i in range(len(self))]

    def settings(self) -> dict[str, Any]:
        prompts = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
        spec = self.spec
        return {
            "prompts": prompts, "count": len(self), "steps": spec.data.draw_steps, "cfg": self.cfg,
            "resolution": spec.resolution, "seed": spec.seed, "dtype": str(self.teacher.dtype),
        }  # fmt: skip

    def rows(
        self, numbers: Sequence[int], text: bank.TextOf, between: Callable[[], None]
    ) -> list[bank.Row]:
        return in_parts(numbers, BATCH, lambda part: self._drawn(part, text, between))

    def _drawn(
        self, numbers: Sequence[int], text: bank.TextOf, between: Callable[[], None]
    ) -> list[bank.Row]:
        side, teacher = self.spec.resolution, self.teacher
        sizes = bank.square_sizes(side)
        noise = torch.empty(len(numbers), *teacher.latent_shape(side))
        generator = torch.Generator()
        for i, number in enumerate(numbers):
            noise[i].normal_(
                generator=generator.manual_seed(picture_seed(self.spec.seed, number, 0))
            )
        texts = bank.together([text(number) for number in numbers])
        cond, uncond = teacher.conditions(texts, torch.tensor([sizes] * len(numbers)))
        latents = ddim(
            teacher, teacher.schedule, noise.to(teacher.device), self.spec.data.draw_steps,
            cond, uncond, self.cfg, between,
        )  # fmt: skip
        return [bank.Row(latent, sizes) for latent in latents.cpu()]


class Encoded:
    """Latents of captioned pictures. unused: as in captioned.DataSet."""

    def __init__(self, spec: Spec, teacher: Teacher):
        self.teacher = teacher
        data = spec.data
        multiple = 64 if spec.resolution >= 256 else 8
        self.pictures = Pictures(
            Path(data.path), spec.resolution, data.crops, data.flip, spec.seed, multiple
        )
        self.unused = self.pictures.data.unused

    def __len__(self) -> int:
        return len(self.pictures)

    def captions(self) -> list[str]:
        return self.pictures.captions()

    def settings(self) -> dict[str, Any]:
        return self.pictures.settings()

    def rows(
        self, numbers: Sequence[int], text: bank.TextOf, between: Callable[[], None]
    ) -> list[bank.Row | bank.Unreadable]:
        rows: dict[int, bank.Row | bank.Unreadable] = {}
        by_shape: dict[torch.Size, list[tuple[int, Example]]] = {}
        for number in numbers:
            between()
            try:
                example = self.pictures.example(number)
            except bank.Unreadable as error:
                rows[number] = error
            else:
                by_shape.setdefault(example.pixels.shape, []).append((number, example))
        for _, same_shape in sorted(by_shape.items()):
            for start in range(0, len(same_shape), BATCH):
                between()
                part = same_shape[start : start + BATCH]
                latents = self.teacher.encode(torch.stack([example.pixels for _, example in part]))
                for (number, example), latent in zip(part, latents, strict=True):
                    rows[number] = bank.Row(latent, example.sizes)
        return [rows[number] for number in numbers]


Source = Drawn | Encoded


def source(spec: Spec, teacher: Teacher) -> Source:
    """The examples that the job's data setting names. Raises ValueError if the data is missing."""
    return (Drawn if spec.data.kind == "prompts" else Encoded)(spec, teacher)


def read_prompts(path: str) -> list[str]:
    """The prompts in a UTF-8 file, one per line; skips empty lines and lines that start with #."""
    file = Path(path) if path else PROMPTS
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"There is no file of prompts {shown(file)}.") from None
    # splitlines would also split at Unicode's paragraph separators.
    lines = re.split("\r\n?|\n", decoded(data, shown(file.name)))
    stripped = (line.strip() for line in lines)
    prompts = [line for line in stripped if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{shown(file.name)} contains no prompt: expected one per line.")
    return prompts
