"""The lock of a device: the jobs of one user train on it one after another.

It holds across several ComfyUIs. Inside one of them, the supervisor starts a job only if its
devices are free (jobs/supervisor.py).
"""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from .state.journal import Journal
from .waiting import Action, Paused

_held: list[FileLock] = []  # released when the process ends


def wait_for_device(journal: Journal, request: Callable[[], Action]) -> None:
    """Waits until no other job of this user trains on the device, whichever ComfyUI started it."""
    for device in sorted(set((os.environ.get("CUDA_VISIBLE_DEVICES") or "0").split(","))):
        # The user of a container may have no name.
        user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
        lock = FileLock(Path(tempfile.gettempdir()) / f"lcm_lora-{user}-{device}.lock")
        _held.append(lock)
        while True:
            try:
                lock.acquire(timeout=1)
                break
            except Timeout:
                journal.state(
                    "preparing",
                    "waiting for the device",
                    message="waiting for another ComfyUI's job on this device",
                )
            if request():
                raise Paused("paused before the training began")
