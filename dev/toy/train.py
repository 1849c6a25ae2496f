"""Trains the toy from scratch, network after network. Each stage leaves one file in `work`.

A stage whose file is there is not run again, so an interrupted training goes on at the stage where
it stopped. Every random number comes from a seeded generator.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path

import comfy.model_sampling
import comfy.sd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from ...lora.formats import files
from ...samplers.families import ORIGIN_STEPS
from ...training import export
from ...training.adapter import Adapter
from ...training.objectives import lcm
from ...training.objectives.batch import Batch
from ...training.objectives.solver import Schedule, teacher_step
from . import assemble, data, judge, networks, pack
from .learn import autocast, decode, descend, encode

log = logging.getLogger("lcm_lora")
UNET_BITS, VAE_BITS = 4, 8
CPU = torch.device("cpu")


def steps(name: str, count: int, optimiser: torch.optim.Optimizer, lr: float) -> Iterator[int]:
    """Counts the steps of a stage: warm-up, cosine decay, and a progress line now and then."""
    start = last = time.monotonic()
    for step in range(count):
        rate = min(1.0, (step + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * step / count))
        for group in optimiser.param_groups:
            group["lr"] = lr * rate
        yield step
        now = time.monotonic()
        if now - last > 15 or step + 1 == count:
            last = now
            left = (now - start) / (step + 1) * (count - step - 1)
            log.info("%s: step %d of %d, %.0f s left", name, step + 1, count, left)


def classifier(
    pixels: torch.Tensor, labels: torch.Tensor, count: int = 1400, batch: int = 96
) -> nn.Module:
    """Trained on real pictures only.

    Shifts, noise and blur keep it from judging by single pixels and by sharpness: every picture of
    the toy is as soft as its small VAE makes it, whatever the sampler.
    """
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    model = judge.Classifier()
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    for _ in steps("classifier", count, optimiser, 2e-3):
        pick = torch.randint(len(pixels), (batch,), generator=generator)
        images, *rest = data.dyed(data.greys(pixels[pick]), generator)
        dx, dy = torch.randint(-3, 4, (2,), generator=generator).tolist()
        images = images.roll((dx, dy), (2, 3))
        if torch.rand((), generator=generator) < 0.6:
            images = blurred(images, 0.4 + 1.4 * torch.rand((), generator=generator).item())
        images = images + 0.03 * torch.randn(images.shape, generator=generator)
        with autocast(CPU):
            guesses = model(images)
        pairs = zip(guesses, (labels[pick], *rest), strict=True)
        descend(sum(F.cross_entropy(guess.float(), truth) for guess, truth in pairs), optimiser)
    return model.eval()


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of `sigma` pixels."""
    x = torch.arange(-5, 6) / sigma
    kernel = torch.exp(-0.5 * x.square())
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1, 1)
    images = F.conv2d(images, kernel, padding=(0, 5), groups=3)
    return F.conv2d(images, kernel.transpose(2, 3), padding=(5, 0), groups=3)


def vae(pixels: torch.Tensor, count: int = 1800, batch: int = 16) -> nn.Module:
    """Reconstructs photos and blueprints, edges as much as values.

    Latents are kept near unit deviation, and noise on them keeps the decoder smooth.
    """
    generator = torch.Generator().manual_seed(2)
    model = networks.vae().to(memory_format=torch.channels_last)
    networks.initialise(model, 2)
    weights = [*model.taesd_encoder.parameters(), *model.taesd_decoder.parameters()]
    optimiser = torch.optim.AdamW(weights, betas=(0.9, 0.99), weight_decay=0)
    average = 0.0
    for step in steps("vae", count, optimiser, 1.2e-3):
        grey = data.greys(pixels[torch.randint(len(pixels), (batch,), generator=generator)])
        x, *_ = data.dyed(grey, generator)
        x[: batch // 4] = data.blueprint(grey[: batch // 4])
        x = x.contiguous(memory_format=torch.channels_last)
        with autocast(CPU):
            z = model.taesd_encoder(x).float()
            y = model.taesd_decoder(z + 0.1 * torch.randn(z.shape, generator=generator)).float()
        spread = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
        wrong = y - x
        edges = wrong.diff(dim=2).abs().mean() + wrong.diff(dim=3).abs().mean()
        loss = wrong.abs().mean() + 4 * wrong.square().mean() + edges + 0.01 * spread
        average += 0.02 * (loss.item() - average)
        if step % 200 == 199:
            log.info("vae: loss %.4f", average)
        descend(loss, optimiser)
    return model.eval()


@torch.no_grad()
def real_moments(
    classifier: nn.Module, model: nn.Module, pixels: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Mean and covariance of the classifier's features over real test pictures, float32.

    The pictures have gone through the toy's own VAE, which no sampler can do better than: what is
    measured against them is the network and the sampler, not how soft a VAE of 4 MB draws.
    """
    generator = torch.Generator().manual_seed(8)
    features = []
    for part in pixels.split(500):
        photos, *_ = data.dyed(data.greys(part), generator)
        features.append(classifier.features(decode(model, encode(model, photos))))
    mean, covariance = judge.moments(torch.cat(features))
    return {"mean": mean.float(), "covariance": covariance.float()}


@torch.no_grad()
def contexts(work: Path, vae_state: dict[str, torch.Tensor]) -> torch.Tensor:
    """Every caption and last the empty one, encoded by the host: [31, 77, 768]."""
    untrained = networks.unet()
    networks.initialise(untrained, 3)
    path = work / "untrained.safetensors"
    save_file(assemble.state_dict(untrained.state_dict(), vae_state), path)
    clip = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False)[1]
    path.unlink()
    texts = [*data.captions(), ""]
    return (
        torch.cat([clip.encode_from_tokens(clip.tokenize(text)) for text in texts]).float().clone()
    )


def alphas_cumprod() -> torch.Tensor:
    """SD1.5's schedule as the host has it: [1000], float32."""
    return 1 / (1 + comfy.model_sampling.ModelSamplingDiscrete().sigmas.float() ** 2)


def unet(
    latents: torch.Tensor, labels: torch.Tensor, context: torch.Tensor,
    count: int = 1800, batch: int = 64,
) -> nn.Module:  # fmt: skip
    """Noise prediction, min-SNR-5 weighting (arXiv 2303.09556), a tenth of the captions dropped.

    From 60 % on it trains the weights as they will be after packing, so packing costs nothing.
    """
    generator = torch.Generator().manual_seed(3)
    model = networks.unet()
    networks.initialise(model, 3, zero=("out.2", "out_layers.3", "proj_out"))
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=1e-3)
    acp = alphas_cumprod()
    average = 0.0
    for step in steps("unet", count, optimiser, 6e-4):
        pick = torch.randint(len(latents), (batch,), generator=generator)
        t = torch.randint(1000, (batch,), generator=generator)
        template = torch.randint(len(data.TEMPLATES), (batch,), generator=generator)
        caption = labels[pick] * len(data.TEMPLATES) + template
        dropped = torch.rand(batch, generator=generator) < 0.1
        c = context[caption.masked_fill(dropped, len(context) - 1)]
        eps = torch.randn(latents[pick].shape, generator=generator)
        a = acp[t].view(-1, 1, 1, 1)
        z = a.sqrt() * latents[pick] + (1 - a).sqrt() * eps
        weights = dict(model.named_parameters())
        if step >= 0.6 * count:
            weights = {
                name: pack.rounded(w, UNET_BITS) if pack.packable(w) else w
                for name, w in weights.items()
            }
        with autocast(CPU):
            guess = torch.func.functional_call(model, weights, (z, t.float(), c)).float()
        snr = a / (1 - a)
        loss = ((guess - eps).square() * (snr.clamp(max=5) / snr)).mean()
        average += 0.02 * (loss.item() - average)
        if step % 100 == 99:
            log.info("unet: loss %.4f", average)
        descend(loss, optimiser)
    return model.eval()


def network(model: nn.Module):
    """The UNet as training/ calls it."""
    return lambda z, t, context: model(z, t.float(), context=context)


def _conditions(
    context: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One of its class's captions for each label, and as many empty ones."""
    template = torch.randint(len(data.TEMPLATES), labels.shape, generator=generator)
    cond = context[labels * len(data.TEMPLATES) + template]
    return {"context": cond}, {"context": context[-1:].expand_as(cond)}


def lcm_lora(
    model: nn.Module, latents: torch.Tensor, labels: torch.Tensor, context: torch.Tensor,
    cfg: float, rank: int = 32, count: int = 700, batch: int = 32,
) -> Adapter:  # fmt: skip
    """Latent consistency distillation with the pack's own loss, at the toy's guidance."""
    generator = torch.Generator().manual_seed(4)
    adapter = Adapter(model, rank, rank, seed=4)
    optimiser = torch.optim.AdamW(adapter.parameters(), weight_decay=0)
    schedule = Schedule(alphas_cumprod())
    average = 0.0
    for step in steps("lcm-lora", count, optimiser, 4e-4):
        pick = torch.randint(len(latents), (batch,), generator=generator)
        index = torch.randint(ORIGIN_STEPS, (batch,), generator=generator)
        eps = torch.randn(latents[pick].shape, generator=generator)
        cond, uncond = _conditions(context, labels[pick], generator)
        with autocast(CPU):
            one = Batch(latents[pick], eps, index, cond, uncond, cfg)
            z_s = teacher_step(network(model), adapter, schedule, one)
            loss = lcm.loss(network(model), schedule, one, z_s)
        average += 0.02 * (loss.item() - average)
        if step % 100 == 99:
            log.info("lcm-lora: loss %.4f", average)
        descend(loss, optimiser)
    return adapter


def style_lora(
    model: nn.Module, latents: torch.Tensor, labels: torch.Tensor, context: torch.Tensor,
    rank: int = 16, count: int = 600, batch: int = 32,
) -> Adapter:  # fmt: skip
    """An ordinary LoRA: noise prediction on the latents of restyled pictures, same captions."""
    generator = torch.Generator().manual_seed(5)
    adapter = Adapter(model, rank, rank, seed=5)
    optimiser = torch.optim.AdamW(adapter.parameters(), weight_decay=0)
    schedule = Schedule(alphas_cumprod())
    for _ in steps("style-lora", count, optimiser, 1e-3):
        pick = torch.randint(len(latents), (batch,), generator=generator)
        t = torch.randint(1000, (batch,), generator=generator)
        eps = torch.randn(latents[pick].shape, generator=generator)
        cond, _ = _conditions(context, labels[pick], generator)
        with autocast(CPU):
            guess = network(model)(schedule.noised(latents[pick], eps, t), t, **cond)
        snr = (schedule.alpha(t) / schedule.sigma(t)).square()
        weight = snr.clamp(max=5) / snr
        descend((weight * (guess.float() - eps).square()).mean(), optimiser)
    return adapter


def exported(adapter: Adapter, path: Path) -> dict[str, torch.Tensor]:
    """Writes the adapter to `path` as an ordinary kohya file; -> the file's tensors."""
    metadata = {"ss_base_model_version": "sd_v1", "ss_output_name": path.stem}
    files.write(
        path,
        export.vector(adapter.state(), adapter.alpha, metadata, path.stem),
        "fp16",
        overwrite=True,
    )
    adapter.detach()
    return load_file(path)


def stage(work: Path, name: str, train) -> dict[str, torch.Tensor]:
    """The stage's file, trained now if it is not there."""
    path = work / f"{name}.safetensors"
    if not path.exists():
        begun = time.monotonic()
        state = train()
        save_file({key: value.detach().contiguous().clone() for key, value in state.items()}, path)
        log.info("%s: done in %.0f s", name, time.monotonic() - begun)
    return load_file(path)
