"""The server's part in its jobs: pauses them while prompts run, and notifies pages of changes.

The caller passes functions in, so this file depends neither on ComfyUI nor on HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .job import Job
from .processes import Process
from .states import ACTIVE
from .store import Store

log = logging.getLogger("lcm_lora")
TICK = 0.5  # seconds between rounds
IDLE = 3.0  # seconds without a prompt before jobs resume


@dataclass
class Beside:
    """Watches the jobs for one ComfyUI server.

    Attributes:
        prompts: gives the number of prompts that run or wait.
        free: makes the server unload its models.
        work: makes sure that a supervisor runs.
        notify: tells the pages that a job changed.
        waiting: ids of jobs that a running prompt waits for; while there are any, no job pauses.
    """

    store: Store
    prompts: Callable[[], int]
    free: Callable[[], None]
    work: Callable[[], None]
    notify: Callable[[], None]
    waiting: list[str]
    _shown: dict[str, dict[str, Any]] = field(default_factory=dict)
    _active: set[str] = field(default_factory=set)
    _busy_at: float = field(default=-1e9)
    _was_busy: bool = False

    def start(self) -> None:
        threading.Thread(target=self._forever, name="lcm_lora jobs", daemon=True).start()

    def _forever(self) -> None:
        while True:
            try:
                self.look(time.monotonic())
            except Exception:  # a full disk or a held lock; the next round may succeed
                log.exception("Could not check the jobs.")
            time.sleep(TICK)

    def look(self, now: float) -> None:
        """One round. now: seconds of a monotonic clock."""
        jobs = self.store.jobs()
        busy = self.prompts() > 0 and not self.waiting
        if busy:
            self._busy_at = now
        rested = now - self._busy_at >= IDLE or bool(self.waiting)
        changed = False
        for job in jobs:
            if job.on_cluster:
                continue  # it does not use this machine
            with self.store.unless_deleted(job.id):
                if job.policy == "yield" and busy and _can_pause(job):
                    changed |= self.store.ask(job.id, "pause", Process.this(), only=_can_pause)
                elif rested and _can_resume(job):
                    changed |= self.store.ask(job.id, "", only=_can_resume)
        if changed:
            jobs = self.store.jobs()
        if any(job.waits for job in jobs):
            self.work()
        self._free_memory([job for job in jobs if not job.on_cluster], busy)
        shown = {job.id: job.public() for job in jobs}
        if shown != self._shown:
            self._shown = shown
            self.notify()

    def _free_memory(self, jobs: list[Job], busy: bool) -> None:
        """Unloads the server's models when a job starts, and when the queue of prompts becomes
        empty while a job is active."""
        active = {job.id for job in jobs if job.state in ACTIVE and job.policy != "share"}
        if active - self._active or (active and self._was_busy and not busy):
            self.free()
        self._active, self._was_busy = active, busy


def _can_pause(job: Job) -> bool:
    return job.state in ("queued", "preparing", "running")


def _can_resume(job: Job) -> bool:
    """Whether the job paused for this server's prompts, or for a server that no longer runs."""
    if job.state != "paused" or job.aside is None:
        return False
    return job.is_forsaken or job.aside == Process.this()
