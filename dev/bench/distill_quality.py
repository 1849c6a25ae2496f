"""The distillation engine on the toy: the real program, then the quality of what it made.

An LCM-LoRA is distilled twice, from prompts alone and from pictures with captions, with as many
steps as fit into 15 minutes, bank and all, on two cores, and held against the bars of `bench
quality`. The teacher's answers are kept over PASSES passes over the bank.
--plain and --phased distil once more each, from the same prompts in the same time: with the teacher
asked in every pass, and so with the other objective too; those two are judged at four steps without
fresh noise. What is done is kept, so that a run that was ended goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from .. import commands, environment
from ..toy import data
from ..toy.command import GUIDANCE
from . import quality, subjects
from .report import Report

log = logging.getLogger("lcm_lora")
RUN = environment.ROOT / "training" / "run.py"
CAPTIONS = [data.TEMPLATES[0].format(name) for name in data.NAMES]
LATENTS, PICTURES = 600, 3000
STEPS, MINUTES = 600, 15
WORST = 1.3  # times as far from real pictures as the teacher, at 4 steps
PASSES = 8
# Less than the teacher's, for LCM sampling guides again after each fresh noise: what is right at
# one step is too much at four.
DISTILLED = GUIDANCE - 0.5
# A step is some 6 times a forward (backward counts twice), 4 of it without the teacher.
COST = (4 + 2 / PASSES) / 6
PLAIN, PHASED = "teacher asked in every pass", "phased"
Measure = Callable[[dict[str, subjects.Sample], tuple[int, ...]], quality.Figures]
"""(columns, counts of steps) -> what quality.measure finds"""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=500, help="--quality: judged, a seed")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--phased", action="store_true", help='--quality: "phased" beside "lcm"')
    parser.add_argument("--plain", action="store_true", help="--quality: no answers kept")


def run(chosen: argparse.Namespace, checkpoint: Path) -> Report:
    work = commands.LOCAL / "distill"
    write_pictures(work / "pictures")
    prompts = {"prompts": CAPTIONS, "count": LATENTS, "draw_steps": 20}
    # Not mirrored, for these garments all face one way.
    pictures = {"kind": "pictures", "path": str(work / "pictures"), "flip": False}
    jobs = {
        "from prompts": {"data": prompts, "steps": STEPS, "passes": PASSES},
        "from pictures": {"data": pictures, "steps": STEPS, "passes": PASSES},
    }
    plain = {"data": prompts, "steps": round(STEPS * COST)}
    if chosen.plain or chosen.phased:
        jobs[PLAIN] = plain
    if chosen.phased:
        jobs[PHASED] = plain | {"objective": "phased"}
    specs = {
        name: settings(work / name.replace(" ", "-"), checkpoint) | job
        for name, job in jobs.items()
    }
    told = json.dumps([specs, chosen.pictures])
    kept = quality.Kept(work / "judged", told, (environment.ROOT / "training").glob("*.py"))
    report = Report("distill")
    minutes = []
    for name, spec in specs.items():
        took = kept.cell(f"distil {name}", partial(distil, spec))
        minutes.append(took["minutes"])
        report.add(name, "engine", "time", "min", [took["minutes"]])
        report.add(name, "engine", "steps", "", [spec["steps"]])
    toy = subjects.Toy.load(checkpoint, subjects.quick_dtype())

    def measure(columns: dict[str, subjects.Sample], steps: tuple[int, ...]) -> quality.Figures:
        return quality.measure(toy, columns, steps, chosen.pictures, chosen.seeds, kept)

    loras = {name: Path(spec["output"]) for name, spec in specs.items()}
    accelerated(report, toy, loras, measure)
    if chosen.phased:
        deterministic(report, toy, loras, measure)
    report.bar("minutes of the longest distillation", max(minutes), MINUTES)
    kept.forget()
    return report


def accelerated(
    report: Report, toy: subjects.Toy, loras: dict[str, Path], measure: Measure
) -> None:  # fmt: skip
    """Each LoRA against the base with the same sampler and the teacher."""
    known = subjects.subjects(toy)
    columns = {name: known[name] for name in ("base, DDIM", "base, LCM sampler")}
    columns |= {name: subjects.accelerated(toy, path) for name, path in loras.items()}
    figures = measure(columns, (1, 2, 4))
    quality.rows(report, figures)
    for name in (each for each in loras if each not in (PLAIN, PHASED)):
        quality.lcm_bars(report, figures, WORST, name)
    if PLAIN in loras:
        for case, metric in (("1 steps", "endpoint_error"), ("4 steps", "frechet")):
            pair = ((case, name, metric) for name in ("from prompts", PLAIN))
            report.bar(f"{metric} at {case}, kept / plain", quality.ratio(figures, *pair), 1.0)


def deterministic(
    report: Report, toy: subjects.Toy, loras: dict[str, Path], measure: Measure
) -> None:
    """Both objectives at four steps without fresh noise between them."""
    columns = {
        f"{name}, eta 0": subjects.accelerated(toy, loras[name], 0.0) for name in (PLAIN, PHASED)
    }
    figures = measure(columns, (4,))
    quality.rows(report, {key: each for key, each in figures.items() if key[1] in columns})
    for metric in ("frechet", "endpoint_error"):
        lcm, phased = (("4 steps", name, metric) for name in columns)
        report.bar(
            f"{metric} at 4 deterministic steps, phased / lcm",
            quality.ratio(figures, phased, lcm), 1.0,
        )  # fmt: skip


def settings(folder: Path, checkpoint: Path) -> dict:
    """What all jobs have in common."""
    import comfy

    return {
        "host": str(Path(comfy.__path__[0]).parent), "checkpoint": str(checkpoint),
        "banks": str(folder / "banks"), "output": str(folder / "lcm-lora.safetensors"),
        "resolution": data.SIZE, "batch": 32, "rank": 32, "guidance": DISTILLED, "lr": 4e-4,
        "warmup": 50, "decay": "cosine", "checkpoint_every": 1000,
        "precision": "bf16" if subjects.quick_dtype() == torch.bfloat16 else "fp32",
        "log_every": 20, "sample_every": 0,
    }  # fmt: skip


def distil(spec: dict) -> dict[str, float]:
    """Runs the program, from an empty folder; -> the minutes it took."""
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
        raise SystemExit(f"the distillation ended with status {status}")
    return {"minutes": (time.monotonic() - begun) / 60}


def write_pictures(folder: Path) -> None:
    """The first training photos as PNG files with captions beside them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pixels, labels = data.load(data.folder(environment.cache()), "train")
    photos, *_ = data.dyed(data.greys(pixels[:PICTURES]), torch.Generator().manual_seed(9))
    for i, photo in enumerate(photos):
        array = (photo.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(array).save(folder / f"{i:05d}.png")
        (folder / f"{i:05d}.txt").write_text(CAPTIONS[labels[i]], encoding="utf-8")
