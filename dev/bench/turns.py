"""Subjects that take turns in one process: what each takes, in time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .worker import forget_peak, memory


@dataclass
class Turn:
    """seconds and peaks (bytes of the whole process), a value a run, of each subject."""

    seconds: dict[str, list[float]]
    peaks: dict[str, list[int]]

    def ratios(self, above: str, below: str) -> list[float]:
        """One subject's time by another's, run by run."""
        pairs = zip(self.seconds[above], self.seconds[below], strict=True)
        return [a / b for a, b in pairs]

    def ratio(self, above: str, below: str) -> float:
        """Their median."""
        return statistics.median(self.ratios(above, below))


def in_turn(names: Iterable[str], runs: int) -> Iterator[tuple[int, str]]:
    """(number of the run, whose it is): run 0, which warms up, and `runs` counted ones of each, in
    an order that turns round each time."""
    known = list(names)
    for number in range(runs + 1):
        for name in known[:: 1 if number % 2 else -1]:
            yield number, name


def take_turns(subjects: dict[str, Callable[[], object]], runs: int) -> Turn:
    """Runs the subjects in turn; what the warming took is left out."""
    turns = Turn({name: [] for name in subjects}, {name: [] for name in subjects})
    for number, name in in_turn(subjects, runs):
        forget_peak()
        begun = time.perf_counter()
        subjects[name]()
        if number:
            turns.seconds[name].append(time.perf_counter() - begun)
            turns.peaks[name].append(memory("VmHWM"))
    return turns
