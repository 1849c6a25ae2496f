"""Waits for memory and disk space before a job trains, and reads requests to pause or finish."""

from __future__ import annotations

import errno
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from . import disk
from .state.journal import Journal

Action = Literal["", "pause", "finish"]
ACTIONS: tuple[Action, ...] = ("", "pause", "finish")
PATIENCE = 60.0  # seconds to wait for memory


class Paused(Exception):
    """A request ended the job before its training began. The finished files of the bank stay."""


class Request:
    """The current request to a job, from its control file or from a signal, which means pause.

    Calling it gives "" (none), "pause" (save and end) or "finish" (save, write the LoRA and end).
    """

    def __init__(self, control: Path):
        self.control, self.signalled = control, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signal)

    def _signal(self, *_: object) -> None:
        self.signalled = True

    def __call__(self) -> Action:
        if self.signalled:
            return "pause"
        action = disk.read_object(self.control).get("action")
        if action == "finish":
            return "finish"
        # For the trainer, stop means pause. If it does not end soon, the supervisor ends it.
        return "pause" if action in ("pause", "stop") else ""

    def end_if_asked(self, reached: str = "before the training began") -> None:
        """Raises Paused if the job is to pause."""
        if self() == "pause":
            raise Paused(f"paused {reached}")


def for_memory(
    checkpoint: Path,
    free_memory: Callable[[], int],
    journal: Journal | None,
    request: Callable[[], Action],
) -> None:
    """Waits until the server has freed enough of the device's memory for the checkpoint.

    Waits for at most PATIENCE, because ComfyUI may manage with less memory.
    """
    needed = checkpoint.stat().st_size if checkpoint.is_file() else 0
    deadline = time.monotonic() + PATIENCE
    while (free := free_memory()) < needed and time.monotonic() < deadline:
        if request():
            raise Paused("paused before the training began")
        if journal is not None:
            journal.state(
                "preparing",
                "waiting for memory",
                message=f"waiting for {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free",
                activity_done=free // 1_000_000,
                activity_total=needed // 1_000_000,
            )
        time.sleep(1)


def require_room(folder: Path, needed: float, purpose: str) -> None:
    """Raises OSError (ENOSPC) if the disk of `folder` has less than `needed` bytes free."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(
            errno.ENOSPC,
            f"{needed / 1e9:.1f} GB are needed for {purpose}, {free / 1e9:.1f} are free",
        )
