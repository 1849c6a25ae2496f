"""What a running job tells in words and figures. Without torch, for processes that only watch."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from .. import disk


class Journal:
    """status.json, rewritten at once, and metrics.jsonl, appended. Only rank 0 has one."""

    def __init__(self, job: Path):
        self.status_file, self.metrics_file = job / "status.json", job / "metrics.jsonl"
        self.status: dict[str, Any] = {"pid": os.getpid(), "started": time.time()}
        # As far as the process before came: this one has something to tell after some steps only.
        before = disk.read_object(self.status_file)
        self.status |= {key: before[key] for key in ("step", "loss") if key in before}

    def state(self, state: str, **told: Any) -> None:
        """Writes the job's state (preparing, running, paused, done, failed) and what is told."""
        self.status |= {"state": state, "updated": time.time(), **told}
        disk.replace(self.status_file, json.dumps(self.status, indent=1, ensure_ascii=False))

    def metrics(self, **figures: float | int | dict) -> None:
        # JSON has no infinity, as a gradient in half precision may be now and then.
        known = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in figures.items()
        }
        line = json.dumps({"time": round(time.time(), 3), **known})
        with open(self.metrics_file, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def forget_after(self, step: int) -> None:
        """Drops the metrics of steps that a crash has undone, and a line it has torn."""
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
