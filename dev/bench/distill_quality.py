"""Distils the demo model with the real program, and judges what it made.

One LCM-LoRA is distilled from prompts alone and one from pictures with captions. Each gets as many
steps as fit into 45 minutes on two cores, including its bank, and the bars of `bench quality`. An
interrupted run continues with the first LoRA that was not finished.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from ...lora.formats import files
from .. import commands, environment
from ..toy import learn, sprites, world
from ..toy.command import DISTILLED, write_pictures
from . import quality, subjects
from .report import Report

RUN = environment.ROOT / "training" / "run.py"
LATENTS, PICTURES = 600, 1600
STEPS, MINUTES, PASSES = 600, 45, 8
# Number of steps -> distance to real pictures, as a multiple of the teacher's.
WORST = {4: 1.3, 2: 1.6, 1: 2.2}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=500, help="--quality: judged per seed")
    parser.add_argument("--seeds", type=int, default=2)


def run(chosen: argparse.Namespace, checkpoint: Path) -> Report:
    work = commands.LOCAL / "distill"
    painter = learn.Painter({"3d": sprites.load("3d", environment.cache())}, 9)
    write_pictures(work / "pictures", painter, PICTURES)
    captions = [spec.caption for spec in world.specs(LATENTS, torch.Generator().manual_seed(71))]
    sources = {
        "from prompts": {"prompts": captions, "count": LATENTS, "draw_steps": 20},
        # Not mirrored, because captions name what is on the left first.
        "from pictures": {"kind": "pictures", "path": str(work / "pictures"), "flip": False},
    }
    specs = {
        name: settings(work / name.replace(" ", "-"), checkpoint, source)
        for name, source in sources.items()
    }
    all_settings = json.dumps([specs, chosen.pictures])
    training = (environment.ROOT / "training").rglob("*.py")
    kept = quality.Kept(work / "judged", all_settings, training)
    report, minutes = Report("distill"), []
    for name, spec in specs.items():
        minutes.append(kept.get(f"distil {name}", partial(distil, spec))["minutes"])
        report.add(name, "engine", "time", "min", minutes[-1:])
        report.add(name, "engine", "steps", "", [STEPS])
    toy = subjects.Toy.load(checkpoint, subjects.quick_dtype())
    columns = subjects.columns(toy)
    columns = {name: columns[name] for name in ("base, DDIM", "base, LCM sampler")}
    for name, spec in specs.items():
        columns[name] = subjects.accelerated(toy, files.read(Path(spec["output"])))
    figures = quality.measure(toy, columns, (1, 2, 4), chosen.pictures, chosen.seeds, kept)
    quality.rows(report, figures)
    for name in specs:
        quality.lcm_bars(report, figures, WORST, name)
    report.bar("minutes of the longest distillation", max(minutes), MINUTES)
    kept.forget()
    return report


def settings(folder: Path, checkpoint: Path, source: dict) -> dict:
    """The spec of a job."""
    import comfy

    return {
        "host": str(Path(comfy.__path__[0]).parent), "checkpoint": str(checkpoint),
        "banks": str(folder / "banks"), "output": str(folder / "lcm-lora.safetensors"),
        "resolution": world.SIZE, "batch": 12, "rank": 64, "guidance": DISTILLED, "lr": 4e-4,
        "warmup": 50, "decay": "cosine", "checkpoint_every": 1000,
        "precision": "bf16" if subjects.quick_dtype() == torch.bfloat16 else "fp32",
        "log_every": 20, "sample_every": 0, "data": source, "steps": STEPS, "passes": PASSES,
    }  # fmt: skip


def distil(spec: dict) -> dict[str, float]:
    """Runs the program in an empty folder; -> the minutes it took."""
    folder = Path(spec["output"]).parent
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(spec, indent=1), encoding="utf-8")
    begun = time.monotonic()
    process = subprocess.Popen([sys.executable, str(RUN), str(folder / "spec.json")])
    try:
        status = process.wait()
    except BaseException:
        process.terminate()
        raise
    if status:
        raise SystemExit(f"The distillation ended with status {status}.")
    return {"minutes": (time.monotonic() - begun) / 60}
