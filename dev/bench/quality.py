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
BATCH = 25  # pictures at once; measured on 2 cores: 8 to 50 rows cost a fifth less a row than 200
TEACHER = f"{subjects.TEACHER_STEPS} steps", "base, DDIM (teacher)"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="1,000 pictures and 3 seeds")
    parser.add_argument("--pictures", type=int, help="pictures a seed, a multiple of 10")
    parser.add_argument("--seeds", type=int)
    parser.add_argument(
        "--bf16", action="store_true",
        help="the network in bfloat16: half the time where the processor has it",
    )  # fmt: skip


Figures = dict[tuple[str, str, str], list[float]]
"""(case, subject, metric) -> a value a seed"""


def run(chosen: argparse.Namespace, checkpoint: Path) -> Report:
    pictures = chosen.pictures or (1000 if chosen.full else 100)
    if pictures < LEAST:
        raise SystemExit(f"--pictures {pictures}: at least {LEAST} are needed to tell a distance")
    seeds = chosen.seeds or (3 if chosen.full else 2)
    dtype = torch.bfloat16 if chosen.bf16 else torch.float32
    toy = subjects.Toy.load(checkpoint, dtype)
    kept = Kept(commands.LOCAL / "quality", f"{dtype} {pictures} {checkpoint.name}")
    figures = measure(toy, subjects.subjects(toy), STEPS, pictures, seeds, kept)
    kept.forget()
    report = Report("quality")
    rows(report, figures)
    lcm_bars(report, figures, worst=1.5)
    report.bar(
        "frechet, teacher at 50 steps / base DDIM at 4 (the toy needs the LoRA)",
        ratio(figures, (*TEACHER, "frechet"), ("4 steps", "base, DDIM", "frechet")), 1 / 1.5,
    )  # fmt: skip
    agreed = statistics.median(figures[(*TEACHER, "accuracy")])
    report.bar("error rate of the teacher at 50 steps", 1 - agreed, 0.15)
    return report


class Kept:
    """What a run has found so far, so that hours of drawing can be ended and taken up again.

    settings, sources: what the figures depend on besides the toy's LoRAs and the samplers' source,
    which are looked at here. Other settings, or a change of a file, begin anew.
    """

    def __init__(self, folder: Path, settings: str, sources: Iterable[Path] = ()):
        files = [assemble.LCM_LORA, assemble.STYLE_LORA, Path(subjects.__file__), *sorted(sources)]
        files += sorted((Path(__file__).parents[2] / "samplers").glob("*.py"))
        told = settings.encode() + b"".join(path.read_bytes() for path in files)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.stem = folder, hashlib.sha256(told).hexdigest()[:12]
        self.file = folder / f"{self.stem}.json"
        self.cells = json.loads(self.file.read_text()) if self.file.exists() else {}

    def cell(self, name: str, found: Callable[[], dict[str, float]]) -> dict[str, float]:
        if name not in self.cells:
            self.cells[name] = found()
            replace(self.file, json.dumps(self.cells))
        return self.cells[name]

    def forget(self) -> None:
        self.file.unlink(missing_ok=True)


def endpoints(
    toy: subjects.Toy, pictures: int, seed: int, drawn: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """The teacher's latents, which take most of the time, drawn once for all benches."""
    told = f"{toy.name} {pictures} {seed}".encode() + Path(subjects.__file__).read_bytes()
    file = commands.LOCAL / "teacher" / f"{hashlib.sha256(told).hexdigest()[:12]}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        latents = drawn()
        with whole_file(file) as new:
            save_file({"latents": latents}, new)
    return load_file(file)["latents"]


def measure(
    toy: subjects.Toy, columns: dict[str, subjects.Sample], steps: Sequence[int], pictures: int,
    seeds: int, kept: Kept,
) -> Figures:  # fmt: skip
    """Draws `pictures` pictures a seed of each column at each count of steps, and the teacher."""
    judge = Judge()
    each = max(1, pictures // len(data.NAMES))
    prompts = [toy.encode(data.TEMPLATES[0].format(name)) for name in data.NAMES]
    empty = toy.encode("")
    labels = torch.arange(len(data.NAMES)).repeat_interleave(each)
    sizes = [min(BATCH, each - begun) for begun in range(0, each, BATCH)]
    parts = [(prompt, size) for prompt in prompts for size in sizes]

    def draw(sample: subjects.Sample, steps: int, seed: int) -> torch.Tensor:
        drawn = [
            sample(steps, seed * 1000 + i, prompt, empty, size)
            for i, (prompt, size) in enumerate(parts)
        ]
        return torch.cat(drawn)

    def judged(drawn: Callable[[], torch.Tensor], endpoint: torch.Tensor) -> dict[str, float]:
        latents = drawn()
        features = judge.features(toy.decode(latents))
        scale = toy.base.model.latent_format.scale_factor
        return {
            "frechet": judge.distance(features), "accuracy": judge.accuracy(features, labels),
            "endpoint_error": float(((latents - endpoint) * scale).square().mean()),
        }  # fmt: skip

    figures: Figures = {}

    def of_seed(seed: int) -> None:
        teacher = partial(draw, subjects.teacher(toy), 0, seed)
        endpoint = endpoints(toy, pictures, seed, teacher)
        cells = {TEACHER: lambda: endpoint}
        for count in steps:
            for name, sample in columns.items():
                cells[f"{count} steps", name] = partial(draw, sample, count, seed)
        for cell, drawn in cells.items():
            title = ": ".join((f"seed {seed}", *cell))
            found = kept.cell(title, partial(judged, drawn, endpoint))
            log.info("%s: frechet %.3f", title, found["frechet"])
            for metric, value in found.items():
                figures.setdefault((*cell, metric), []).append(value)

    for seed in range(seeds):
        of_seed(seed)
    return figures


def rows(report: Report, figures: Figures) -> None:
    """A row of the report for each figure."""
    for (case, name, metric), values in figures.items():
        report.add(case, name, metric, "share" if metric == "accuracy" else "", values)


def ratio(figures: Figures, above: tuple[str, str, str], below: tuple[str, str, str]) -> float:
    """The median of the ratios seed by seed."""
    pairs = zip(figures[above], figures[below], strict=True)
    return statistics.median(a / b for a, b in pairs)


def lcm_bars(report: Report, figures: Figures, worst: float, name: str = "LCM-LoRA") -> None:
    """The bars of an LCM-LoRA; worst: how much farther than the teacher it may be at 4 steps."""
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
