"""What every benchmark prints and writes: rows of figures, and bars they are held against."""

from __future__ import annotations

import json
import os
import platform
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch


@dataclass
class Report:
    """rows: case, subject, metric, unit, median, min, max, mean, deviation, n; bars: limits."""

    bench: str
    rows: list[dict] = field(default_factory=list)
    bars: list[dict] = field(default_factory=list)
    machine: dict = field(default_factory=lambda: machine())

    def add(self, case: str, subject: str, metric: str, unit: str, values: list[float]) -> None:
        """Adds a row."""
        self.rows.append({
            "case": case, "subject": subject, "metric": metric, "unit": unit,
            "median": statistics.median(values), "min": min(values), "max": max(values),
            "mean": statistics.fmean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None, "n": len(values),
        })  # fmt: skip

    def bar(self, name: str, value: float, limit: float) -> None:
        """Holds when value <= limit."""
        self.bars.append({"name": name, "value": value, "limit": limit, "holds": value <= limit})

    def table(self) -> str:
        words = [("case", "subject", "metric")]
        words += [
            (row["case"], row["subject"], f"{row['metric']} {row['unit']}") for row in self.rows
        ]
        widths = [max(len(each[column]) for each in words) + 2 for column in range(3)]
        figures = [f"{'median':>10}{'min':>10}{'max':>10}  n"]
        figures += [
            f"{row['median']:>10.4g}{row['min']:>10.4g}{row['max']:>10.4g}  {row['n']}"
            for row in self.rows
        ]
        lines = [
            "".join(map(str.ljust, each, widths)) + figure
            for each, figure in zip(words, figures, strict=True)
        ]
        for bar in self.bars:
            verdict = "holds" if bar["holds"] else "DOES NOT HOLD"
            held = f"{bar['value']:.4g}, at most {bar['limit']:.4g}"
            lines.append(f"{bar['name']}: {held}: {verdict}")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def machine() -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "gpu": gpu,
        "python": platform.python_version(), "torch": torch.__version__,
    }  # fmt: skip
