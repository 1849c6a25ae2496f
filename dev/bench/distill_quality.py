"""Distils the demo model with the real program, and judges what each objective makes of it.

It distils an LCM-LoRA from prompts alone. Then each of ARMS trains on from it for the same time:
the same objective once more, and distribution matching. The teacher has the guidance that is
distilled, where its distance to real pictures is smallest (docs/measured.md). An interrupted run
continues with the first LoRA that was not finished.
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
from ...training.objectives.table import forward_passes
from ...training.schema import build
from ...training.spec import Spec
from .. import commands, environment
from ..toy import world
from ..toy.command import DISTILLED
from . import quality, subjects
from .report import Report

RUN = environment.ROOT / "training" / "run.py"
LATENTS = 600
STEPS, MINUTES, PASSES = 600, 45, 8
GUIDED = 2  # calls of the teacher for a guided prediction, of SD
FIRST = "lcm"
# Name of a training that starts from the first LoRA -> its objective.
ARMS = {"lcm, then lcm": "lcm", "lcm, then dmd": "dmd"}
# Number of steps -> distance to real pictures, as a multiple of the teacher's.
WORST = {4: 1.3, 2: 1.6, 1: 2.2}
WORST_MATCHED = {4: 0.9, 2: 1.0, 1: 1.3}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=500, help="--quality: judged per seed")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--matching", type=int, default=800, metavar="STEPS",
        help="--quality: steps of distribution matching; the other arms get the same time",
    )  # fmt: skip


def run(chosen: argparse.Namespace, checkpoint: Path) -> Report:
    work = commands.LOCAL / "distill"
    captions = [spec.caption for spec in world.specs(LATENTS, torch.Generator().manual_seed(71))]
    data = {"prompts": captions, "count": LATENTS, "draw_steps": 20}
    specs = {FIRST: settings(work / FIRST, checkpoint, data)}
    for name, objective in ARMS.items():
        folder = work / name.replace(", ", "-").replace(" ", "-")
        specs[name] = settings(folder, checkpoint, data) | {
            "banks": specs[FIRST]["banks"], "start_from": specs[FIRST]["output"],
            "objective": objective, "passes": 1, "lr": 1e-4, "warmup": 0, "decay": "constant",
        }  # fmt: skip
    costs = {name: forward_passes(build(Spec, specs[name], name), GUIDED) for name in ARMS}
    for name, cost in costs.items():
        specs[name]["steps"] = round(chosen.matching * max(costs.values()) / cost)
    all_settings = json.dumps([specs, chosen.pictures])
    training = (environment.ROOT / "training").rglob("*.py")
    kept = quality.Kept(work / "judged", all_settings, training)
    report, minutes = Report("distill"), dict[str, float]()
    for name, spec in specs.items():
        minutes[name] = kept.get(f"distil {name}", partial(distil, spec))["minutes"]
        report.add(name, "engine", "time", "min", [minutes[name]])
        report.add(name, "engine", "steps", "", [spec["steps"]])
    toy = subjects.Toy.load(checkpoint, subjects.quick_dtype())
    columns = subjects.columns(toy, DISTILLED)
    columns = {name: columns[name] for name in ("base, DDIM", "base, DPM++ 2M")}
    for name, spec in specs.items():
        columns[name] = subjects.accelerated(toy, files.read(Path(spec["output"])))
    figures = quality.measure(
        toy, columns, (1, 2, 4), chosen.pictures, chosen.seeds, kept, guidance=DISTILLED
    )
    quality.rows(report, figures)
    for name in specs:
        matched = ARMS.get(name) == "dmd"
        quality.lcm_bars(report, figures, WORST_MATCHED if matched else WORST, name)
    report.bar("minutes of the longest distillation", max(minutes.values()), MINUTES)
    kept.forget()
    return report


def settings(folder: Path, checkpoint: Path, source: dict) -> dict:
    """The spec of a job."""
    import comfy

    return {
        "host": str(Path(comfy.__path__[0]).parent), "checkpoint": str(checkpoint),
        "banks": str(folder / "banks"), "output": str(folder / "lcm-lora.safetensors"),
        "resolution": world.SIZE, "batch": 12, "rank": 64, "guidance": [DISTILLED], "lr": 4e-4,
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
