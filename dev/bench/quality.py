"""Picture quality at 1, 2, 4 and 8 steps: each column of the sheet against the 50-step teacher.

Frechet distance and class accuracy are measured on decoded pictures with the shipped classifier;
the endpoint error is the mean squared difference of latents (diffusion scale) to the teacher's
50-step endpoint from the same noise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ...training.disk import replace, whole_file
from .. import commands
from ..toy import assemble, data
from ..toy.judge import Judge
from . import subjects
from .report import Report

log = logging.getLogger("lcm_lora")
STEPS = (1, 2, 4, 8)
LEAST = 50  # the judge has 32 features
BATCH = 25  # pictures at once; on 2 cores, 8 to 50 at once cost a fifth less each than 200
TEACHER = f"{subjects.TEACHER_STEPS} steps", "base, DDIM (teacher)"
Key = tuple[str, str, str]
"""case, subject, metric"""
Figures = dict[Key, list[float]]
"""One value per seed."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="1,000 pictures and 3 seeds")
    parser.add_argument("--pictures", type=int, help="pictures per seed, a multiple of 10")
    parser.add_argument("--seeds", type=int)
    parser.add_argument(
        "--bf16", action="store_true",
        help="the network in bfloat16: half the time where the processor has it",
    )  # fmt: skip


def run(chosen: argparse.Namespace, checkpoint: Path) -> Report:
    pictures = chosen.pictures or (1000 if chosen.full else 100)
    if pictures < LEAST:
        raise SystemExit(f"--pictures is {pictures}, but a distance needs at least {LEAST}.")
    seeds = chosen.seeds or (3 if chosen.full else 2)
    toy = subjects.Toy.load(checkpoint, torch.bfloat16 if chosen.bf16 else torch.float32)
    kept = Kept(commands.LOCAL / "quality", f"{toy.name} {pictures}")
    figures = measure(toy, subjects.columns(toy), STEPS, pictures, seeds, kept)
    kept.forget()
    report = Report("quality")
    rows(report, figures)
    lcm_bars(report, figures, worst=1.5)
    report.bar(
        "frechet, teacher at 50 steps / base DDIM at 4 (the toy needs the LoRA)",
        ratio(figures, (*TEACHER, "frechet"), ("4 steps", "base, DDIM", "frechet")), 1 / 1.5,
    )  # fmt: skip
    accuracy = statistics.median(figures[(*TEACHER, "accuracy")])
    report.bar("error rate of the teacher at 50 steps", 1 - accuracy, 0.15)
    return report


def digest(settings: str, sources: Iterable[Path]) -> str:
    content = b"".join(path.read_bytes() for path in sources)
    return hashlib.sha256(settings.encode() + content).hexdigest()[:12]


class Kept:
    """The figures of a run so far, so that hours of drawing can be interrupted and continued.

    settings, sources: what the figures depend on, besides the toy's LoRAs and the samplers' source.
    When one of these changes, the run starts again.
    """

    def __init__(self, folder: Path, settings: str, sources: Iterable[Path] = ()) -> None:
        files = [assemble.LCM_LORA, assemble.STYLE_LORA, Path(subjects.__file__), *sorted(sources)]
        files += sorted((Path(__file__).parents[2] / "samplers").glob("*.py"))
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{digest(settings, files)}.json"
        self.figures = json.loads(self.file.read_text()) if self.file.exists() else {}

    def get(self, name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        if name not in self.figures:
            self.figures[name] = measure()
            replace(self.file, json.dumps(self.figures))
        return self.figures[name]

    def forget(self) -> None:
        self.file.unlink(missing_ok=True)


def draw(
    toy: subjects.Toy, sample: subjects.Sample, steps: int, seed: int, count: int
) -> torch.Tensor:
    """Latents of `count` pictures of each class."""
    sizes = [min(BATCH, count - begun) for begun in range(0, count, BATCH)]
    prompts = [toy.encode(data.TEMPLATES[0].format(name)) for name in data.NAMES]
    empty, parts = toy.encode(""), [(prompt, size) for prompt in prompts for size in sizes]
    latents = [
        sample(steps, seed * 1000 + i, prompt, empty, size)
        for i, (prompt, size) in enumerate(parts)
    ]
    return torch.cat(latents)


def endpoints(toy: subjects.Toy, seed: int, count: int) -> torch.Tensor:
    """The teacher's latents, which take most of the time, kept for all runs."""
    name = digest(f"{toy.name} {count} {seed}", [Path(subjects.__file__)])
    file = commands.LOCAL / "teacher" / f"{name}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        latents = draw(toy, subjects.teacher(toy), 0, seed, count)
        with whole_file(file) as new:
            save_file({"latents": latents}, new)
    return load_file(file)["latents"]


def measure(
    toy: subjects.Toy, columns: dict[str, subjects.Sample], steps: Sequence[int], pictures: int,
    seeds: int, kept: Kept,
) -> Figures:  # fmt: skip
    """Figures of each column at each number of steps, and of the teacher."""
    judge, figures = Judge(), Figures()
    count = max(1, pictures // len(data.NAMES))
    labels = torch.arange(len(data.NAMES)).repeat_interleave(count)

    def judged(drawing: Callable[[], torch.Tensor], endpoint: torch.Tensor) -> dict[str, float]:
        latents = drawing()
        features = judge.features(toy.decode(latents))
        error = (latents - endpoint) * toy.base.model.latent_format.scale_factor
        return {
            "frechet": judge.distance(features), "accuracy": judge.accuracy(features, labels),
            "endpoint_error": float(error.square().mean()),
        }  # fmt: skip

    for seed in range(seeds):
        drawings = {TEACHER: partial(endpoints, toy, seed, count)}
        for number in steps:
            for name, sample in columns.items():
                drawings[f"{number} steps", name] = partial(draw, toy, sample, number, seed, count)
        endpoint = drawings[TEACHER]()
        for cell, drawing in drawings.items():
            title = ": ".join((f"seed {seed}", *cell))
            values = kept.get(title, partial(judged, drawing, endpoint))
            log.info("%s: frechet %.3f", title, values["frechet"])
            for metric, value in values.items():
                figures.setdefault((*cell, metric), []).append(value)
    return figures


def rows(report: Report, figures: Figures) -> None:
    """A row of the report for each figure."""
    for (case, name, metric), values in figures.items():
        report.add(case, name, metric, "share" if metric == "accuracy" else "", values)


def ratio(figures: Figures, above: Key, below: Key) -> float:
    """The median of the ratios seed by seed."""
    pairs = zip(figures[above], figures[below], strict=True)
    return statistics.median(a / b for a, b in pairs)


def lcm_bars(report: Report, figures: Figures, worst: float, name: str = "LCM-LoRA") -> None:
    """The bars of an LCM-LoRA; worst: its distance at 4 steps / the teacher's."""
    four, fifty = ("4 steps", name, "frechet"), (*TEACHER, "frechet")
    report.bar(
        f"frechet at 4 steps, {name} / base with the same sampler",
        ratio(figures, four, ("4 steps", "base, LCM sampler", "frechet")), 0.6,
    )  # fmt: skip
    report.bar(f"frechet, {name} at 4 steps / teacher at 50", ratio(figures, four, fifty), worst)
    error = "endpoint_error"
    report.bar(
        f"endpoint error at 1 step, {name} / base DDIM",
        ratio(figures, ("1 steps", name, error), ("1 steps", "base, DDIM", error)), 0.35,
    )  # fmt: skip
