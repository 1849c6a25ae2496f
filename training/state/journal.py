"""A running job's reports: its status and its metrics. It does not import torch."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import disk
from ..jobs.records import Status

BEAT = 1.0  # seconds between reports while the job is at work


class Journal:
    """Writes status.json and appends to metrics.jsonl. Only rank 0 has one."""

    def __init__(self, job: Path):
        self.job, self.metrics_file = job, job / "metrics.jsonl"
        # Keeps the earlier process's step and loss until this process has figures of its own.
        before = Status.read(job) or Status()
        self.status = Status(os.getpid(), time.time(), step=before.step, loss=before.loss)
        self._lock = threading.Lock()
        self._end: float | None = None  # when the job will be done, by time.monotonic

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Inside, a thread writes the status every second, whatever the main thread does. So
        readers see that the process lives, and the time left counts down."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT):
                with suppress(OSError):  # on a full disk, the main thread will fail too
                    self._beat()

        thread = threading.Thread(target=beat, name="lcm_lora journal", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def state(self, state: str, activity: str = "", **changes: Any) -> None:
        """Writes the job's state, its activity and these fields of its Status; the others stay."""
        if state != "running":
            changes["seconds_left"] = None
        self._change(state=state, activity=activity, **changes)
        with self._lock:
            self.status.write(self.job)

    def note(self, activity: str, **changes: Any) -> None:
        """As `state`, but the next beat writes, so this does not wait for the disk."""
        self._change(activity=activity, **changes)

    def _change(self, **changes: Any) -> None:
        changes = {"activity_done": 0, "activity_total": 0} | changes
        if "seconds_left" in changes:
            left = changes["seconds_left"]
            self._end = None if left is None else time.monotonic() + left
        self.status = replace(self.status, updated=time.time(), **changes)

    def _beat(self) -> None:
        with self._lock:  # so that nothing older is written after something newer
            status, end = self.status, self._end
            if not status.state:
                return
            if end is not None:
                left = max(0.0, round(end - time.monotonic(), 1))
                status = replace(status, seconds_left=left)
            replace(status, updated=time.time()).write(self.job)

    def repeat(self, status: Status) -> None:
        """Writes another process's report, such as that of a job on a cluster, as this process's
        own. This process's figures stay if the other process has none yet."""
        own = self.status
        self.status = replace(
            status,
            pid=own.pid,
            started=own.started,
            updated=time.time(),
            step=status.step or own.step,
            steps=status.steps or own.steps,
            loss=own.loss if status.loss is None else status.loss,
        )
        with self._lock:
            self.status.write(self.job)

    def metrics(self, **figures: float | int | dict[str, float]) -> None:
        # JSON has no infinity, which a gradient in half precision may reach.
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in figures.items()
        }
        line = json.dumps({"time": round(time.time(), 3), **finite})
        with open(self.metrics_file, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def forget_after(self, step: int, unsampled: bool = False) -> None:
        """Drops the metrics of steps that a crash has undone, and lines that it has torn.

        unsampled: also drops the figures of this step's sample pictures, because the job draws them
        again.
        """
        if not self.metrics_file.exists():
            return
        kept = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                figures = json.loads(line)
                again = unsampled and figures["step"] == step and "endpoint_error" in figures
                if figures["step"] <= step and not again:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue
        disk.replace(self.metrics_file, "".join(kept))
