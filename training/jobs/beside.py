"""What the server does beside the jobs: steps them aside for the graph, and tells what changed.

It asks and is asked through functions, so that it knows neither the host nor HTTP.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import processes
from .store import ACTIVE, Job, Store

log = logging.getLogger("lcm_lora")
TICK = 0.5  # seconds between looks
IDLE = 3.0  # seconds without a prompt, then the jobs come back


@dataclass
class Beside:
    """One in a server.

    Attributes:
        prompts: how many prompts run or wait. free: asks the server to unload its models.
        work: sees that a supervisor runs. send: tells the pages the jobs that changed.
        waiting: ids of jobs that a running prompt waits for; while there is one, none steps aside.
    """

    store: Store
    prompts: Callable[[], int]
    free: Callable[[], None]
    work: Callable[[], None]
    send: Callable[[list[dict[str, Any]]], None]
    waiting: list[str]
    _told: dict[str, dict] = field(default_factory=dict)
    _active: set[str] = field(default_factory=set)
    _busy_at: float = field(default=-1e9)
    _was_busy: bool = False

    def start(self) -> None:
        threading.Thread(target=self._forever, name="lcm_lora jobs", daemon=True).start()

    def _forever(self) -> None:
        while True:
            try:
                self.look(time.monotonic())
            except Exception:  # the next look may be luckier: a full disk, a lock that was held
                log.exception("The jobs could not be looked at.")
            time.sleep(TICK)

    def look(self, now: float) -> None:
        """One round; now: seconds of a clock that only goes forward."""
        jobs = self.store.jobs()
        busy = self.prompts() > 0 and not self.waiting
        if busy:
            self._busy_at = now
        rested = now - self._busy_at >= IDLE or bool(self.waiting)
        asked = False
        for job in jobs:
            if job.remote:
                continue  # it takes nothing of this machine
            with self.store.unless_deleted(job.id):
                if job.policy == "yield" and busy and _goes(job):
                    asked |= self.store.ask(job.id, "pause", aside=self._me(), only=_goes)
                elif rested and self._may_come_back(job):
                    asked |= self.store.ask(job.id, "", only=self._may_come_back)
        if asked:
            jobs = self.store.jobs()
        if any(job.waits for job in jobs):
            self.work()
        self._hand_over([job for job in jobs if not job.remote], busy)
        self._tell(jobs)

    def _hand_over(self, jobs: list[Job], busy: bool) -> None:
        """Asks for the models' memory where a job starts, and when prompts beside one are done."""
        active = {job.id for job in jobs if job.state in ACTIVE and job.policy != "share"}
        if active - self._active or (active and self._was_busy and not busy):
            self.free()
        self._active, self._was_busy = active, busy

    def _tell(self, jobs: list[Job]) -> None:
        now = {job.id: job.told() for job in jobs}
        changed = [told for job, told in now.items() if self._told.get(job) != told]
        gone = [{"id": job, "state": "deleted"} for job in self._told.keys() - now.keys()]
        self._told = now
        if changed or gone:
            self.send(changed + gone)

    def _me(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "identity": processes.identity(os.getpid())}

    def _may_come_back(self, job: Job) -> bool:
        """Whether it stands aside for this server, or for one that is no more."""
        if job.state != "paused" or not job.aside:
            return False
        return job.forsaken or job.aside == self._me()


def _goes(job: Job) -> bool:
    return job.state in ("queued", "preparing", "running")
