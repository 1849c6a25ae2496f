"""Processes that outlive the one that started them: named, started, found and ended."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

MARK = "LCM_LORA_JOB"
"""Environment variable that marks a job's processes, whatever session they are in."""


@dataclass(frozen=True)
class Process:
    """A process as files name it, by number and identity. The number alone may be reused."""

    pid: int = 0
    identity: str | None = None

    @classmethod
    def this(cls) -> Process:
        return cls(os.getpid(), identity(os.getpid()))

    @property
    def alive(self) -> bool:
        return self.pid > 0 and self.identity is not None and identity(self.pid) == self.identity


def identity(pid: int) -> str | None:
    """A text that is unique to this process, unlike its number; None if the process has ended.

    On Linux, the boot id and the clock ticks since boot: psutil's creation time changes when the
    clock is set.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        if sys.platform == "linux":
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            # The command name in brackets may hold anything; the start is the 20th word after it.
            ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
            return f"{boot}-{ticks}"
        return f"{process.create_time():.3f}"
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError, IndexError):
        return None


def start(command: list[str], log: Path, mark: str, **environment: str) -> subprocess.Popen[bytes]:
    """Starts a process that stays when this one ends. Its output is appended to `log`."""
    options: dict[str, Any] = {"start_new_session": True}
    if os.name == "nt":
        own_group, no_window, breakaway = 0x200, 0x08000000, 0x01000000
        options = {"creationflags": own_group | no_window | breakaway}
    options["stdin"] = subprocess.DEVNULL
    options["env"] = os.environ | {MARK: mark} | environment
    with open(log, "ab") as file:
        try:
            return subprocess.Popen(command, stdout=file, stderr=file, **options)
        except PermissionError:
            if os.name != "nt":
                raise
            # The server runs in a Windows job that allows no breakaway and will end this process.
            options["creationflags"] &= ~breakaway
            return subprocess.Popen(command, stdout=file, stderr=file, **options)


def of_job(mark: str) -> list[psutil.Process]:
    """Every process of a job, with torchrun's workers, which have sessions of their own."""
    marked = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                marked.append(process)
        except (psutil.Error, OSError):
            continue  # another user's, or it has just ended
    return marked


def end(mark: str, kill: bool) -> None:
    """Terminates or kills every process of a job."""
    for process in of_job(mark):
        try:
            process.kill() if kill else process.terminate()
        except psutil.Error:
            continue
