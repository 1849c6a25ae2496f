"""How every benchmark times: subjects take turns, here or each in a process of its own."""

from __future__ import annotations

import importlib
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..environment import ROOT
from .step import Step

log = logging.getLogger("lcm_lora")
Settings = TypeVar("Settings")


@dataclass
class Taken:
    """What one run took.

    seconds: until the GPU was done, if there is one. cpu_seconds: of all cores. device_seconds:
    between events on the GPU before and after the run; without a GPU, seconds. peak: bytes of the
    GPU's tensors, or of the process. result: what the subject returned; of a process, a Step or
    nothing.
    """

    seconds: float
    cpu_seconds: float
    device_seconds: float
    peak: int
    result: Any


Subject = Callable[[], Taken]


def timed(run: Callable[[], Any], processor_only: bool = False) -> Taken:
    """Runs and measures a function, and waits for the GPU if there is one. processor_only: it uses
    no GPU, so its peak is the process's even where there is one."""
    cuda = torch.cuda if torch.cuda.is_available() and not processor_only else None
    if cuda:
        first, last = (cuda.Event(enable_timing=True) for _ in range(2))
        cuda.reset_peak_memory_stats()
        cuda.synchronize()
        first.record()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is used now
    begun, used = time.perf_counter(), time.process_time()
    result = run()
    if cuda:
        last.record()
        cuda.synchronize()
    seconds, cpu_seconds = time.perf_counter() - begun, time.process_time() - used
    device_seconds = first.elapsed_time(last) / 1000 if cuda else seconds
    peak = cuda.max_memory_allocated() if cuda else memory("VmHWM")
    return Taken(seconds, cpu_seconds, device_seconds, peak, result)


def in_use(processor_only: bool) -> int:
    """Bytes in use now, by the same measure as Taken.peak."""
    if torch.cuda.is_available() and not processor_only:
        return torch.cuda.memory_allocated()
    return memory("VmRSS")


def memory(name: str) -> int:
    """Bytes of this process as Linux counts them: VmRSS now, VmHWM at the peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split(maxsplit=1)[0])


class Process:
    """A subject in a process of its own. prepare(settings) returns there the function to time.
    processor_only: as of `timed`."""

    def __init__(
        self, prepare: Callable[[Settings], Callable[[], Any]], settings: Settings,
        threads: int | None = None, processor_only: bool = False,
    ) -> None:  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(ROOT)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": str(threads or os.cpu_count())},
        )  # fmt: skip
        names = [(made.__module__, made.__name__) for made in (prepare, type(settings))]
        words = [*names, vars(settings), processor_only]
        self._send(json.dumps(words, default=lambda path: {"path": str(path)}))
        self.start: int = self._answer()  # bytes in use before the first run

    def __call__(self) -> Taken:
        self._send("run")
        taken = Taken(**self._answer())
        if taken.result:
            taken.result = Step(**taken.result)
        return taken

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _send(self, line: str) -> None:
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def _answer(self) -> Any:
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"A subject's process ended with {self._process.wait()}.")
        return json.loads(line)


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
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not be read as an answer

    def restored(values: dict[str, Any]) -> Any:
        return Path(values["path"]) if values.keys() == {"path"} else values

    *names, settings, processor_only = json.loads(sys.stdin.readline(), object_hook=restored)
    prepare, kind = (getattr(importlib.import_module(module), name) for module, name in names)
    run = prepare(kind(**settings))
    print(in_use(processor_only), file=answers)  # noqa: T201
    while sys.stdin.readline():
        print(json.dumps(asdict(timed(run, processor_only))), file=answers)  # noqa: T201


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
