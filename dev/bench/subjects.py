"""The demo model, and ways to sample with it: from the same noise to latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher

import nodes

from ...lora.delta import Vector
from ...lora.formats import files
from ...lora.host import apply
from ...nodes.sampling import LCMKSampler
from ...samplers.host import patch_sampling
from ..toy import assemble, world
from ..toy.command import GUIDANCE

TEACHER_STEPS = 50
LATENT = 4, world.SIZE // 8, world.SIZE // 8
DDIM = "ddim", "sgm_uniform"
Sample = Callable[[int, int, list, list, int], torch.Tensor]
"""(steps, seed, positive, negative, count) -> latents [count, *LATENT]"""


@dataclass(eq=False)
class Toy:
    """A demo model as ComfyUI loads it.

    name: of its file, its content, and its type of numbers. solver: the sampler and scheduler of
    its teacher.
    """

    name: str
    base: ModelPatcher
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE
    solver: tuple[str, str]

    @classmethod
    def load(
        cls, checkpoint: Path, dtype: torch.dtype = torch.float32, solver: tuple[str, str] = DDIM
    ) -> Toy:  # fmt: skip
        """dtype: of the network's weights and products."""
        base, clip, vae = comfy.sd.load_checkpoint_guess_config(
            str(checkpoint), model_options={"dtype": dtype}
        )[:3]
        base.model.manual_cast_dtype = dtype  # on a CPU, ComfyUI would multiply in float32
        vae.first_stage_model.to(memory_format=torch.channels_last)  # decodes in half the time
        # The folder's name is a digest of what the file was made of.
        name = f"{checkpoint.parent.name} {checkpoint.name} {dtype}"
        return cls(name, base, clip, vae, solver)

    @property
    def latent(self) -> tuple[int, ...]:
        return self.base.model.latent_format.latent_channels, *LATENT[1:]

    def encode(self, *texts: str) -> list:
        """Conditioning for a batch with one picture of each text."""
        encoded = [
            self.clip.encode_from_tokens(self.clip.tokenize(text), return_pooled=True)
            for text in texts
        ]
        features, pooled = map(torch.cat, zip(*encoded, strict=True))
        return [[features, {"pooled_output": pooled}]]

    @torch.no_grad()
    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """Latents [N, *LATENT] -> [N, 3, SIZE, SIZE] in 0..1."""
        return self.vae.decode(latent).movedim(-1, 1).float().clamp(0, 1)


def columns(toy: Toy, guidance: float = GUIDANCE) -> dict[str, Sample]:
    """Columns of the contact sheet, left to right. Those without the LoRA use guidance."""
    return {
        "base, DDIM": of_host(toy, "ddim", guidance),
        "base, DPM++ 2M": of_host(toy, "dpmpp_2m", guidance),
        "base, LCM sampler": with_lcm(patch_sampling(toy.base), guidance),
        "LCM-LoRA": accelerated(toy, files.read(assemble.lora(assemble.LCM_LORA))),
    }


def of_host(
    toy: Toy, sampler: str, guidance: float = GUIDANCE, scheduler: str = DDIM[1],
    model: ModelPatcher | None = None,
) -> Sample:  # fmt: skip
    """ComfyUI's own KSampler. model: the toy's with patches, if there are some."""

    def sample(steps: int, seed: int, positive: list, negative: list, count: int) -> torch.Tensor:
        return nodes.common_ksampler(
            model or toy.base, seed, steps, guidance, sampler, scheduler, positive, negative,
            {"samples": torch.zeros(count, *toy.latent)},
        )[0]["samples"]  # fmt: skip

    return sample


def with_lcm(model: ModelPatcher, cfg: float) -> Sample:
    """LCM KSampler."""
    channels = model.model.latent_format.latent_channels

    def sample(steps: int, seed: int, positive: list, negative: list, count: int) -> torch.Tensor:
        latent = {"samples": torch.zeros(count, channels, *LATENT[1:])}
        output = LCMKSampler.execute(model, seed, steps, cfg, positive, negative, latent, 1.0)
        return output.result[0]["samples"]

    return sample


def accelerated(toy: Toy, vector: Vector) -> Sample:
    """LCM KSampler on the base with this LoRA."""
    return with_lcm(patch_sampling(apply(toy.base, None, vector, 1.0, 0.0)[0]), 1.0)


def teacher(toy: Toy, guidance: float = GUIDANCE) -> Sample:
    """The base in 50 steps of its solver, whatever number of steps the caller passes."""
    sampler, scheduler = toy.solver
    solved = of_host(toy, sampler, guidance, scheduler)
    return lambda steps, *rest: solved(TEACHER_STEPS, *rest)


def quick_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it in hardware: half the time of float32. Elsewhere
    it would take five times as long."""
    can = torch.cpu.get_capabilities()
    native = can.get("amx_bf16") or can.get("avx512_bf16")
    if torch.cuda.is_available():
        return torch.float16  # as ComfyUI loads SD1.5 there
    return torch.bfloat16 if native else torch.float32
