"""Trains the demo model on its world, network after network, on a GPU or a CPU.

Every stage is a function of tensors that goes on for a share of time, not a number of steps: what a
device can do decides how far it gets. Every random number comes from a seeded generator.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import comfy.model_sampling
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from ...training.adapter import Adapter
from . import judge, networks, planes, world

log = logging.getLogger("lcm_lora")


class Clock:
    """Counts the seconds that a stage has worked, of those it has; a pause does not count.

    seconds: a number, or a function that returns it at every step. between: called before every
    step; what it takes does not count. A stage also ends after `limit` steps.
    """

    def __init__(
        self, name: str, seconds: float | Callable[[], float], limit: int = 10**9,
        between: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        self.name, self.limit, self.between = name, limit, between
        self.seconds = seconds if callable(seconds) else lambda: seconds
        self.worked, self.step = 0.0, 0

    def progress(self) -> float:
        return max(min(1.0, self.worked / self.seconds()), self.step / self.limit)

    def steps(
        self, optimiser: torch.optim.Optimizer, rate: float, warmup: int = 100
    ) -> Iterator[float]:
        """Yields the progress, 0 to 1, before each step; sets the learning rate (cosine)."""
        shown = time.monotonic()
        while (progress := self.progress()) < 1:
            self.between()
            begun = time.monotonic()
            now = rate * min(1.0, (self.step + 1) / warmup)
            for group in optimiser.param_groups:
                group["lr"] = now * (0.505 + 0.495 * math.cos(math.pi * progress))
            yield progress
            self.step += 1
            moment = time.monotonic()
            self.worked += moment - begun
            if moment - shown > 10:
                shown = moment
                log.info("%s: step %d, %.0f %% of its time", self.name, self.step, 100 * progress)
        log.info("%s: %d steps in %.0f s", self.name, self.step, self.worked)


def stage(
    work: Path, name: str, train: Callable[[], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """The stage's file in `work`, trained now if it is not there."""
    path = work / f"{name}.safetensors"
    if not path.exists():
        state = train()
        scratch = path.with_suffix(".tmp")
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, scratch)
        os.replace(scratch, path)
    return load_file(path)


def alphas_cumprod() -> torch.Tensor:
    """SD1.5's noise schedule as the host has it: [1000], float32."""
    return 1 / (1 + comfy.model_sampling.ModelSamplingDiscrete().sigmas.float() ** 2)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 products and float32 sums, where the device has them: elsewhere they are slow."""
    fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def optimiser_of(parameters, decay: float = 0.0) -> torch.optim.AdamW:
    parameters = list(parameters)
    fused = parameters[0].device.type == "cuda"
    return torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=decay, fused=fused)


def descend(loss: torch.Tensor, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_([p for g in optimiser.param_groups for p in g["params"]], 1.0)
    optimiser.step()


class Painter:
    """Draws random scenes of every collection in given shares.

    sprites: name of a collection -> uint8 [kinds, 4, S, S]; the scenes are drawn on their device.
    """

    def __init__(self, sprites: dict[str, torch.Tensor], seed: int):
        self.sprites = sprites
        self.device = next(iter(sprites.values())).device
        self.words = torch.Generator().manual_seed(seed)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def specs(self, collection: str, count: int) -> list[world.Spec]:
        return world.specs_of(collection, count, self.words)

    def scenes(self, collection: str, specs: list[world.Spec]) -> torch.Tensor:
        return self.labelled(collection, specs)[0]

    def mixed(self, shares: dict[str, int]) -> torch.Tensor:
        """That many random scenes of each collection: [sum, 3, SIZE, SIZE]."""
        parts = [self.scenes(name, self.specs(name, count)) for name, count in shares.items()]
        return torch.cat(parts).contiguous(memory_format=torch.channels_last)

    def labelled(self, collection: str, specs: list[world.Spec]) -> tuple[torch.Tensor, ...]:
        """Scenes [N, 3, SIZE, SIZE], and the indices of their colours and patterns [N]."""
        hand = world.HANDS[world.hand_of(collection)]
        return world.scenes(self.sprites[collection], specs, self.generator, hand)


MIXTURE = {"3d": 16, "noto": 6, "sticker": 5, "blueprint": 5}


def differences(wrong: torch.Tensor) -> torch.Tensor:
    """How unlike two pictures are: values, and edges at full and at half size."""
    half = F.avg_pool2d(wrong, 2)
    edges = sum(x.diff(dim=d).abs().mean() for x in (wrong, half) for d in (2, 3))
    return wrong.abs().mean() + 4 * wrong.square().mean() + edges


def vae(painter: Painter, clock: Clock) -> nn.Module:
    """Reconstructs scenes of every hand, in the shares of MIXTURE.

    Latents are kept near unit deviation, and noise on them keeps the decoder smooth.
    """
    device = painter.device
    model = networks.vae()
    networks.initialise(model, 2)
    model = model.to(device, memory_format=torch.channels_last)
    generator = torch.Generator(device).manual_seed(2)
    weights = [*model.taesd_encoder.parameters(), *model.taesd_decoder.parameters()]
    optimiser = optimiser_of(weights)
    for _ in clock.steps(optimiser, 1.2e-3):
        if clock.step % 2 == 0:  # each picture is used twice: drawing takes as long as a step
            x = painter.mixed(MIXTURE)
        with autocast(device):
            z = model.taesd_encoder(x).float()
            noise = torch.randn(z.shape, generator=generator, device=device)
            y = model.taesd_decoder(z + 0.08 * noise).float()
        spread = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
        loss = differences(y - x) + 0.01 * spread
        descend(loss, optimiser)
        if clock.step % 200 == 0:
            log.info("vae: loss %.4f", loss.item())
    return model.eval()


@torch.no_grad()
def labelled(
    painter: Painter, round_trip: nn.Module, counts: dict[str, int], batch: int = 32
) -> dict[str, torch.Tensor]:
    """Random scenes of each collection and what they show, for the classifier.

    Every second picture has been through the VAE `round_trip`, as drawn pictures have.

    -> pictures uint8 [N, 3, SIZE, SIZE]; kinds [N, 2], the second is -1 for one object, and both
    are for faces; colour and pattern [N], -100 where there is neither; hand [N]; collection [N].
    """
    parts: dict[str, list[torch.Tensor]] = {}
    for number, (collection, count) in enumerate(counts.items()):
        hand = list(world.HANDS).index(world.hand_of(collection))
        nameless = collection == "faces"
        for begun in range(0, count, batch):
            specs = painter.specs(collection, min(batch, count - begun))
            pictures, colour, pattern = painter.labelled(collection, specs)
            pictures[::2] = decode(round_trip, encode(round_trip, pictures[::2]))
            none = torch.full_like(colour, -100)
            drawn = collection == "blueprint"  # blue paper has neither colour nor pattern
            for name, value in {
                "pictures": (pictures * 255).round().byte(),
                "kinds": torch.tensor(
                    [(-1, -1) if nameless else (*spec.kinds, -1)[:2] for spec in specs]
                ),
                "colour": none if drawn else colour, "pattern": none if drawn else pattern,
                "hand": torch.full_like(colour, hand),
                "collection": torch.full_like(colour, number),
            }.items():  # fmt: skip
                parts.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def classifier(shown: dict[str, torch.Tensor], clock: Clock, batch: int = 64) -> nn.Module:
    """The judge's classifier: it names objects, colour, pattern and hand.

    shown: as `labelled` gives it. The pictures are shifted, blurred, and changed in brightness and
    colour a little, so that it looks at the things in them.
    """
    device = shown["pictures"].device
    torch.manual_seed(8)
    model = judge.Classifier().to(device, memory_format=torch.channels_last)
    generator = torch.Generator(device).manual_seed(8)
    optimiser = optimiser_of(model.parameters(), 1e-2)
    # One column more for "no object", which is then cut off.
    count = len(world.NAMES)
    kinds = shown["kinds"].masked_fill(shown["kinds"] < 0, count)
    objects = F.one_hot(kinds, count + 1).sum(1)[:, :count].float()
    objects = objects / objects.sum(1, keepdim=True).clamp(min=1)
    average = 0.0
    for _ in clock.steps(optimiser, 2e-3):
        pick = torch.randint(len(objects), (batch,), generator=generator, device=device)
        x = jittered(shown["pictures"][pick].float() / 255, generator)
        with autocast(device):
            logits = model.heads(model.features(x.contiguous(memory_format=torch.channels_last)))
        loss = F.cross_entropy(logits["object"].float(), objects[pick])
        for name in ("colour", "pattern", "hand"):
            loss = loss + 0.3 * F.cross_entropy(logits[name].float(), shown[name][pick])
        descend(loss, optimiser)
        average += 0.02 * (float(loss.detach()) - average)
        if clock.step % 100 == 0:
            log.info("classifier: loss %.3f", average)
    return model.eval()


def jittered(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures [N, 3, S, S], shifted by up to 4 pixels, changed in colour, a few blurred."""
    count, side = len(x), x.shape[-1]

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator, device=x.device)

    padded = F.pad(x, (4, 4, 4, 4), mode="replicate")
    left, top = (8.99 * rand()).long().tolist(), (8.99 * rand()).long().tolist()
    x = torch.stack(
        [
            picture[:, b : b + side, a : a + side]
            for picture, a, b in zip(padded, left, top, strict=True)
        ]
    )
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.where(rand(1, 1, 1) < 0.15, soft, x)
    return ((x - 0.5) * (0.9 + 0.2 * rand(1, 1, 1)) + 0.5 + 0.08 * (rand(3, 1, 1) - 0.5)).clamp(
        0, 1
    )


class Critic(nn.Module):
    """Distinguishes real patches from decoded ones; its layers also measure likeness."""

    def __init__(self):
        super().__init__()
        widths = (3, 48, 96, 192)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.utils.spectral_norm(nn.Conv2d(a, b, 4, 2, 1)), nn.LeakyReLU(0.2)
            )
            for a, b in zip(widths, widths[1:], strict=False)
        )  # fmt: skip
        self.last = nn.utils.spectral_norm(nn.Conv2d(widths[-1], 1, 3, 1, 1))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        seen = []
        x = 2 * x - 1
        for stage in self.stages:
            x = stage(x)
            seen.append(x)
        return self.last(x), seen


def sharpen(model: nn.Module, painter: Painter, clock: Clock) -> nn.Module:
    """Trains the decoder on, against a critic (hinge loss and its features, as VQGAN's,
    arXiv 2012.09841); the encoder, and with it what latents mean, stays as it is.
    """
    device = painter.device
    torch.manual_seed(6)
    critic = Critic().to(device, memory_format=torch.channels_last)
    generator = torch.Generator(device).manual_seed(6)
    decoder = model.taesd_decoder
    model.requires_grad_(False)
    decoder.requires_grad_(True)
    optimiser = optimiser_of(decoder.parameters())
    judge = torch.optim.AdamW(critic.parameters(), lr=4e-4, betas=(0.5, 0.9), weight_decay=0)
    last = [p for p in decoder.parameters() if p.dim() == 4][-1]
    for progress in clock.steps(optimiser, 5e-4):
        x = painter.mixed(MIXTURE)
        with autocast(device):
            with torch.no_grad():
                z = model.taesd_encoder(x).float()
            noise = torch.randn(z.shape, generator=generator, device=device)
            y = decoder(z + 0.08 * noise).float()
            fake, seen = critic(y)
            with torch.no_grad():
                _, real_features = critic(x)
        likeness = sum(
            F.l1_loss(a.float(), b.float()) / b.float().abs().mean()
            for a, b in zip(seen, real_features, strict=True)
        )
        plain = differences(y - x) + 0.05 * likeness
        fooled = -fake.float().mean()
        g_plain = torch.autograd.grad(plain, last, retain_graph=True)[0].norm()
        g_fooled = torch.autograd.grad(fooled, last, retain_graph=True)[0].norm()
        weight = (g_plain / (g_fooled + 1e-6)).clamp(max=10).detach()
        ramp = 0.15 * min(1.0, progress / 0.15)
        descend(plain + ramp * weight * fooled, optimiser)
        with autocast(device):
            real, _ = critic(x)
            fake, _ = critic(y.detach())
        judged = F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean()
        descend(judged, judge)
        if clock.step % 200 == 0:
            log.info("decoder: %.4f, critic %.3f", plain.item(), judged.item())
    return model.eval()


@torch.no_grad()
def encode(model: nn.Module, images: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """[N, 3, SIZE, SIZE] in 0..1 -> diffusion latents [N, 4, SIZE / 8, SIZE / 8]."""
    with autocast(images.device):
        return torch.cat([model.taesd_encoder(part).float() for part in images.split(batch)])


@torch.no_grad()
def decode(model: nn.Module, latents: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """Diffusion latents -> [N, 3, SIZE, SIZE] in 0..1."""
    with autocast(latents.device):
        parts = [model.taesd_decoder(part).float() for part in latents.split(batch)]
    return torch.cat(parts).clamp(0, 1)


@torch.no_grad()
def contexts(
    clip, captions: list[str], device: torch.device, batch: int = 256, with_pooled: bool = False
) -> torch.Tensor:  # fmt: skip
    """The host's CLIP, on `device`, of every caption: [N, 77, 768], float16. with_pooled: the
    pooled feature is one row more, the last."""
    encoder = clip.cond_stage_model.clip_l.to(device)
    encoder.execution_device = device
    made = []
    for start in range(0, len(captions), batch):
        tokens = [
            [token[0] for token in clip.tokenize(text)["l"][0]]
            for text in captions[start : start + batch]
        ]
        with autocast(device):
            features, pooled = encoder(tokens)[:2]
        rows = torch.cat([features, pooled[:, None]], 1) if with_pooled else features
        made.append(rows.half())
    return torch.cat(made)


@torch.no_grad()
def latents(
    model: nn.Module, painter: Painter, hand: str, specs: list[world.Spec], batch: int = 256
) -> torch.Tensor:
    """One drawing of each scene, encoded, float16."""
    parts = (specs[at : at + batch] for at in range(0, len(specs), batch))
    return torch.cat([encode(model, painter.scenes(hand, part)).half() for part in parts])


@dataclass
class Pictures:
    """Latents [N, 4, h, w], the number of each one's context [N], contexts [M + 1, 77, 768].

    The last context is the empty caption's.
    """

    latents: torch.Tensor
    caption: torch.Tensor
    contexts: torch.Tensor

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Random latents and their contexts, a tenth of them the empty one."""
        device = self.latents.device
        pick = torch.randint(len(self.latents), (size,), generator=generator, device=device)
        text = self.caption[pick]
        dropped = torch.rand(size, generator=generator, device=device) < 0.1
        text = text.masked_fill(dropped, len(self.contexts) - 1)
        return self.latents[pick].float(), self.contexts[text].float()


def noise_loss(
    network: Callable, batch: tuple[torch.Tensor, torch.Tensor], acp: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:  # fmt: skip
    """Noise prediction with min-SNR-5 weights (arXiv 2303.09556)."""
    x, context = batch
    t = torch.randint(1000, (len(x),), generator=generator, device=x.device)
    eps = torch.randn(x.shape, generator=generator, device=x.device)
    a = acp[t].view(-1, 1, 1, 1)
    z = a.sqrt() * x + (1 - a).sqrt() * eps
    with autocast(x.device):
        guess = network(z, t.float(), context).float()
    snr = a / (1 - a)
    return ((guess - eps).square() * (snr.clamp(max=5) / snr)).mean()


def unet(
    model: nn.Module, pictures: Pictures, acp: torch.Tensor, clock: Clock, batch: int = 256,
    rate: float = 7e-4, bits: Callable[[torch.Tensor], int] = lambda _: 4, begin: float = 0.6,
) -> nn.Module:  # fmt: skip
    """From the share `begin` of its time on it trains the weights as they will be after packing in
    `bits`, so packing costs little.
    """
    device = pictures.latents.device
    generator = torch.Generator(device).manual_seed(3)
    optimiser = optimiser_of(model.parameters(), 1e-3)
    names, weights = zip(*model.named_parameters(), strict=True)
    losses = 0.0
    for progress in clock.steps(optimiser, rate):
        if progress >= begin:
            seen = {
                name: planes.rounded(w, bits(w)) if planes.packable(w) else w
                for name, w in zip(names, weights, strict=True)
            }
            network = partial(torch.func.functional_call, model, seen)
            loss = noise_loss(
                lambda *inputs, call=network: call(inputs),
                pictures.batch(batch, generator), acp, generator,
            )  # fmt: skip
        else:
            loss = noise_loss(model, pictures.batch(batch, generator), acp, generator)
        descend(loss, optimiser)
        losses = losses + 0.02 * (loss.detach() - losses)
        if clock.step % 500 == 0:
            log.info("unet: loss %.4f", float(losses))
    return model.eval()


def lora(
    model: nn.Module, pictures: Pictures, acp: torch.Tensor, clock: Clock, rank: int,
    batch: int = 128, rate: float = 1e-3, seed: int = 5,
) -> Adapter:  # fmt: skip
    """An ordinary LoRA: noise prediction on other pictures with the same captions."""
    device = pictures.latents.device
    generator = torch.Generator(device).manual_seed(seed)
    adapter = Adapter(model, rank, rank, seed=seed)
    optimiser = optimiser_of(adapter.parameters())
    for _ in clock.steps(optimiser, rate, warmup=30):
        descend(noise_loss(model, pictures.batch(batch, generator), acp, generator), optimiser)
    return adapter
