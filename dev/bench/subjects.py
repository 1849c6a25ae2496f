"""The columns of the contact sheet as functions of the host: same noise in, latents out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

import nodes

from ...lora import combine
from ...lora.formats import files
from ...lora.host import apply
from ...nodes.sampling import LCMKSampler
from ...samplers.host import patch_sampling
from ..toy import assemble
from ..toy.command import GUIDANCE

TEACHER_STEPS = 50


@dataclass
class Toy:
    """The toy as the host loads it, plain, accelerated, and accelerated with the style."""

    name: str
    base: object
    clip: object
    vae: object
    unlearned: object
    lcm: object
    styled: object

    @classmethod
    def load(cls, checkpoint: Path, dtype: torch.dtype = torch.float32) -> Toy:
        """dtype: of the UNet's weights and products, as the host chooses it on a GPU."""
        base, clip, vae = comfy.sd.load_checkpoint_guess_config(
            str(checkpoint), model_options={"dtype": dtype}
        )[:3]
        base.model.manual_cast_dtype = dtype  # the host holds a CPU to float32 by itself
        vae.first_stage_model.to(memory_format=torch.channels_last)  # decodes in half the time
        lcm = files.read(assemble.LCM_LORA)
        style = files.read(assemble.STYLE_LORA)
        both, _ = combine.exact([lcm, style], [1.0, 0.8])
        return cls(
            f"{checkpoint.name} {dtype}", base, clip, vae, patch_sampling(base),
            *(patch_sampling(apply(base, None, vector, 1.0, 0.0)[0]) for vector in (lcm, both)),
        )  # fmt: skip

    def encode(self, text: str) -> list:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    @torch.no_grad()
    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """[N, 4, 8, 8] -> [N, 3, 64, 64] in 0..1."""
        return self.vae.decode(latent).movedim(-1, 1).float().clamp(0, 1)


Sample = Callable[[int, int, list, list, int], torch.Tensor]
"""(steps, seed, positive, negative, count) -> latents [count, 4, 8, 8]"""


def subjects(toy: Toy) -> dict[str, Sample]:
    """The five columns, left to right. Those without the LoRA get the guidance they need."""

    def host(sampler: str) -> Sample:
        def sample(steps, seed, positive, negative, count):
            return nodes.common_ksampler(
                toy.base, seed, steps, GUIDANCE, sampler, "sgm_uniform", positive, negative,
                {"samples": torch.zeros(count, 4, 8, 8)},
            )[0]["samples"]  # fmt: skip

        return sample

    return {
        "base, DDIM": host("ddim"),
        "base, DPM++ 2M": host("dpmpp_2m"),
        "base, LCM sampler": drawn(toy.unlearned, GUIDANCE),
        "LCM-LoRA": drawn(toy.lcm),
        "LCM-LoRA + style": drawn(toy.styled),
    }


def quick_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it by itself: half the time of float32; elsewhere it
    takes five times as long."""
    can = torch.cpu.get_capabilities()
    native = can.get("amx_bf16") or can.get("avx512_bf16")
    return torch.bfloat16 if native or torch.cuda.is_available() else torch.float32


def accelerated(toy: Toy, lora: Path, eta: float = 1.0) -> Sample:
    """The base with the LCM-LoRA of a file; eta: share of fresh noise between the steps."""
    return drawn(patch_sampling(apply(toy.base, None, files.read(lora), 1.0, 0.0)[0]), eta=eta)


def drawn(model: ModelPatcher, cfg: float = 1.0, eta: float = -1.0) -> Sample:
    """LCM KSampler's; eta as that node has it."""

    def sample(steps, seed, positive, negative, count):
        latent = {"samples": torch.zeros(count, 4, 8, 8)}
        done = LCMKSampler.execute(model, seed, steps, cfg, positive, negative, latent, 1.0, eta)
        return done.result[0]["samples"]

    return sample


def teacher(toy: Toy) -> Sample:
    """The base at 50 DDIM steps, whatever count of steps is asked."""
    ddim = subjects(toy)["base, DDIM"]
    return lambda steps, *rest: ddim(TEACHER_STEPS, *rest)
