"""Sample pictures of a running job, beside the teacher's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from ...samplers.consistency import consistency
from ...samplers.families import FAMILIES, Family
from ...samplers.noise import picture_noise
from .. import disk
from ..data.bank import together
from ..memory import in_parts
from ..objectives.solver import ddim
from ..tensors import save

log = logging.getLogger("lcm_lora")
TEACHER_STEPS = 50
STEPS = (1, 2, 4)


class Samples:
    """Pictures at 1, 2 and 4 steps from fixed noise, and their distance to the teacher's answer.

    They are sampled as the finished file will be, by its objective. The teacher's 50-step answers
    are drawn once and kept in the job's folder.
    """

    def __init__(
        self, job: Path, teacher, prompts: tuple[str, ...], side: int, seed: int, objective: str
    ):  # fmt: skip
        self.folder, self.teacher, self.seed = job / "samples", teacher, seed
        self.family = FAMILIES[objective]
        self.texts = [teacher.text(prompt) for prompt in prompts]
        self.side = side

    def draw(self, adapter, step: int, cfg: float) -> dict[str, float]:
        """Writes samples/step-N.png; -> mean squared error to the teacher's latents by steps."""
        self.folder.mkdir(exist_ok=True)
        endpoint = self._endpoint(adapter, cfg)

        def few(numbers: range) -> list:
            noise, cond, _ = self._inputs(numbers)
            start = noise(0).to(self.teacher.device)
            found = [few_steps(self.teacher, start, n, cond, noise, self.family) for n in STEPS]
            return list(zip(*found, strict=True))

        columns = [torch.stack(each) for each in zip(*self._in_parts(few), strict=True)]
        errors = {
            str(steps): float((z - endpoint).square().mean())
            for steps, z in zip(STEPS, columns, strict=True)
        }
        pictures = [self.teacher.decode(column) for column in (endpoint, *columns)]
        self.teacher.free_vae()
        sheet = torch.cat([torch.cat(list(column), 0) for column in pictures], 1)
        pixels = (sheet.nan_to_num() * 255).round().to(torch.uint8).numpy()
        with disk.whole_file(self.folder / f"step-{step:08d}.png") as new:
            Image.fromarray(np.ascontiguousarray(pixels)).save(new, "PNG")
        return errors

    def _in_parts(self, make: Callable[[range], list]) -> list:
        """make(numbers) of the prompts, of as many at a time as memory has room for."""
        return in_parts(range(len(self.texts)), len(self.texts), make)

    def _inputs(self, numbers: range) -> tuple[Callable[[int], torch.Tensor], dict, dict]:
        """(noise by step, conditional, unconditional) of these prompts; the noise is each one's."""
        side = self.side
        batch = together([self.texts[number] for number in numbers])
        batch["sizes"] = torch.tensor([(side, side, 0, 0, side, side)] * len(numbers))
        shape = len(numbers), self.teacher.channels, side // 8, side // 8
        noise = picture_noise(torch.empty(shape), self.seed, numbers)
        return noise, *self.teacher.conditions(batch)

    def _endpoint(self, adapter, cfg: float) -> torch.Tensor:
        path = self.folder / "teacher.safetensors"
        if path.exists():
            return load_file(path)["latents"].to(self.teacher.device)
        teacher = self.teacher

        def drawn(numbers: range) -> list[torch.Tensor]:
            noise, *conditions = self._inputs(numbers)
            start = noise(0).to(teacher.device)
            return list(ddim(teacher, teacher.schedule, start, TEACHER_STEPS, *conditions, cfg))

        with adapter.off():
            latents = torch.stack(self._in_parts(drawn))
        if not latents.isfinite().all():
            raise ValueError(
                "The teacher's own pictures are not finite numbers: its precision is too low for "
                "it. Choose precision bf16 or fp32."
            )
        save(path, {"latents": latents})
        return latents


@torch.no_grad()
def few_steps(
    teacher, noise: torch.Tensor, steps: int, cond, fresh, family: Family
) -> torch.Tensor:  # fmt: skip
    """LCM sampling (arXiv 2310.04378, algorithm 3) of the network as it is, in VP scale.

    noise: [B, C, h, w] at t = 999; fresh(i): standard normal noise for step i, which a family of
    eta 0 goes on without. Other etas than 0 and 1 no objective of ours has.
    """
    z, at = noise, family.timesteps(steps)
    for i, t in enumerate(at):
        now = torch.full((len(z),), t, device=z.device)
        x0, eps = teacher.schedule.split(teacher(z, now, **cond), z, now)
        if family.boundary:
            x0 = consistency(z, x0, now)
        if i + 1 == len(at):
            return x0
        after = torch.full_like(now, at[i + 1])
        if family.eta:
            eps = fresh(i + 1).to(z.device)
        z = teacher.schedule.noised(x0, eps, after)
    return z
