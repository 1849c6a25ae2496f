"""How every benchmark times: subjects take turns, here or each in a process of its own."""

from __future__ import annotations

import logging
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..environment import ROOT

log = logging.getLogger("lcm_lora")
Settings = TypeVar("Settings")


@dataclass
class Taken:
    """What one run took: seconds, seconds of all cores, and the process's peak in bytes."""

    seconds: float
    cpu_seconds: float
    peak: int
    result: Any  # what the subject returned


Subject = Callable[[], Taken]


def timed(run: Callable[[], Any]) -> Taken:
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is used now
    begun, used = time.perf_counter(), time.process_time()
    result = run()
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - used
    return Taken(seconds, cpu_seconds, memory("VmHWM"), result)


def memory(name: str) -> int:
    """Bytes of this process as Linux counts them: VmRSS now, VmHWM at the peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split(maxsplit=1)[0])


class Process:
    """A subject in a process of its own. prepare(settings) returns there the function to time."""

    def __init__(
        self, prepare: Callable[[Settings], Callable[[], Any]], settings: Settings,
        threads: int | None = None,
    ) -> None:  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(ROOT)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": str(threads or os.cpu_count())},
        )  # fmt: skip
        pickle.dump((prepare, settings), self._process.stdin)
        self._process.stdin.flush()
        self.start: int = self._answer()  # bytes in use before the first run

    def __call__(self) -> Taken:
        self._process.stdin.write(b"run\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _answer(self) -> Any:
        try:
            return pickle.load(self._process.stdout)
        except EOFError:
            raise SystemExit(f"A subject's process ended with {self._process.wait()}.") from None


CHILD = """
import sys, types
sys.path.pop(0)  # the current folder, whose modules could hide others
package = sys.modules["lcm_lora"] = types.ModuleType("lcm_lora")
package.__path__ = [sys.argv[1]]
from lcm_lora.dev.bench.timing import answer
answer()
"""


def answer() -> None:
    """The child's side of a Process."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints must not be read as an answer
    prepare, settings = pickle.load(sys.stdin.buffer)
    run = prepare(settings)
    answers.write(pickle.dumps(memory("VmRSS")))
    while sys.stdin.buffer.readline():
        answers.write(pickle.dumps(timed(run)))


@dataclass
class Turns:
    """The runs of each subject. The first one warms up, and is not counted."""

    runs: dict[str, list[Taken]]

    def counted(self, name: str) -> list[Taken]:
        return self.runs[name][1:]

    def seconds(self, name: str) -> list[float]:
        return [run.seconds for run in self.counted(name)]

    def peak(self, name: str) -> int:
        """Bytes."""
        return max(run.peak for run in self.counted(name))

    def ratios(self, above: str, below: str, figure: str = "seconds") -> list[float]:
        """A figure of one subject divided by another's, run by run."""
        pairs = zip(self.counted(above), self.counted(below), strict=True)
        return [getattr(one, figure) / getattr(other, figure) for one, other in pairs]

    def ratio(self, above: str, below: str) -> float:
        """The median ratio of the times."""
        return statistics.median(self.ratios(above, below))


def take_turns(subjects: dict[str, Subject], runs: int) -> Turns:
    """One run of each subject to warm up and `runs` counted ones, in an order that alternates."""
    turns = Turns({name: [] for name in subjects})
    for number in range(runs + 1):
        for name in list(subjects)[:: 1 if number % 2 else -1]:
            turns.runs[name].append(subjects[name]())
            log.info("run %d, %s: %.2f s", number, name, turns.runs[name][-1].seconds)
    return turns
