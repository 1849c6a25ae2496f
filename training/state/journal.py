"""A running job's reports: its status and its metrics. It does not import torch."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import disk
from ..jobs.records import Status


class Journal:
    """Writes status.json and appends to metrics.jsonl. Only rank 0 has one."""

    def __init__(self, job: Path):
        self.job, self.metrics_file = job, job / "metrics.jsonl"
        # Step and loss of the process before stay until this one has figures of its own.
        before = Status.read(job) or Status()
        self.status = Status(os.getpid(), time.time(), step=before.step, loss=before.loss)

    def state(self, state: str, **changes: Any) -> None:
        """Writes the job's state and these fields of its Status; the others stay."""
        self.status = replace(self.status, state=state, updated=time.time(), **changes)
        self.status.write(self.job)

    def repeat(self, status: Status) -> None:
        """Writes another process's report, such as the one of a job on a cluster, as its own. The
        own figures stay if the other process has none yet."""
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

    def forget_after(self, step: int) -> None:
        """Drops the metrics of steps that a crash has undone, and a line that it has torn."""
        if not self.metrics_file.exists():
            return
        kept = []
        for line in self.metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue
        disk.replace(self.metrics_file, "".join(kept))
