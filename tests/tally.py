"""The table of faults: how often each was tried, and what was lost."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lcm_lora.lora.atomic import TEMPORARY
from lcm_lora.training import disk
from lcm_lora.training.jobs import processes
from lcm_lora.training.jobs.store import Store
from safetensors.torch import load_file

MEASURES = ("jobs lost", "orphans", "half files")


@dataclass
class Tally:
    """times: how often a test should try a fault that can happen at random moments."""

    times: int
    rows: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)

    def add(self, fault: str, lost: int, orphans: int, half: int) -> None:
        """Records one try; fails if anything was lost."""
        self.rows.setdefault(fault, []).append((lost, orphans, half))
        assert not lost + orphans + half, f"{fault}: {lost=}, {orphans=}, {half=}"

    def tried(self, fault: str) -> int:
        return len(self.rows.get(fault, []))

    def write(self, path: Path) -> str:
        """Writes the table in the benchmarks' format; -> the table as text."""
        from lcm_lora.dev.bench.report import Report

        report = Report("faults")
        for fault, tries in self.rows.items():
            report.add(fault, "jobs", "tried", "times", [len(tries)])
            for measure, values in zip(MEASURES, zip(*tries, strict=True), strict=True):
                report.add(fault, "jobs", measure, "", [sum(values)])
        report.bar("jobs lost, orphans and half files", sum(
            sum(map(sum, tries)) for tries in self.rows.values()
        ), 0)  # fmt: skip
        report.write(path)
        return report.table()


def same(one: Path, other: Path) -> bool:
    """Whether two LoRA files hold the same numbers; the names in their metadata differ."""
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def half_files(*folders: Path, working: bool = False) -> int:
    """What is not whole: JSON and LoRAs that cannot be read, and temporary files, which only while
    something works on them may be there."""
    return settled(lambda: _half_files(folders, working), 0 if working else 20)


def _half_files(folders: Sequence[Path], working: bool) -> int:
    count = 0
    # Not rglob, which stops when a folder is removed while it looks into it.
    walked = (entry for folder in folders for entry in os.walk(folder))
    for file in (Path(at, name) for at, inside, names in walked for name in (*inside, *names)):
        if any(part.startswith(TEMPORARY) for part in file.parts):
            count += not working
        elif file.suffix == ".json":
            count += disk.read_json(file) is None and file.exists()
        elif file.suffix == ".safetensors":
            count += not _reads(file) and file.exists()
    return count


def _reads(file: Path) -> bool:
    try:
        load_file(file)
    except Exception:
        return False
    return True


def settled(count: Callable[[], int], seconds: float = 20) -> int:
    """The count after the processes have ended and the supervisor has noticed it."""
    until = time.monotonic() + seconds
    while (left := count()) and time.monotonic() < until:
        time.sleep(0.2)
    return left


def orphans(store: Store, job: str) -> int:
    """Processes of an ended job that still run, and supervisors beyond the first."""
    return settled(lambda: _orphans(store, job))


def _orphans(store: Store, job: str) -> int:
    running = processes.of_job("supervisor")
    supervisors = [process for process in running if str(store.folder) in process.cmdline()]
    return len(processes.of_job(job)) + max(0, len(supervisors) - 1)
