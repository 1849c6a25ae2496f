"""Find LoRA Weights and Compare Settings on the demo model.

| part | question |
|---|---|
| plants | Are weights found that are known, because changes add up? |
| styles | Are the weights found for a style nearer to its pictures than the paper's 0.8 and 1.0? |
| grids | What does a sheet cost beside bare pictures, and beside a queue of single prompts? |
| memory | What memory does a sheet take at SDXL's full size, beside LCM KSampler? |
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import comfy
import numpy as np
import torch

from ...lora.combine import exact
from ...lora.delta import Vector
from ...lora.formats.files import read_named
from ...search.find import Found, Search
from ...search.host import Measured, Settings, Studio
from ...search.objective import statistics
from ..toy import assemble, world
from ..toy.command import DISTILLED
from . import grids, quality, sheet_memory, subjects
from .report import Report, chosen_parts

PARTS = ("plants", "styles", "grids", "memory")
PAPER = (1.0, 0.8)  # of the acceleration and of the style
HALVES = (1.0, 0.8, 0.8)
LOW, HIGH, BUDGET = 0.0, 2.0, 40
STEPS = (1, 2, 4)
STYLES = {"sticker": assemble.STICKER_LORA, "blueprint": assemble.BLUEPRINT_LORA}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, with commas")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each grid")
    parser.add_argument("--pictures", type=int, default=16, help="to search on")
    parser.add_argument("--reference-steps", type=int, default=50)
    parser.add_argument("--judged", type=int, default=100, help="pictures for a distance")
    parser.add_argument("--grid", type=int, default=0, help="also the best of so many weights each")
    parser.add_argument("--side", type=int, default=128, help="of the latents for the memory")


def run(chosen: argparse.Namespace, checkpoint: Path) -> Report:
    wanted = chosen_parts(chosen.parts, PARTS)
    bench = Bench(chosen, checkpoint)
    for part in wanted:
        getattr(bench, part)()
    return bench.report


class Bench:
    """One run: its settings, the demo model, and what it found."""

    def __init__(self, chosen: argparse.Namespace, checkpoint: Path) -> None:
        self.chosen, self.checkpoint, self.report = chosen, checkpoint, Report("weights")
        self.toy = subjects.Toy.load(checkpoint)
        self.lcm = vector(assemble.LCM_LORA)
        self.seeds = range(chosen.seeds)

    def plants(self) -> None:
        """The weights that are known, and how far those found are from them."""
        style = vector(STYLES["sticker"])
        zero, half = scaled(style, 0.0), scaled(style, 0.5)
        less = exact([style, self.lcm], [1.0, -0.3])[0]
        a, b = 1.25, 0.8
        self.plant("targets of known weights", [style], lambda goal: goal, PAPER)
        self.plant(
            "files scaled by 1.25 and 0.8", [scaled(style, b)],
            lambda goal: (goal[0] / a, goal[1] / b), (PAPER[0] / a, PAPER[1] / b),
            fast=scaled(self.lcm, a),
        )  # fmt: skip
        self.plant(
            "style - 0.3 LCM", [less], lambda goal: (goal[0] + 0.3 * goal[1], goal[1]), PAPER
        )
        self.plant("a style of zeros", [zero], lambda goal: (goal[0], PAPER[1]), PAPER)
        self.plant("two halves of a style", [half, half], None, HALVES)

    def plant(
        self, case: str, styles: Sequence[Vector],
        where: Callable[[tuple[float, float]], tuple[float, ...]] | None,
        default: tuple[float, ...], fast: Vector | None = None,
    ) -> None:  # fmt: skip
        """where: the optimum, if the plain style's targets were drawn at `goal`; None if only the
        sum of two halves is known."""
        away, counts, tied = [], [], []
        for seed in self.seeds:
            low, high = np.array([0.6, 0.3]), np.array([1.3, 1.2])
            goal = tuple(np.random.default_rng(seed).uniform(low, high))
            small = {"reference_steps": 8, "latent": (4, 8, 8)}  # linear at every size
            plain = self.studio([vector(STYLES["sticker"])], 4, seed, **small)
            at = (goal[0], 0.0) if case == "a style of zeros" else goal
            measure = planted(plain, at, self.captions(seed, 6))
            other = self.studio(styles, 4, seed, **small, fast=fast)
            measure.studio = other
            found, count = searched(measure, default)
            best = found.best.weights
            if where is None:
                known = np.array([goal[0], 2 * goal[1]])
                best = np.array([best[0], best[1] + best[2]])
                tied.append(float((1, 2) not in found.tied))
            elif case == "a style of zeros":
                known, best = np.array(where(goal)), found.taken.weights
            else:
                known = np.array(where(goal))
            away.append(float(np.abs(best - known).max()))
            counts.append(float(count))
        self.report.add("plants", case, "away from the known weights", "", away)
        self.report.add("plants", case, "measurements", "", counts)
        self.report.bar(f"{case}: away from the known weights", max(away), 0.01)
        if tied:
            self.report.bar(f"{case}: seeds that do not say so", sum(tied), 0)
        self.report.bar(f"{case}: measurements", max(counts), BUDGET)

    def grids(self) -> None:
        """The time of sheets against the same pictures one by one."""
        host = Path(comfy.__path__[0]).parent
        grids.add(self.report, self.chosen.runs, self.checkpoint, host)

    def memory(self) -> None:
        sheet_memory.add(self.report, self.chosen.side)

    def styles(self) -> None:
        """Found weights against the paper's, judged on other prompts."""
        for name, file in STYLES.items():
            for steps in STEPS:
                self.style(name, vector(file), steps)

    def style(self, name: str, style: Vector, steps: int) -> None:
        case = f"{name}, {steps} steps"
        figures: dict[tuple[str, str], list[float]] = {}
        for seed in self.seeds:
            studio = self.studio([style], steps, seed, self.chosen.reference_steps)
            captions = self.captions(seed, self.chosen.pictures)
            parts = studio.parts(captions, 0)
            measure = Measured(studio, parts, studio.reference(parts))
            found, count = searched(measure, PAPER)
            figures.setdefault(("search", "measurements"), []).append(float(count))
            for number, weight in enumerate(found.taken.weights):
                key = "found", ("weight of the LCM-LoRA", "weight of the style")[number]
                figures.setdefault(key, []).append(float(weight))
            columns = {"0.8 x style + LCM": PAPER, "found": tuple(found.taken.weights)}
            if self.chosen.grid:
                spots = np.linspace(0.2, 1.4, self.chosen.grid)
                grid = [(x, y) for x in spots for y in spots]
                columns["best of the grid"] = min(
                    grid, key=lambda at: self.judged(style, at, steps, seed, name)["frechet"]
                )
                lowest = min(grid, key=lambda at: j(measure, found, at))
                columns["lowest J of the grid"] = lowest
            for title, at in columns.items():
                for metric, value in self.judged(style, at, steps, seed, name).items():
                    figures.setdefault((title, metric), []).append(value)
        for (title, metric), values in figures.items():
            self.report.add(case, title, metric, "", values)
        if self.chosen.grid:
            ratio = quality.ratio(
                {(case, *key): values for key, values in figures.items()},
                (case, "found", "frechet"), (case, "best of the grid", "frechet"),
            )  # fmt: skip
            self.report.bar(f"{case}: distance, found / best of the grid", ratio, 1.02)

    def judged(
        self, style: Vector, at: tuple[float, ...], steps: int, seed: int, collection: str
    ) -> dict[str, float]:
        """Distance, accuracy and share of the style's hand of pictures of held-out prompts."""
        both = exact([self.lcm, style], [float(weight) for weight in at])[0]
        sample = subjects.accelerated(self.toy, both)
        judge, hidden = quality.Judge(collection), 500 + seed
        latents = quality.draw(self.toy, sample, steps, hidden, self.chosen.judged, collection)
        features = judge.features(self.toy.decode(latents))
        kinds = [spec.kinds for spec in quality.scenes(hidden, self.chosen.judged, collection)]
        return {
            "frechet": judge.distance(features), "accuracy": judge.accuracy(features, kinds),
            "hand": judge.hand(features, world.hand_of(collection)),
        }  # fmt: skip

    def studio(
        self, styles: Sequence[Vector], steps: int, seed: int, reference_steps: int,
        fast: Vector | None = None, latent: tuple[int, ...] = subjects.LATENT,
    ) -> Studio:  # fmt: skip
        settings = Settings(steps, 1.0, seed, reference_steps, DISTILLED, "", (1.0,) * len(styles))
        empty = {"samples": torch.zeros(1, *latent)}
        return Studio(
            self.toy.base, self.toy.clip, fast or self.lcm, styles, empty, settings, lambda _: None
        )

    def captions(self, seed: int, count: int) -> list[str]:
        return [spec.caption for spec in quality.scenes(seed, count)]


def vector(name: str) -> Vector:
    return read_named(assemble.lora(name), name)


def scaled(lora: Vector, factor: float) -> Vector:
    deltas = {name: delta.scaled(factor) for name, delta in lora.deltas.items()}
    return replace(lora, deltas=deltas)


def planted(studio: Studio, goal: Sequence[float], captions: Sequence[str]) -> Measured:
    """What measures the distance to the answers and pictures at these weights."""
    parts = studio.parts(captions, 0)
    measure = Measured(studio, parts, studio.reference(parts))
    measure.targets = studio.answers(goal, parts, measure.reference.states)
    measure.wanted = statistics(studio.draw(goal, parts))
    return measure


def searched(measure: Measured, default: Sequence[float]) -> tuple[Found, int]:
    """-> (what is found, how many measurements it took)"""
    search = Search(measure, default, LOW, HIGH, BUDGET)
    list(search.steps())
    found = search.found()
    return found, len(found.points)


def j(measure: Measured, found: Found, at: Sequence[float]) -> float:
    """J in the search's own units."""
    first, here = found.default.residuals, measure(at)
    return here.d_path / first.d_path + here.d_spec / first.d_spec
