"""metrics.jsonl of a job, read back for a chart."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

COLUMNS = ("step", "loss", "lr", "gradient_norm", "samples_per_second", "memory")


def read(job: Path, first: int = 0, last: int = 1 << 40, points: int = 300) -> dict[str, Any]:
    """Steps `first` to `last`, at most `points` of each: {"columns", "rows", "errors"}.

    rows: figures by columns, None where one is not finite. errors: step, and the sample pictures'
    distance to the teacher's at 1, 2 and 4 steps.
    """
    path, rows, errors = job / "metrics.jsonl", [], []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            told = json.loads(line)
            step, sampled = told.get("step"), told.get("endpoint_error")
        except (ValueError, AttributeError):
            continue  # a line that a crash has torn
        if not isinstance(step, int) or not first <= step <= last:
            continue
        if isinstance(sampled, dict):
            errors.append([step, *(_finite(sampled.get(steps)) for steps in ("1", "2", "4"))])
        else:
            rows.append([_finite(told.get(column)) for column in COLUMNS])
    return {"columns": COLUMNS, "rows": _thinned(rows, points), "errors": _thinned(errors, points)}


def _finite(value: Any) -> float | int | None:
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if fine else None


def _thinned(rows: list[list], points: int) -> list[list]:
    """At most `points` of the rows, the first and the last among them."""
    if len(rows) <= points:
        return rows
    return [rows[round(i * (len(rows) - 1) / (points - 1))] for i in range(points)]
