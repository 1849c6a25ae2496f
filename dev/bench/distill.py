"""What a training step costs: this pack compared with the released recipe, step by step in turn.

Each runs in its own process, so that the memory can be measured, and waits while the other takes a
step. Each runs as its own program does: ours keeps the memory that it frees (training/memory.py).
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

from .. import commands
from . import distill_quality, engine, networks, reference, scaling
from .report import Report
from .step import Case
from .timing import Process, Turns, take_turns

log = logging.getLogger("lcm_lora")
OURS, REFERENCE = "ours", "reference"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quality", action="store_true", help="distil the toy and judge it")
    parser.add_argument("--scaling", action="store_true", help="two processes against one")
    parser.add_argument("--steps", type=int, default=6, help="counted steps of each subject")
    parser.add_argument("--side", type=int, default=32, help="of the latents; 64 is 512 pixels")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    distill_quality.options(parser)


def run(chosen: argparse.Namespace, checkpoint: Path) -> Report:
    if chosen.quality:
        return distill_quality.run(chosen, checkpoint)
    if chosen.scaling:
        return scaling.run(checkpoint)
    case = new_case(commands.LOCAL / "distill-cost", "SD1.5", chosen.side)
    turns, start = compare(case, chosen.steps, chosen.threads)
    return report(turns, start, f"SD1.5 {8 * chosen.side}px")


def new_case(folder: Path, architecture: str, side: int) -> Case:
    """A case of float32 whose folder is new."""
    import comfy.model_management

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config, diffusers = networks.ARCHITECTURES[architecture], networks.DIFFUSERS[architecture]
    host = Path(comfy.__path__[0]).parent
    device = comfy.model_management.get_torch_device().type
    return Case(host, folder, architecture, config, side, diffusers=diffusers, device=device)


def compare(case: Case, steps: int, threads: int) -> tuple[Turns, dict[str, int]]:
    """The subjects' steps on one network, and the bytes that each used before them."""
    import comfy.utils
    import torch
    from safetensors.torch import save_file

    weights = networks.host_unet(case.config, "cpu").to(torch.float16).state_dict()
    save_file(weights, case.weights)
    case = replace(case, names=comfy.utils.unet_to_diffusers(case.config))
    subjects: dict[str, Process] = {}
    try:
        # The reference first, because it writes the bank.
        subjects[REFERENCE] = Process(reference.prepare, case, threads)
        subjects[OURS] = Process(engine.prepare, case, threads)
        turns = take_turns(subjects, steps)
    finally:
        for process in subjects.values():
            process.close()
        shutil.rmtree(case.folder, ignore_errors=True)
    return turns, {name: process.start for name, process in subjects.items()}


def report(turns: Turns, start: dict[str, int], case: str) -> Report:
    """Rows and bars. The losses of warm-up steps count too."""
    made = Report("distill")
    outside = []
    for name in (OURS, REFERENCE):
        steps = turns.counted(name)
        share = [step.result.seconds / step.seconds for step in steps]
        outside.append(1 - statistics.median(share))
        made.add(case, name, "step", "s", turns.seconds(name))
        # With --threads 1, this says more on a machine that runs other programs too.
        made.add(case, name, "step, all cores", "s", [step.cpu_seconds for step in steps])
        made.add(case, name, "rate", "samples/s", [1 / s for s in turns.seconds(name)])
        made.add(case, name, "peak memory", "GB", [turns.peak(name) / 1e9])
        made.add(case, name, "before steps", "GB", [start[name] / 1e9])
        made.add(case, name, "network calls", "a step", [step.result.calls for step in steps])
        made.add(case, name, "network's share", "", share)
    both = f"{OURS} / {REFERENCE}"
    made.add(case, both, "rate", "", turns.ratios(REFERENCE, OURS))
    made.add(case, both, "rate, all cores", "", turns.ratios(REFERENCE, OURS, "cpu_seconds"))
    pairs = zip(turns.runs[OURS], turns.runs[REFERENCE], strict=True)
    apart = [abs(one.result.loss / other.result.loss - 1) for one, other in pairs]
    made.add(case, f"{OURS} - {REFERENCE}", "loss, relative", "", apart)
    rate = statistics.median(turns.ratios(REFERENCE, OURS))
    made.bar(f"step time, {both}", 1 / rate, 1 / 1.5)
    made.bar(f"peak memory, {both}", turns.peak(OURS) / turns.peak(REFERENCE), 0.6)
    made.bar("loss, greatest relative difference", max(apart), 0.001)
    made.bar("share of a step outside the network", outside[0], 0.1)
    return made
