"""Subjects that take turns in one process: what each takes, in time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
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


def take_turns(subjects: dict[str, Callable[[], object]], runs: int) -> Turn:
    """One warming and `runs` counted runs of each, in an order that turns round each time."""
    turns = Turn({name: [] for name in subjects}, {name: [] for name in subjects})
    for index in range(runs + 1):
        for name in list(subjects)[:: 1 if index % 2 else -1]:
            forget_peak()
            begun = time.perf_counter()
            subjects[name]()
            if index:
                turns.seconds[name].append(time.perf_counter() - begun)
                turns.peaks[name].append(memory("VmHWM"))
    return turns
