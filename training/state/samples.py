"""Sample pictures of a running job, next to the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from ...samplers.families import FAMILIES
from ...samplers.noise import picture_noise
from ..adapter import Adapter
from ..data.bank import Tensors, square_sizes, together
from ..memory import in_parts
from ..objectives.solver import Network, ddim
from ..teacher import Teacher
from ..tensors import save
from . import sheets
from .few_steps import Noise, few_steps
from .likeness import STEPS, Figures, Likeness

T = TypeVar("T")
Drawn = Callable[[float], None]
TEACHER = "teacher.safetensors"
TEACHER_STEPS = 50
DECODED = 3  # decoding takes about as long as this many calls of the network
CALLS = sum(STEPS) + DECODED * (1 + len(STEPS))  # of `draw`, once the teacher's latents exist


class Samples:
    """Pictures at 1, 2 and 4 steps from fixed noise, and their distance to the teacher's pictures.

    They are sampled as the finished file will be, as its family requires. The job draws the
    teacher's 50-step latents once and keeps them in its folder. side: of the pictures, in pixels.
    """

    def __init__(
        self, job: Path, teacher: Teacher, prompts: tuple[str, ...], side: int, seed: int,
        family: str,
    ):  # fmt: skip
        self.folder, self.teacher, self.side, self.seed = job / "samples", teacher, side, seed
        self.family, self.prompts = FAMILIES[family], prompts
        self.texts = [teacher.text(prompt) for prompt in prompts]
        self.likeness: Likeness | None = None  # once there is a bank to compare with
        self._drawn: Drawn = lambda calls: None

    @property
    def pictures(self) -> int:
        """How many pictures the next sampling draws, including those of the likeness."""
        compared = len(self.likeness.rows) * len(STEPS) if self.likeness else 0
        return len(self.texts) * (len(STEPS) + self._lacks_teacher) + compared

    def calls(self, samplings: int) -> float:
        """How many calls of the network the next samplings take, where a call has all prompts."""
        teacher = samplings and self.teacher.guided_calls * TEACHER_STEPS * self._lacks_teacher
        compared = self.likeness.calls / len(self.texts) if self.likeness else 0
        return teacher + samplings * (CALLS + compared)

    def compare(self, adapter: Adapter, drawn: Drawn = lambda calls: None) -> Figures:
        """The figures of `likeness`; empty if there is none. drawn: as in `draw`."""
        if self.likeness is None:
            return {}
        return self.likeness.measure(adapter, lambda calls: drawn(calls / len(self.texts)))

    @property
    def _lacks_teacher(self) -> bool:
        return not (self.folder / TEACHER).exists()

    def draw(
        self, adapter: Adapter, step: int, cfg: float, drawn: Drawn = lambda calls: None
    ) -> dict[str, float]:
        """Writes samples/step-N.png; -> mean squared error to the teacher's latents, by steps.

        drawn(calls): called with the calls since the last time, counted as in `calls`: 0.5 for a
        call with half of the prompts.
        """
        self.folder.mkdir(exist_ok=True)
        self._drawn = drawn
        teacher = self.teacher

        def few_step(numbers: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
            noise, cond, _ = self._inputs(numbers)
            network = self._counted(numbers, 1)
            columns = [
                few_steps(network, teacher.schedule, noise, n, cond, self.family) for n in STEPS
            ]
            return list(zip(*columns, strict=True))

        endpoint = self._endpoint(adapter, cfg)
        columns = [torch.stack(column) for column in zip(*self._in_parts(few_step), strict=True)]
        errors = {
            str(steps): float((latents - endpoint).square().mean())
            for steps, latents in zip(STEPS, columns, strict=True)
        }
        pictures = []
        for column in (endpoint, *columns):
            teacher.before_call()
            pictures.append(teacher.decode(column))
            drawn(DECODED)
        teacher.free_vae()
        joined = torch.cat([torch.cat(list(column), 0) for column in pictures], 1)
        pixels = (joined.nan_to_num() * 255).round().to(torch.uint8).numpy()
        sheet = Image.fromarray(np.ascontiguousarray(pixels))
        sheets.write(self.folder / f"step-{step:08d}.png", sheet, self.prompts)
        return errors

    def _counted(self, numbers: Sequence[int], calls: int) -> Network:
        """The network, with its calls for these prompts reported to `drawn`."""

        def network(*arguments: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
            output = self.teacher(*arguments, **conditions)
            self._drawn(calls * len(numbers) / len(self.texts))
            return output

        return network

    def _in_parts(self, make: Callable[[Sequence[int]], list[T]]) -> list[T]:
        """make(numbers of the prompts), as many at a time as memory allows, and joined."""
        return in_parts(range(len(self.texts)), len(self.texts), make)

    def _inputs(self, numbers: Sequence[int]) -> tuple[Noise, Tensors, Tensors]:
        """(noise by step, conditional, unconditional inputs) of these prompts, on the device."""
        teacher = self.teacher
        sizes = torch.tensor([square_sizes(self.side)] * len(numbers))
        like = torch.empty(len(numbers), *teacher.latent_shape(self.side))
        noise = picture_noise(like, self.seed, numbers)
        texts = together([self.texts[number] for number in numbers])
        return (lambda step: noise(step).to(teacher.device)), *teacher.conditions(texts, sizes)

    def _endpoint(self, adapter: Adapter, cfg: float) -> torch.Tensor:
        """The teacher's latents [B, C, h, w]. Raises ValueError if they are not finite."""
        path, teacher = self.folder / TEACHER, self.teacher
        if path.exists():
            return load_file(path)["latents"].to(teacher.device)

        def many_step(numbers: Sequence[int]) -> list[torch.Tensor]:
            noise, cond, uncond = self._inputs(numbers)
            network = self._counted(numbers, teacher.guided_calls)
            return list(ddim(network, teacher.schedule, noise(0), TEACHER_STEPS, cond, uncond, cfg))

        with adapter.off():
            latents = torch.stack(self._in_parts(many_step))
        if not latents.isfinite().all():
            raise ValueError(
                "The teacher's own pictures are not finite numbers: its precision is too low. "
                "Choose precision bf16 or fp32."
            )
        save(path, {"latents": latents})
        return latents
