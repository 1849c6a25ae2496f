"""Reads a job's metrics.jsonl for charts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

COLUMNS = ("step", "loss", "lr", "gradient_norm", "samples_per_second", "memory")
SAMPLED = ("1", "2", "4")  # steps of the sample pictures
Row = list[float | int | None]


def read(job: Path, first: int = 0, last: int = 1 << 40, points: int = 300) -> dict[str, Any]:
    """Steps `first` to `last`: {"columns", "rows", "errors", "likeness"}, the last three with at
    most `points` rows.

    rows: the figures of COLUMNS, None if not finite. errors: step, and the distance of the sample
    pictures to the teacher's at 1, 2 and 4 steps. likeness: step, their distance to the data at 1,
    2 and 4 steps, and their recall at 1, 2 and 4 steps.
    """
    rows: list[Row] = []
    errors: list[Row] = []
    likeness: list[Row] = []
    path = job / "metrics.jsonl"
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            figures = json.loads(line)
            step, sampled = figures.get("step"), figures.get("endpoint_error")
        except (ValueError, AttributeError):
            continue  # a line that a crash has torn
        if not isinstance(step, int) or not first <= step <= last:
            continue
        if isinstance(sampled, dict):
            errors.append([step, *_by_steps(sampled)])
            compared = figures.get("distance"), figures.get("recall")
            if all(isinstance(values, dict) for values in compared):
                likeness.append([step, *(x for values in compared for x in _by_steps(values))])
        else:
            rows.append([_finite(figures.get(column)) for column in COLUMNS])
    return {
        "columns": COLUMNS, "rows": _thinned(rows, points), "errors": _thinned(errors, points),
        "likeness": _thinned(likeness, points),
    }  # fmt: skip


def _by_steps(values: dict[str, Any]) -> Row:
    return [_finite(values.get(steps)) for steps in SAMPLED]


def _finite(value: Any) -> float | int | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _thinned(rows: list[Row], points: int) -> list[Row]:
    """At most `points` of the rows, with the first and the last."""
    if len(rows) <= points:
        return rows
    return [rows[round(i * (len(rows) - 1) / (points - 1))] for i in range(points)]
