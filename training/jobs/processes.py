"""Processes that outlive the one which started them: told apart, started, ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

MARK = "LCM_LORA_JOB"
"""Environment variable by which a job's processes are found again, whatever session they are in."""


def identity(pid: int) -> str | None:
    """What tells a process from an earlier one of the same number; None when it has ended.

    On Linux the machine's start and the clock ticks since then, for psutil's time of creation moves
    when the clock is set.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        if sys.platform == "linux":
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            # The command's name, in brackets, may hold anything; the start is the 20th word after.
            ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
            return f"{boot}-{ticks}"
        return f"{process.create_time():.3f}"
    except (psutil.NoSuchProcess, psutil.AccessDenied, OSError, IndexError):
        return None


def alive(pid: object, known: object) -> bool:
    """Whether the process of this number is still the one with this identity."""
    return isinstance(pid, int) and pid > 0 and known is not None and identity(pid) == known


def start(command: list[str], log: Path, mark: str, **environment: str) -> subprocess.Popen:
    """Starts a process that stays when this one ends; its output is added to `log`."""
    options: dict = {"start_new_session": True}
    if os.name == "nt":
        own_group, no_window, breakaway = 0x200, 0x08000000, 0x01000000
        options = {"creationflags": own_group | no_window | breakaway}
    told = os.environ | {MARK: mark} | environment
    with open(log, "ab") as file:
        same = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, "env": told}
        try:
            return subprocess.Popen(command, **same, **options)
        except PermissionError:
            if os.name != "nt":
                raise
            # The server runs in a Windows job that lets nobody go; it will end the process with it.
            options["creationflags"] &= ~breakaway
            return subprocess.Popen(command, **same, **options)


def of_job(mark: str) -> list[psutil.Process]:
    """Every process of a job, torchrun's workers too, which sit in sessions of their own."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue  # another user's, or gone meanwhile
    return found


def end(mark: str, kill: bool) -> None:
    """Asks every process of a job to end, or ends it."""
    for process in of_job(mark):
        try:
            process.kill() if kill else process.terminate()
        except psutil.Error:
            continue
