"""Picture quality at 1, 2, 4 and 8 steps: each column of the sheet against the 50-step teacher.

Frechet distance, precision, recall and accuracy (the share of pictures with the objects that the
caption names) are measured on decoded pictures with the shipped classifier. The endpoint error is
the mean squared difference of latents (diffusion scale) to the teacher's 50-step endpoint from the
same noise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ...training.disk import replace, whole_file
from .. import commands
from ..toy import assemble, world
from ..toy.judge import Judge
from . import subjects
from .report import Report

log = logging.getLogger("lcm_lora")
STEPS = (1, 2, 4, 8)
GUIDANCES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
LEAST = 100  # the judge has 64 features
# Pictures at once. On 2 cores, 8 to 50 at once cost a fifth less each than 200.
BATCH = 250 if torch.cuda.is_available() else 25
TEACHER = f"{subjects.TEACHER_STEPS} steps", "teacher"
Key = tuple[str, str, str]
"""case, subject, metric"""
Figures = dict[Key, list[float]]
"""One value per seed."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="1,000 pictures and 3 seeds")
    parser.add_argument("--pictures", type=int, help="pictures per seed")
    parser.add_argument("--seeds", type=int)
    parser.add_argument(
        "--guidance",
        action="store_true",
        help="only the teacher, over its guidance: a lower one alone changes the distance",
    )
    parser.add_argument(
        "--cfg",
        type=float,
        default=subjects.GUIDANCE,
        help="of the base model (default: %(default)s)",
    )
    parser.add_argument(
        "--bf16", action="store_true",
        help="the network in bfloat16: half the time where the processor has it",
    )  # fmt: skip


def run(chosen: argparse.Namespace, checkpoint: Path) -> Report:
    pictures = chosen.pictures or (1000 if chosen.full else 150)
    if pictures < LEAST:
        raise SystemExit(f"--pictures is {pictures}, but a distance needs at least {LEAST}.")
    seeds = chosen.seeds or (3 if chosen.full else 2)
    toy = subjects.Toy.load(checkpoint, torch.bfloat16 if chosen.bf16 else torch.float32)
    kept = Kept(commands.LOCAL / "quality", f"{toy.name} {pictures} {chosen.cfg}")
    report = Report("quality")
    if chosen.guidance:
        columns = {
            f"teacher, guidance {value:g}": subjects.teacher(toy, value) for value in GUIDANCES
        }
        rows(report, measure(toy, columns, (subjects.TEACHER_STEPS,), pictures, seeds, kept))
        return report
    columns = subjects.columns(toy, chosen.cfg)
    figures = measure(toy, columns, STEPS, pictures, seeds, kept, guidance=chosen.cfg)
    kept.forget()
    rows(report, figures)
    lcm_bars(report, figures, {4: 1.2, 2: 1.5, 1: 2.0})
    for name, least in (("base, DDIM", 2.0), ("base, DPM++ 2M", 1.5)):
        report.bar(
            f"frechet, teacher at 50 steps / {name} at 4 (the model needs the LoRA)",
            ratio(figures, (*TEACHER, "frechet"), ("4 steps", name, "frechet")), 1 / least,
        )  # fmt: skip
    return report


def digest(settings: str, sources: Iterable[Path]) -> str:
    content = b"".join(path.read_bytes() for path in sources)
    return hashlib.sha256(settings.encode() + content).hexdigest()[:12]


class Kept:
    """The figures of a run so far, so that hours of drawing can be interrupted and continued.

    settings, sources: what the figures depend on, besides the model's weights and the samplers'
    source code. When any of these changes, the run starts again.
    """

    def __init__(self, folder: Path, settings: str, sources: Iterable[Path] = ()) -> None:
        files = [*sorted(assemble.WEIGHTS.iterdir()), Path(subjects.__file__), *sorted(sources)]
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


def scenes(seed: int, count: int, collection: str = "3d") -> list[world.Spec]:
    """The scenes of a seed's pictures, with captions that the model knows."""
    return world.specs_of(collection, count, torch.Generator().manual_seed(1000 + seed))


@cache
def prompts(toy: subjects.Toy, seed: int, count: int, collection: str) -> list[tuple[list, int]]:
    """The captions of `scenes`, encoded in batches, and the size of each batch."""
    captions = [spec.caption for spec in scenes(seed, count, collection)]
    parts = [captions[begun : begun + BATCH] for begun in range(0, count, BATCH)]
    return [(toy.encode(*part), len(part)) for part in parts]


def draw(
    toy: subjects.Toy, sample: subjects.Sample, steps: int, seed: int, count: int,
    collection: str = "3d",
) -> torch.Tensor:  # fmt: skip
    """Latents of a picture of each scene."""
    empty = toy.encode("")
    latents = [
        sample(steps, seed * 1000 + i, prompt, empty, size)
        for i, (prompt, size) in enumerate(prompts(toy, seed, count, collection))
    ]
    return torch.cat(latents)


def endpoints(
    toy: subjects.Toy, seed: int, count: int, collection: str, guidance: float
) -> torch.Tensor:
    """The teacher's latents, which take most of the time, kept for all runs."""
    name = digest(f"{toy.name} {count} {seed} {guidance}", [Path(subjects.__file__)])
    file = commands.LOCAL / "teacher" / f"{name}.safetensors"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        latents = draw(toy, subjects.teacher(toy, guidance), 0, seed, count, collection)
        with whole_file(file) as new:
            save_file({"latents": latents}, new)
    return load_file(file)["latents"]


def measure(
    toy: subjects.Toy, columns: dict[str, subjects.Sample], steps: Sequence[int], pictures: int,
    seeds: int, kept: Kept, collection: str = "3d", guidance: float = subjects.GUIDANCE,
) -> Figures:  # fmt: skip
    """Figures of each column at each number of steps, and of the teacher.

    collection: what the pictures show, and what they are compared with. guidance: the teacher's.
    """
    judge, figures = Judge(collection), Figures()
    hand = world.hand_of(collection)

    def judged(
        drawing: Callable[[], torch.Tensor], endpoint: torch.Tensor, kinds: list[tuple[int, ...]]
    ) -> dict[str, float]:
        latents = drawing()
        features = judge.features(toy.decode(latents))
        error = (latents - endpoint) * toy.base.model.latent_format.scale_factor
        values = {
            "frechet": judge.distance(features), "hand": judge.hand(features, hand),
            "precision": judge.precision(features), "recall": judge.recall(features),
            "endpoint_error": float(error.square().mean()),
        }  # fmt: skip
        if collection != "faces":  # the classifier has no names for them
            values["accuracy"] = judge.accuracy(features, kinds)
        return values

    for seed in range(seeds):
        kinds = [spec.kinds for spec in scenes(seed, pictures, collection)]
        drawings = {TEACHER: partial(endpoints, toy, seed, pictures, collection, guidance)}
        for number in steps:
            for name, sample in columns.items():
                drawings[f"{number} steps", name] = partial(
                    draw, toy, sample, number, seed, pictures, collection
                )
        endpoint = drawings[TEACHER]()
        for cell, drawing in drawings.items():
            title = ": ".join((f"seed {seed}", *cell))
            values = kept.get(title, partial(judged, drawing, endpoint, kinds))
            log.info("%s: frechet %.3f", title, values["frechet"])
            for metric, value in values.items():
                figures.setdefault((*cell, metric), []).append(value)
    return figures


def rows(report: Report, figures: Figures) -> None:
    """A row of the report for each figure."""
    for (case, name, metric), values in figures.items():
        share = metric in ("accuracy", "precision", "recall", "hand")
        report.add(case, name, metric, "share" if share else "", values)


def ratio(figures: Figures, above: Key, below: Key) -> float:
    """The median of the ratios seed by seed."""
    pairs = zip(figures[above], figures[below], strict=True)
    return statistics.median(a / b for a, b in pairs)


def lcm_bars(
    report: Report, figures: Figures, worst: dict[int, float], name: str = "LCM-LoRA"
) -> None:
    """The bars of an LCM-LoRA; worst: number of steps -> its distance / the teacher's."""

    def of(metric: str, steps: int) -> Key:
        return f"{steps} steps", name, metric

    for steps, limit in worst.items():
        distances = ratio(figures, of("frechet", steps), (*TEACHER, "frechet"))
        report.bar(f"frechet, {name} at {steps} steps / teacher at 50", distances, limit)
    lost = (
        teacher - ours
        for teacher, ours in zip(
            figures[(*TEACHER, "accuracy")], figures[of("accuracy", 4)], strict=True
        )
    )
    report.bar(f"accuracy lost at 4 steps, {name}", statistics.median(lost), 0.03)
    recalls = ratio(figures, (*TEACHER, "recall"), of("recall", 4))
    report.bar(f"recall, teacher at 50 steps / {name} at 4", recalls, 1 / 0.9)
