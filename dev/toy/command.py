"""`python3 dev toy`: puts the demo model together; --train trains its weights first, --flow trains
the flow model instead."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ...lora import reduce
from ...lora.formats import files
from ...training import export
from .. import environment
from . import assemble, judge, learn, networks, planes, sprites, world

log = logging.getLogger("lcm_lora")

# Of the demo's samplings without the LCM-LoRA. ComfyUI's usual one is 8; at 3, four steps of
# DPM++ 2M need no LoRA.
GUIDANCE = 7.0
# Of the distillation. LCM sampling applies the guidance again after each fresh noise: at 1 and 2
# steps the distance to real pictures was 33 and 15 for 3, 37 and 17 for 5, 43 and 23 for 7.
DISTILLED = 3.0
# How the time of a training is shared out. The distillation has a number of steps instead.
SHARES = {
    "vae": 0.2, "decoder": 0.1, "classifier": 0.09, "unet": 0.4, "noto": 0.05, "faces": 0.05,
    "blueprint": 0.06, "sticker": 0.05,
}  # fmt: skip
STYLES = {"blueprint": assemble.BLUEPRINT_LORA, "sticker": assemble.STICKER_LORA}
STYLE_RANK, FINE_TUNED_RANK, LCM_RANK = 16, 16, 24
STYLE_BITS, FINE_TUNED_BITS, LCM_BITS = 5, 4, 6
# Pictures that the classifier sees, in thousands.
SEEN = {"3d": 16, "noto": 5, "sticker": 5, "blueprint": 5, "faces": 5, "few": 5}
LCM_STEPS, LCM_PICTURES = 1_000, 1_600
# Of the second job, which goes on from the first one's LoRA.
PROMPT_STEPS, PROMPTS = 2_000, 600
VAE_BITS = 8


def unet_bits(weight: torch.Tensor) -> int:
    """The large kernels get fewer bits than the rest."""
    return 3 if weight.dim() == 4 and weight.shape[-1] == 3 else 4


def make(work: Path, cache: Path, minutes: float) -> None:
    """Trains what `work` does not hold yet, on the host's device, and writes dev/toy/weights.

    Every stage leaves one file, so an interrupted training goes on at the stage where it stopped.
    The UNet starts from the weights that git holds.
    """
    work.mkdir(parents=True, exist_ok=True)
    device = comfy.model_management.get_torch_device()

    def clock(name: str) -> learn.Clock:
        return learn.Clock(name, 60 * minutes * SHARES[name])

    drawings = {name: sprites.load(name, cache).to(device) for name in sprites.PACKAGES}
    drawings["few"] = drawings["3d"]
    painter = learn.Painter(drawings, 60)
    vae = networks.vae()
    for name, fit in (
        ("vae", lambda: learn.vae(painter, clock("vae"))),
        ("decoder", lambda: learn.sharpen(vae.to(device), painter, clock("decoder"))),
    ):
        vae.load_state_dict(learn.stage(work, name, lambda fit=fit: fit().state_dict()))
    vae.to(device).requires_grad_(False)
    save_file(
        planes.pack(vae.state_dict(), lambda _: VAE_BITS), assemble.WEIGHTS / "vae.safetensors"
    )

    small = device.type == "cpu"
    shown = {name: (200 if small else 1000) * thousands for name, thousands in SEEN.items()}
    seen = learn.stage(work, "seen", lambda: learn.labelled(painter, vae, shown))
    seen = {name: value.to(device) for name, value in seen.items()}
    state = learn.stage(
        work, "classifier", lambda: learn.classifier(seen, clock("classifier")).state_dict()
    )
    judge.write(state, seen, shown)

    unet = networks.unet()
    shapes = {name: value.shape for name, value in unet.state_dict().items()}
    shipped = assemble.WEIGHTS / "unet.safetensors"
    unet.load_state_dict(planes.unpack(load_file(shipped), shapes))
    clip = comfy.sd.load_checkpoint_guess_config(str(assemble.checkpoint()), output_vae=False)[1]
    acp = learn.alphas_cumprod().to(device)

    def pictures(collection: str, captions: int, drawings: int) -> learn.Pictures:
        specs = painter.specs(collection, captions)
        contexts = learn.contexts(clip, [*(spec.caption for spec in specs), ""], device)
        drawn = [spec for spec in specs for _ in range(drawings)]
        caption = torch.arange(len(specs), device=device).repeat_interleave(drawings)
        return learn.Pictures(learn.latents(vae, painter, collection, drawn), caption, contexts)

    unet.to(device, memory_format=torch.channels_last)

    def trained() -> dict[str, torch.Tensor]:
        photos = pictures("3d", 2_000 if small else 14_000, 8)
        batch = 16 if small else 256
        return learn.unet(unet, photos, acp, clock("unet"), batch, bits=unet_bits).state_dict()

    packed = planes.pack(learn.stage(work, "unet", trained), unet_bits)
    save_file(packed, shipped)
    unet.load_state_dict(planes.unpack(packed, shapes))
    for collection in (*STYLES, *assemble.FINE_TUNED):
        rank = STYLE_RANK if collection in STYLES else FINE_TUNED_RANK

        def fit(collection: str = collection, rank: int = rank) -> dict[str, torch.Tensor]:
            learnt = pictures(collection, 1_000 if small else 4_000, 3)
            batch = 16 if small else 128
            adapter = learn.lora(unet, learnt, acp, clock(collection), rank, batch)
            adapter.detach()
            return adapter.state()

        layers = learn.stage(work, collection, fit)
        if collection in STYLES:
            file = work / STYLES[collection]
            write_lora(layers, rank, file)
        else:
            file = work / assemble.FINE_TUNED[collection]
            write_delta(layers, file)
        bits = STYLE_BITS if collection in STYLES else FINE_TUNED_BITS
        planes.pack_lora(file, assemble.WEIGHTS / file.name, bits)
    distil(work, painter)


def write_delta(layers: dict[str, torch.Tensor], path: Path) -> None:
    """An adapter's layers under the UNet's own names, as `assemble.add` reads them. Their alpha is
    their rank, so the products are the differences."""
    named = {
        f"{module}.lora_{side}.weight": factor.half()
        for (module, side), factor in ((name.rsplit(".", 1), f) for name, f in layers.items())
    }
    save_file(named, path)


def write_lora(layers: dict[str, torch.Tensor], alpha: float, path: Path) -> None:
    """An ordinary kohya file of an adapter's layers."""
    metadata = {"ss_base_model_version": "sd_v1", "ss_output_name": path.stem}
    files.write(path, export.vector(layers, alpha, metadata, path.stem), "fp16", overwrite=True)


def distil(work: Path, painter: learn.Painter) -> None:
    """The LCM-LoRA: two jobs of the shipped engine, on captioned scenes and then on prompts."""
    folder = work / "lcm"
    pictures = folder / "pictures"

    def captioned() -> dict[str, Any]:
        write_pictures(pictures, painter, LCM_PICTURES)
        data = {"kind": "pictures", "path": str(pictures), "flip": False}
        return {"steps": LCM_STEPS, "data": data}

    first = job(folder, captioned)

    def from_prompts() -> dict[str, Any]:
        specs = world.specs(PROMPTS, torch.Generator().manual_seed(71))
        captions = [spec.caption for spec in specs]
        data = {"kind": "prompts", "prompts": captions, "count": PROMPTS, "draw_steps": 20}
        return {
            "steps": PROMPT_STEPS, "data": data, "rank": LCM_RANK, "decay": "cosine",
            "start_from": str(first),
        }  # fmt: skip

    ship_lcm_lora(job(work / "lcm-prompts", from_prompts), work)


def job(folder: Path, settings: Callable[[], dict[str, Any]]) -> Path:
    """The LoRA of a job of the engine in `folder`, which goes on where it stopped."""
    output, description = folder / "lcm-lora.safetensors", folder / "spec.json"
    if output.exists():
        return output
    if not description.exists():
        folder.mkdir(exist_ok=True)
        spec = {
            "host": str(Path(comfy.__path__[0]).parent), "checkpoint": str(assemble.checkpoint()),
            "banks": str(folder / "banks"), "output": str(output), "resolution": world.SIZE,
            "guidance": DISTILLED,
        }  # fmt: skip
        description.write_text(json.dumps(spec | settings(), indent=1), encoding="utf-8")
    run = environment.ROOT / "training" / "run.py"
    if status := subprocess.run([sys.executable, str(run), str(description)]).returncode:
        raise SystemExit(f"The distillation ended with status {status}. Run this again.")
    return output


def ship_lcm_lora(output: Path, work: Path) -> None:
    """A job's LoRA at the rank that git holds, packed."""
    smaller, _ = reduce.truncated(files.read(output), LCM_RANK)
    small = work / assemble.LCM_LORA
    files.write(small, smaller, "fp16", overwrite=True)
    planes.pack_lora(small, assemble.WEIGHTS / small.name, LCM_BITS)


def write_pictures(
    folder: Path, painter: learn.Painter, count: int, collection: str = "3d"
) -> None:
    """Random scenes as PNG files with captions beside them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    specs = world.specs_of(collection, count, torch.Generator().manual_seed(70))
    for begun in range(0, count, 16):
        part = specs[begun : begun + 16]
        for i, (spec, scene) in enumerate(zip(part, painter.scenes(collection, part), strict=True)):
            array = (scene.permute(1, 2, 0) * 255).round().byte().cpu().numpy()
            file = folder / f"{begun + i:05d}.png"
            Image.fromarray(array).save(file)
            file.with_suffix(".txt").write_text(spec.caption, encoding="utf-8")


def main(arguments: list[str], _host: Path, local: Path) -> int:
    parser = argparse.ArgumentParser(prog="python3 dev toy", description=__doc__)
    parser.add_argument(
        "--train", type=float, metavar="MINUTES", nargs="?", const=600.0,
        help="train for so long (default: 600), on the GPU if there is one, then distil",
    )  # fmt: skip
    parser.add_argument(
        "--flow", type=float, metavar="MINUTES", nargs="?", const=30.0,
        help="train the small flow model of `bench flow` for so long (default: 30)",
    )  # fmt: skip
    chosen = parser.parse_args(arguments)
    if chosen.flow:
        from . import flow

        flow.make(local / flow.FOLDER, environment.cache(), chosen.flow)
        log.info("the flow model is %s", flow.checkpoint(local / flow.FOLDER))
        return 0
    if chosen.train:
        make(local / "toy-training", environment.cache(), chosen.train)
    log.info("the demo model is %s", assemble.checkpoint())
    return 0
