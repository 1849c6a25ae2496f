"""What every benchmark prints and writes: rows of figures, and bars that limit them."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    return {
        "system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }  # fmt: skip


@dataclass
class Report:
    """rows: case, subject, metric, unit, median, min, max, mean, deviation, n; bars: limits."""

    bench: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    bars: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=machine)

    def add(self, case: str, subject: str, metric: str, unit: str, values: list[float]) -> None:
        """Adds a row."""
        self.rows.append({
            "case": case, "subject": subject, "metric": metric, "unit": unit,
            "median": statistics.median(values), "min": min(values), "max": max(values),
            "mean": statistics.fmean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None, "n": len(values),
        })  # fmt: skip

    def bar(self, name: str, value: float, limit: float) -> None:
        """Adds a bar. It holds when value <= limit."""
        self.bars.append({"name": name, "value": value, "limit": limit, "holds": value <= limit})

    def table(self) -> str:
        cells = [("case", "subject", "metric", "median", "min", "max", "n")]
        for row in self.rows:
            words = row["case"], row["subject"], f"{row['metric']} {row['unit']}"
            figures = (f"{row[name]:.4g}" for name in ("median", "min", "max"))
            cells.append((*words, *figures, str(row["n"])))
        widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
        lines = [
            "".join(map(str.ljust, line[:3], widths))
            + "".join(map(str.rjust, line[3:], widths[3:]))
            for line in cells
        ]
        for bar in self.bars:
            verdict = "holds" if bar["holds"] else "DOES NOT HOLD"
            value = f"{bar['value']:.4g}, at most {bar['limit']:.4g}"
            lines.append(f"{bar['name']}: {value}: {verdict}")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def chosen_parts(text: str, parts: Sequence[str]) -> list[str]:
    """The parts that the option --parts names, with commas. Ends the program for an unknown one."""
    wanted = text.split(",")
    if unknown := sorted(set(wanted) - set(parts)):
        raise SystemExit(f"--parts: unknown {', '.join(unknown)}; expected {', '.join(parts)}.")
    return wanted
