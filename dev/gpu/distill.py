"""A distillation step at full size: the engine's and the released recipe's, one after the other.

The engine is that of dev/bench/engine.py. The recipe is train_lcm_distill_lora_sd_wds.py and its
SDXL twin as their READMEs call them: two networks in float32 under autocast, gradient
checkpointing, VAE and text encoders in every step, four network calls; PyTorch's own attention in
xformers' place and AdamW in 8-bit AdamW's. In the SDXL script the VAE is in half precision, in the
other in float32.
"""

from __future__ import annotations

import logging
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch

from ...training.data import draws
from ..bench import engine, networks, reference
from ..bench.step import CFG, PICTURES, SEED, Case, Clock, Step
from ..bench.timing import Taken, timed
from .kit import Kit, configs, side

log = logging.getLogger("lcm_lora")
GRID = ("SDXL", 1), ("SDXL", 4), ("SD1.5", 4), ("SD1.5", 12)
OURS, RECOMPUTED, RECIPE, KEPT = (
    "engine", "engine, blocks recomputed", "recipe", "recipe, no checkpointing"
)  # fmt: skip


def run(kit: Kit) -> None:
    import diffusers  # noqa: F401 (before any clock)
    import peft  # noqa: F401

    grid = (("SDXL", 1), ("SD1.5", 2)) if kit.tiny else GRID
    for at, (architecture, batch) in enumerate(grid):
        case = case_of(kit, architecture, batch)
        seconds = kit.left() / (len(grid) - at)
        with kit.case(title_of(case), 8 if kit.cuda else 0) as go:
            if go:
                compare(kit, case, seconds)


def case_of(kit: Kit, architecture: str, batch: int, recompute: bool = False) -> Case:
    config, diffusers = configs(kit, architecture)
    folder = kit.work / f"{architecture}-{batch}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return Case(
        kit.host, folder, architecture, config, side(kit, architecture),
        "bf16" if kit.cuda else "fp32",
        4 if kit.tiny else 64, recompute, diffusers, None, batch, kit.device.type,
    )  # fmt: skip


def title_of(case: Case) -> str:
    return f"{case.architecture} {8 * case.side}px, batch {case.batch}, {case.dtype}"


def compare(kit: Kit, case: Case, seconds: float) -> None:
    title = title_of(case)
    recomputed = replace(case, recompute=True)
    subjects: dict[str, Callable[[], Callable[[], Step]]] = {
        OURS: lambda: engine.prepare(case),
        RECIPE: lambda: recipe(kit, recomputed),
        RECOMPUTED: lambda: engine.prepare(recomputed),
        KEPT: lambda: recipe(kit, case),
    }
    begun, medians, peaks = time.monotonic(), {}, {}
    for at, (name, prepare) in enumerate(subjects.items()):
        share = (seconds - (time.monotonic() - begun)) / (len(subjects) - at)
        with kit.case(f"{title}: {name}", 3 if kit.cuda else 0) as go:
            if go:
                medians[name], peaks[name] = steps(kit, title, case.batch, name, prepare, share)
    for one, other, memory in (
        (OURS, RECIPE, None), (RECOMPUTED, RECIPE, 0.6), (OURS, KEPT, 0.6)
    ):  # fmt: skip
        if one in medians and other in medians:
            ratio = medians[one] / medians[other]
            kit.bar(f"{title}: time, {one} / {other}", ratio, 1 / 1.5)
            if memory:
                ratio = peaks[one] / peaks[other]
                kit.bar(f"{title}: peak memory, {one} / {other}", ratio, memory)


def steps(
    kit: Kit, case: str, batch: int, name: str, prepare: Callable[[], Callable[[], Step]],
    seconds: float,
) -> tuple[float, int]:  # fmt: skip
    """Rows of a subject's steps; -> (the median seconds of a step, peak of its memory in bytes)."""
    until = time.monotonic() + seconds
    kit.forget()
    before = torch.cuda.memory_allocated() if kit.cuda else 0
    step = prepare()
    runs: list[Taken] = []
    for number in range(0 if kit.tiny else -1, 1 if kit.tiny else 12):
        if number >= 3 and time.monotonic() > until:
            break
        taken = timed(step)
        if number >= 0:
            runs.append(taken)
    walls, measured = [run.seconds for run in runs], [run.result for run in runs]
    peak, middle = max(run.peak for run in runs) - before, statistics.median(walls)
    share = [one.seconds / wall for one, wall in zip(measured, walls, strict=True)]
    kit.add(case, name, "step", "ms", [1000 * wall for wall in walls])
    kit.add(case, name, "rate", "samples/s", [batch / wall for wall in walls])
    kit.add(case, name, "peak memory", "GB", peak / 1e9)
    kit.add(case, name, "network calls", "a step", [one.calls for one in measured])
    kit.add(case, name, "network's share", "", share)
    losses = [one.loss for one in measured]
    kit.add(case, name, "loss", "", losses)
    kit.bar(f"{case}, {name}: losses that are not finite", sum(x != x for x in losses), 0)
    if name == OURS:
        outside = 1 - statistics.median(share)
        kit.bar(f"{case}: share of the engine's step outside the network", outside, 0.1)
    return middle, peak


def recipe(kit: Kit, case: Case) -> Callable[[], Step]:
    """The function that takes the recipe's step."""
    import diffusers
    import peft

    def network() -> torch.nn.Module:
        with torch.device(kit.device):
            made = diffusers.UNet2DConditionModel(**case.diffusers)
        networks.fill(made)
        return made.requires_grad_(False)

    teacher, unet = network(), network()
    config = peft.LoraConfig(r=case.rank, lora_alpha=case.rank, **networks.RECIPE)
    unet = peft.get_peft_model(unet, config)
    unet.train()
    if case.recompute:
        unet.enable_gradient_checkpointing()
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    encoders = Encoders(kit, case)
    order = draws.Shuffle([(4, case.side, case.side)] * PICTURES, case.batch, SEED)
    table = reference.alphas_cumprod().to(kit.device)
    empty = {
        name: torch.zeros_like(value) for name, value in encoders.text([0] * case.batch).items()
    }
    clock, done = Clock(parameters, teacher, unet, device=case.device), [0]
    cast = (lambda: torch.autocast("cuda", dtype=torch.bfloat16)) if kit.cuda else nullcontext

    def called(net: torch.nn.Module, z: torch.Tensor, t: torch.Tensor, text: dict):
        added = {key: value for key, value in text.items() if key != "context"}
        options = {"added_cond_kwargs": added} if added else {}
        with cast():
            return net(z, t, encoder_hidden_states=text["context"], **options).sample.float()

    def step() -> Step:
        rows = order.rows(done[0])
        with torch.no_grad():
            z0, text = encoders.latents(rows), encoders.text(rows)
        index = torch.randint(0, 50, (case.batch,), device=kit.device)
        cfg = torch.full((case.batch, 1, 1, 1), CFG, device=kit.device)
        loss = reference.loss_of(
            lambda *given: called(unet, *given), lambda *given: called(teacher, *given), table,
            z0, torch.randn_like(z0), 20 * index + 19, text, empty, cfg,
        )  # fmt: skip
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        done[0] += 1
        return clock.step(float(loss.detach()))

    return step


class Encoders:
    """VAE and text encoders of the architecture's shapes, random, and the pictures they are fed."""

    def __init__(self, kit: Kit, case: Case) -> None:
        import diffusers
        import transformers

        self.device, self.side = kit.device, case.side
        self.sdxl = case.architecture == "SDXL"
        half = torch.bfloat16 if kit.cuda else torch.float32
        width = (32, 32, 32, 32) if kit.tiny else (128, 256, 512, 512)
        # Hidden size, layers, heads: CLIP-L, and OpenCLIP's bigG for SDXL.
        kinds = [(768, 12, 12), (1280, 32, 20)] if self.sdxl else [(768, 12, 12)]
        if kit.tiny:
            small = [(case.config["context_dim"], 1, 2)]
            kinds = [(768, 1, 12), (1280, 1, 20)] if self.sdxl else small
        with torch.device(kit.device):
            vae = diffusers.AutoencoderKL(
                block_out_channels=width, layers_per_block=2, latent_channels=4,
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            )  # fmt: skip
            self.clips = []
            for number, (hidden, layers, heads) in enumerate(kinds):
                config = transformers.CLIPTextConfig(
                    hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
                    num_attention_heads=heads, projection_dim=hidden,
                    vocab_size=1000 if kit.tiny else 49408,
                )  # fmt: skip
                kind = (
                    transformers.CLIPTextModelWithProjection if number
                    else transformers.CLIPTextModel
                )  # fmt: skip
                self.clips.append(kind(config).to(half).eval().requires_grad_(False))
        self.vae = vae.to(half if self.sdxl else torch.float32).eval().requires_grad_(False)
        draw = torch.Generator().manual_seed(SEED)
        # Kept on the processor, as a loader gives them.
        self.pictures = (
            torch.rand(PICTURES, 3, 8 * self.side, 8 * self.side, generator=draw) * 2 - 1
        )
        self.ids = torch.randint(0, 1000, (PICTURES, 77), generator=draw)

    def latents(self, rows: list[int]) -> torch.Tensor:
        pixels = self.pictures[rows].to(self.device, self.vae.dtype)
        parts = [self.vae.encode(part).latent_dist.sample() for part in pixels.split(8)]
        return torch.cat(parts).float() * self.vae.config.scaling_factor

    def text(self, rows: list[int]) -> dict[str, torch.Tensor]:
        ids = self.ids[rows].to(self.device)
        if not self.sdxl:
            return {"context": self.clips[0](ids)[0]}
        outputs = [clip(ids, output_hidden_states=True) for clip in self.clips]
        size = 8 * self.side
        sizes = torch.tensor([[size, size, 0, 0, size, size]] * len(ids), device=self.device)
        return {
            "context": torch.cat([output.hidden_states[-2] for output in outputs], -1),
            "text_embeds": outputs[1].text_embeds, "time_ids": sizes,
        }  # fmt: skip
