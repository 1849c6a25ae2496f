"""Sample pictures of a running job, beside the teacher's."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from ..samplers.consistency import consistency
from ..samplers.noise import picture_noise
from ..samplers.timesteps import timesteps
from . import disk
from .bank import together
from .solver import ddim
from .tensors import save

log = logging.getLogger("lcm_lora")
TEACHER_STEPS = 50
STEPS = (1, 2, 4)


class Samples:
    """Pictures at 1, 2 and 4 steps from fixed noise, and their distance to the teacher's answer.

    The teacher's 50-step answers are drawn once and kept in the job's folder.
    """

    def __init__(self, job: Path, teacher, prompts: tuple[str, ...], side: int, seed: int):
        self.folder, self.teacher, self.seed = job / "samples", teacher, seed
        self.texts = [teacher.text(prompt) for prompt in prompts]
        self.shape = (len(prompts), teacher.channels, side // 8, side // 8)
        self.sizes = torch.tensor([(side, side, 0, 0, side, side)] * len(prompts))

    def draw(self, adapter, step: int, cfg: float) -> dict[str, float]:
        """Writes samples/step-N.png; -> mean squared error to the teacher's latents by steps."""
        self.folder.mkdir(exist_ok=True)
        batch = together(self.texts) | {"sizes": self.sizes}
        cond, uncond = self.teacher.conditions(batch)
        noise = picture_noise(torch.empty(self.shape), self.seed)
        start = noise(0).to(self.teacher.device)
        endpoint = self._endpoint(adapter, start, cond, uncond, cfg)
        columns, errors = [endpoint], {}
        for steps in STEPS:
            z = few_steps(self.teacher, start, steps, cond, noise)
            errors[str(steps)] = float((z - endpoint).square().mean())
            columns.append(z)
        pictures = [self.teacher.decode(column) for column in columns]
        self.teacher.free_vae()
        sheet = torch.cat([torch.cat(list(column), 0) for column in pictures], 1)
        pixels = (sheet.nan_to_num() * 255).round().to(torch.uint8).numpy()
        with disk.whole_file(self.folder / f"step-{step:08d}.png") as new:
            Image.fromarray(np.ascontiguousarray(pixels)).save(new, "PNG")
        return errors

    def _endpoint(self, adapter, noise, cond, uncond, cfg) -> torch.Tensor:
        path = self.folder / "teacher.safetensors"
        if path.exists():
            return load_file(path)["latents"].to(noise.device)
        with adapter.off():
            latents = ddim(
                self.teacher, self.teacher.schedule, noise, TEACHER_STEPS, cond, uncond, cfg
            )
        if not latents.isfinite().all():
            raise ValueError(
                "The teacher's own pictures are not finite numbers: its precision is too low for "
                "it. Choose precision bf16 or fp32."
            )
        save(path, {"latents": latents})
        return latents


@torch.no_grad()
def few_steps(teacher, noise: torch.Tensor, steps: int, cond, fresh) -> torch.Tensor:
    """LCM sampling (arXiv 2310.04378, algorithm 3) of the network as it is, in VP scale.

    noise: [B, C, h, w] at t = 999; fresh(i): standard normal noise for step i.
    """
    z, at = noise, timesteps(steps)
    for i, t in enumerate(at):
        now = torch.full((len(z),), t, device=z.device)
        x0, _ = teacher.schedule.split(teacher(z, now, **cond), z, now)
        x0 = consistency(z, x0, now)
        if i + 1 == len(at):
            return x0
        after = torch.full_like(now, at[i + 1])
        z = teacher.schedule.noised(x0, fresh(i + 1).to(z.device), after)
    return z
