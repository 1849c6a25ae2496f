"""The distillation engine on the toy: the real program, then the quality of what it made.

An LCM-LoRA is distilled twice, from prompts alone and from pictures with captions, each within the
given minutes for bank and training together, and held against the bars of `bench quality`; or, with
--phased, once with each objective, and both are judged at four steps without fresh noise.
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
Measure = Callable[[dict[str, subjects.Sample], tuple[int, ...]], quality.Figures]
"""(columns, counts of steps) -> what quality.measure finds"""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=15, help="--quality: of each distillation")
    parser.add_argument("--pictures", type=int, default=200, help="--quality: judged, a seed")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--phased", action="store_true", help='--quality: "phased" beside "lcm"')


def run(chosen: argparse.Namespace, checkpoint: Path) -> Report:
    work = commands.LOCAL / "distill"
    shutil.rmtree(work, ignore_errors=True)
    report = Report("distill")
    prompts = {"prompts": CAPTIONS, "count": LATENTS, "draw_steps": 20}
    if chosen.phased:
        jobs = {name: (prompts, name) for name in ("lcm", "phased")}
    else:
        write_pictures(work / "pictures")
        pictures = {"kind": "pictures", "path": str(work / "pictures")}
        jobs = {"from prompts": (prompts, "lcm"), "from pictures": (pictures, "lcm")}
    loras = {}
    for name, (source, objective) in jobs.items():
        spec = write_spec(work / name.replace(" ", "-"), checkpoint, source, objective)
        begun = time.monotonic()
        steps = distil(spec, begun + 60 * chosen.minutes)
        report.add(name, "engine", "time", "min", [(time.monotonic() - begun) / 60])
        report.add(name, "engine", "steps", "", [steps])
        loras[name] = Path(json.loads(spec.read_text())["output"])
    toy = subjects.Toy.load(checkpoint)
    judge = deterministic if chosen.phased else accelerated

    def measure(columns: dict[str, subjects.Sample], steps: tuple[int, ...]) -> quality.Figures:
        kept = quality.Kept(work / "judged", "")
        return quality.measure(toy, columns, steps, chosen.pictures, chosen.seeds, kept)

    judge(report, toy, loras, measure)
    return report


def accelerated(
    report: Report, toy: subjects.Toy, loras: dict[str, Path], measure: Measure
) -> None:
    """Each LoRA against the base with the same sampler and the teacher."""
    known = subjects.subjects(toy)
    columns = {name: known[name] for name in ("base, DDIM", "base, LCM sampler")}
    columns |= {name: subjects.accelerated(toy, path) for name, path in loras.items()}
    figures = measure(columns, (1, 2, 4))
    quality.rows(report, figures)
    for name in loras:
        quality.lcm_bars(report, figures, worst=1.3, name=name)


def deterministic(
    report: Report, toy: subjects.Toy, loras: dict[str, Path], measure: Measure
) -> None:
    """Each LoRA at four steps, with and without fresh noise between them."""
    columns = {
        f"{name}, eta {eta}": subjects.accelerated(toy, path, eta)
        for name, path in loras.items()
        for eta in (0.0, 1.0)
    }
    figures = measure(columns, (4,))
    quality.rows(report, figures)
    for metric in ("frechet", "endpoint_error"):
        phased, lcm = (("4 steps", f"{name}, eta 0.0", metric) for name in ("phased", "lcm"))
        report.bar(
            f"{metric} at 4 deterministic steps, phased / lcm",
            quality.ratio(figures, phased, lcm), 1.0,
        )  # fmt: skip


def write_spec(folder: Path, checkpoint: Path, source: dict, objective: str) -> Path:
    """The job's description; its steps are more than the time allows."""
    import comfy

    folder.mkdir(parents=True)
    spec = folder / "spec.json"
    settings = {
        "host": str(Path(comfy.__path__[0]).parent), "checkpoint": str(checkpoint),
        "banks": str(folder.parent / "banks"), "output": str(folder / "lcm-lora.safetensors"),
        "data": source, "resolution": data.SIZE, "steps": 100_000, "batch": 32, "rank": 32,
        "guidance": GUIDANCE, "lr": 4e-4, "warmup": 50, "precision": "bf16",
        "checkpoint_every": 1000, "log_every": 20, "sample_every": 0, "objective": objective,
    }  # fmt: skip
    spec.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return spec


def distil(spec: Path, deadline: float) -> int:
    """Runs the program until the deadline, when it is told to finish; -> steps taken."""
    process = subprocess.Popen([sys.executable, str(RUN), str(spec)])
    try:
        process.wait(timeout=deadline - time.monotonic())
    except subprocess.TimeoutExpired:
        (spec.parent / "control.json").write_text('{"action": "finish"}')
    except BaseException:
        process.terminate()
        raise
    if status := process.wait():
        raise SystemExit(f"the distillation ended with status {status}")
    return json.loads((spec.parent / "status.json").read_text())["step"]


def write_pictures(folder: Path) -> None:
    """The first training photos as PNG files with captions beside them."""
    folder.mkdir(parents=True)
    pixels, labels = data.load(data.folder(environment.cache()), "train")
    photos, *_ = data.dyed(data.greys(pixels[:PICTURES]), torch.Generator().manual_seed(9))
    for i, photo in enumerate(photos):
        array = (photo.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
        Image.fromarray(array).save(folder / f"{i:05d}.png")
        (folder / f"{i:05d}.txt").write_text(CAPTIONS[labels[i]], encoding="utf-8")
