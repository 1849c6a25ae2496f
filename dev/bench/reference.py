"""A step of the released LCM-LoRA script, rebuilt from diffusers and peft.

It does what train_lcm_distill_lora_sd_wds.py does: a second network is the teacher, the VAE and the
text encoder run in every step, and the teacher's conditional and unconditional calls are separate.
Gradient checkpointing is on, as in the command of its README. That command's other options are for
GPUs and left out: xformers, 8-bit Adam, and float16, which keeps both networks in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import peft
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from ...training.data import draws
from .networks import RECIPE
from .step import CFG, PICTURES, SEED, Case, Clock, Step, alphas_cumprod, start_factor

CAPTIONS = [f"a photo of picture number {i}" for i in range(PICTURES)]


def prepare(case: Case) -> Callable[[], Step]:
    """The function that takes a step. Writes the bank that the engine then reads."""
    teacher_unet, unet = frozen(case), frozen(case)
    encoders = Encoders(case)
    config = peft.LoraConfig(r=case.rank, lora_alpha=case.rank, **RECIPE)
    unet = peft.get_peft_model(unet, config)
    for name, module in unet.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            layer = case.names[f"{name}.weight"].removesuffix(".weight")
            start_factor(module.lora_A["default"].weight.data, layer)
    unet.train()
    unet.enable_gradient_checkpointing()
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    empty = write_bank(case.bank, encoders)
    shape = (4, case.side, case.side)
    order = draws.Shuffle([shape] * PICTURES, 1, SEED)
    clock = Clock(parameters, teacher_unet, unet, device=case.device)
    numbers, table = itertools.count(), alphas_cumprod().to(case.device)

    def step() -> Step:
        number = next(numbers)
        rows = order.rows(number)
        drawn = draws.draw(SEED, number, range(1), shape, (CFG,))
        eps, index, cfg = (x.to(case.device) for x in drawn)
        with torch.no_grad():
            z0 = torch.cat([encoders.latents(row) for row in rows])
            text = torch.cat([encoders.context(CAPTIONS[row]) for row in rows])
        loss = loss_of(
            partial(output, unet), partial(output, teacher_unet), table, z0, eps,
            20 * index + 19, text, empty.expand_as(text), cfg,
        )  # fmt: skip
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return clock.step(float(loss.detach()))

    return step


def output(network: torch.nn.Module, z, t, text) -> torch.Tensor:
    return network(z, t, text).sample


def loss_of(unet, teacher_unet, table, z0, eps, t, text, empty, cfg) -> torch.Tensor:
    """In the script's order: the student, the teacher with and without the caption, the target.

    unet, teacher_unet: functions of (z, t, text). table: alphas_cumprod.
    """
    s = (t - 20).clamp(min=0)

    def alpha_sigma(t):
        return table[t].sqrt().view(-1, 1, 1, 1), (1 - table[t]).sqrt().view(-1, 1, 1, 1)

    def x0_eps(network, z, t, text):
        output, (alpha, sigma) = network(z, t, text), alpha_sigma(t)
        return (z - sigma * output) / alpha, output

    def f(z, t, x0):
        scaled = 10.0 * t.view(-1, 1, 1, 1)
        return 0.25 / (scaled**2 + 0.25) * z + scaled / (scaled**2 + 0.25).sqrt() * x0

    alpha, sigma = alpha_sigma(t)
    z_t = alpha * z0 + sigma * eps
    student = f(z_t, t, x0_eps(unet, z_t, t, text)[0])
    with torch.no_grad():
        x0_c, eps_c = x0_eps(teacher_unet, z_t, t, text)
        x0_u, eps_u = x0_eps(teacher_unet, z_t, t, empty)
        w = cfg - 1
        alpha, sigma = alpha_sigma(s)
        z_s = alpha * (x0_c + w * (x0_c - x0_u)) + sigma * (eps_c + w * (eps_c - eps_u))
        target = f(z_s, s, x0_eps(unet, z_s, s, text)[0])
    return (((student - target) ** 2 + 0.001**2).sqrt() - 0.001).mean()


def frozen(case: Case) -> diffusers.UNet2DConditionModel:
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**case.diffusers)
    unet.to_empty(device=case.device)
    with safe_open(case.weights, framework="pt") as file:
        unet.load_state_dict({
            name: file.get_tensor(case.names[name]) for name in unet.state_dict()
        })  # fmt: skip
    return unet.requires_grad_(False)


@torch.no_grad()
def write_bank(file: Path, encoders: Encoders) -> torch.Tensor:
    """Writes what the encoders make of the data; -> the empty caption's embedding, which the script
    computes once too.
    """
    empty = encoders.context("")
    save_file({
        "latents": torch.cat([encoders.latents(row) for row in range(PICTURES)]),
        "contexts": torch.cat([encoders.context(caption) for caption in CAPTIONS]),
        "uncond": empty[0].clone(),
    }, file)  # fmt: skip
    return empty


class Encoders:
    """A VAE and a text encoder of SD1.5's shape with random weights, and the pictures to encode."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(SEED)
        self.vae = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ).requires_grad_(False)  # fmt: skip
        self.vae.to(case.device)
        self.device, width = case.device, case.config["context_dim"]
        self.clip = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                hidden_size=width, intermediate_size=4 * width, num_hidden_layers=12,
                num_attention_heads=max(1, width // 64),
            )
        ).requires_grad_(False).to(self.device)  # fmt: skip
        tokens = case.host / "comfy" / "sd1_tokenizer"
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(str(tokens))
        pixels = 8 * case.side
        generator = torch.Generator().manual_seed(SEED)
        self.pictures = torch.rand(PICTURES, 3, pixels, pixels, generator=generator) * 2 - 1

    def latents(self, row: int) -> torch.Tensor:
        """[1, 4, side, side] at diffusion scale."""
        generator = torch.Generator().manual_seed(row)
        pixels = self.pictures[row : row + 1].to(self.device)
        encoded = self.vae.encode(pixels).latent_dist
        return encoded.sample(generator) * self.vae.config.scaling_factor

    def context(self, caption: str) -> torch.Tensor:
        """[1, 77, width]"""
        ids = self.tokenizer(
            caption, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        return self.clip(ids.to(self.device))[0]
