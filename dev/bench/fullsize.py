"""One training step of the engine on a network of full size with random weights: does it fit here?

The network has the real family's shape, the latents those of its own resolution, and the LoRA rank
64; only the values are random, so the seconds and the memory are those of the real thing.
"""

from __future__ import annotations

import argparse
import logging
import math
import shutil
from pathlib import Path

import psutil

from .. import commands
from . import distill, networks
from .report import Report

log = logging.getLogger("lcm_lora")
SIDES = {"SD1.5": 64, "SSD-1B": 128, "SDXL": 128}
BYTES = {"fp32": 4, "bf16": 2}
LORA_BYTES = 16  # a parameter, its gradient and AdamW's two moments, float32


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--family", choices=SIDES, help="default: each that fits")
    parser.add_argument("--precision", choices=BYTES, default="bf16")
    parser.add_argument("--steps", type=int, default=1)


def run(chosen: argparse.Namespace, _checkpoint: Path) -> Report:
    report = Report("fullsize")
    for family in [chosen.family] if chosen.family else SIDES:
        needed, free = weights_and_lora(family, chosen.precision), psutil.virtual_memory().available
        case = f"{family} {8 * SIDES[family]}px {chosen.precision}"
        report.add(case, "engine", "network, LoRA, AdamW", "GB", [needed / 1e9])
        if needed > 0.9 * free:
            log.info(
                "%s: left out, it needs %.1f GB and %.1f are free", case, needed / 1e9, free / 1e9
            )
            continue
        told = steps(family, chosen.precision, chosen.steps)
        report.add(case, "engine", "step", "s", [each["seconds"] for each in told])
        report.add(case, "engine", "peak memory", "GB", [max(each["peak"] for each in told) / 1e9])
        report.add(case, "engine", "loss", "", [each["loss"] for each in told])
        odd = sum(not math.isfinite(each["loss"]) for each in told)
        report.bar(f"{family}: losses that are not finite", odd, 0)
    return report


def weights_and_lora(family: str, precision: str) -> int:
    """Bytes of what a job holds beside the activations."""
    from ...training.adapter import Adapter

    network = networks.host_unet(networks.FAMILIES[family], "meta")
    frozen = sum(p.numel() for p in network.parameters()) * BYTES[precision]
    trained = sum(p.numel() for p in Adapter(network, distill.RANK).parameters())
    return frozen + LORA_BYTES * trained


def steps(family: str, precision: str, count: int) -> list[dict]:
    """What the worker tells of each step. Blocks are recomputed where latents are large."""
    folder = commands.LOCAL / "fullsize"
    settings = distill.worker_settings(folder, family, SIDES[family], precision)
    settings["recompute"] = SIDES[family] > 64
    worker = distill.Worker("engine", settings)
    try:
        return [worker.step() for _ in range(count)]
    finally:
        worker.close()
        shutil.rmtree(folder, ignore_errors=True)
