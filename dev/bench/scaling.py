"""How much faster two processes distil than one: samples a second of the real program.

On the CPU each has one thread and they exchange gradients with gloo. On GPUs each has a card.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from .. import commands
from . import distill_quality
from .report import Report

STEPS = 12
LEAST = 1.8


def run(checkpoint: Path) -> Report:
    report, rates = Report("distill"), {}
    processes = 2
    on = "cpu, one thread each"
    if torch.cuda.is_available():
        processes, on = torch.cuda.device_count(), torch.cuda.get_device_name()
        if processes < 2:
            raise SystemExit("Scaling needs two GPUs; PyTorch sees one.")
    for count in (1, processes):
        rates[count] = rate(checkpoint, count)
        report.add(f"scaling, {on}", f"{count} processes", "rate", "samples/s", rates[count])
    gain = statistics.median(rates[processes]) / statistics.median(rates[1])
    report.bar(f"scaling: rate of one process / of {processes}", 1 / gain, 2 / LEAST / processes)
    return report


def rate(checkpoint: Path, processes: int) -> list[float]:
    """Samples a second of all processes together, step by step. The first steps do not count."""
    folder = commands.LOCAL / "scaling" / str(processes)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prompts = {"prompts": ["a red fox", "a blue car"], "count": 16, "draw_steps": 2}
    spec = distill_quality.settings(folder, checkpoint, prompts) | {
        "steps": STEPS, "batch": 4, "passes": 1, "log_every": 1, "warmup": 0,
    }  # fmt: skip
    file = folder / "spec.json"
    file.write_text(json.dumps(spec), encoding="utf-8")
    launcher = [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
    ]  # fmt: skip
    command = [sys.executable, *launcher, str(distill_quality.RUN), str(file)]
    status = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    if status:
        raise SystemExit(f"The distillation with {processes} processes ended with {status}.")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["samples_per_second"] for line in lines][2:]
