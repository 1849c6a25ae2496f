"""Training steps on a network of full size with random weights: do they fit here?

The network has the shapes of the real architecture, and the latents have its resolution. Only the
values are random, so the seconds and the memory are real.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import comfy.model_management as management

from .. import commands
from . import distill, engine, networks
from .report import Report
from .step import Case
from .timing import Process, Taken

log = logging.getLogger("lcm_lora")
SIDES = {"SD1.5": 64, "SSD-1B": 128, "SDXL": 128}
BYTES = {"fp32": 4, "bf16": 2}
LORA_BYTES = 16  # a parameter, its gradient and AdamW's two moments, float32


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--architecture", choices=SIDES, help="default: each that fits")
    parser.add_argument("--precision", choices=BYTES, default="bf16")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument(
        "--dmd", action="store_true",
        help="also of distribution matching: a step of matching, and its lcm step, in turn",
    )  # fmt: skip


def run(chosen: argparse.Namespace, _checkpoint: Path) -> Report:
    report = Report("fullsize")
    for name in [chosen.architecture] if chosen.architecture else SIDES:
        side, title = SIDES[name], f"{name} {8 * SIDES[name]}px {chosen.precision}"
        case = distill.new_case(commands.LOCAL / "fullsize", name, side)
        case = replace(case, dtype=chosen.precision, recompute=side > 64)
        peak = measured(report, title, case, chosen.steps)
        if chosen.dmd and peak:
            both = measured(report, title, replace(case, objective="dmd"), 2 * chosen.steps)
            report.bar(f"{name}: peak memory, dmd / lcm", both / peak, 1.25)
    return report


def measured(report: Report, title: str, case: Case, count: int) -> int:
    """Adds the rows of `count` steps; -> their peak memory in bytes, 0 if they do not fit."""
    add = partial(report.add, title, f"engine, {case.objective}")
    needed, free = weights_and_lora(case) / 1e9, management.get_free_memory() / 1e9
    add("network, LoRA, AdamW", "GB", [needed])
    if needed > 0.9 * free:
        log.info("%s: left out, it needs %.1f GB and %.1f GB are free", title, needed, free)
        return 0
    taken = steps(case, count)
    losses, peak = [step.result.loss for step in taken], max(step.peak for step in taken)
    add("step", "s", [step.seconds for step in taken])
    add("peak memory", "GB", [peak / 1e9])
    add("loss", "", losses)
    odd = sum(not math.isfinite(loss) for loss in losses)
    report.bar(f"{title}, {case.objective}: losses that are not finite", odd, 0)
    return peak


def weights_and_lora(case: Case) -> int:
    """Bytes that a job needs in addition to the activations."""
    from ...training.adapter import Adapter

    network = networks.host_unet(case.config, "meta")
    frozen = sum(p.numel() for p in network.parameters()) * BYTES[case.dtype]
    trained = sum(p.numel() for p in Adapter(network, case.rank).parameters())
    return frozen + LORA_BYTES * trained * (2 if case.objective == "dmd" else 1)


def steps(case: Case, count: int) -> list[Taken]:
    process = Process(engine.prepare, case, os.cpu_count())
    try:
        return [process() for _ in range(count)]
    finally:
        process.close()
        shutil.rmtree(case.folder, ignore_errors=True)
