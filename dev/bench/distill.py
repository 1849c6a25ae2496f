"""What a distillation step costs: the engine against the released recipe, step by step in turn.

Each subject is a process of its own (dev/bench/worker.py), so that its peak of memory is its own;
while one takes a step the other waits. Each is measured as its own program runs: ours keeps the
memory it frees (training/memory.py), the released script does not. That is a process's setting and
no part of the method, and it moves the ratio, so --keep-freed tells the two apart.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from .. import commands
from . import distill_quality, networks
from .report import Report
from .turns import in_turn

log = logging.getLogger("lcm_lora")
WORKER = Path(__file__).with_name("worker.py")
RANK = 64  # the released LCM-LoRAs'
KEEP = {"both": (True, True), "ours": (True, False), "neither": (False, False)}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quality", action="store_true", help="distil the toy and judge it")
    parser.add_argument("--steps", type=int, default=6, help="counted steps of each subject")
    parser.add_argument("--side", type=int, default=32, help="of the latents; 64 is 512 pixels")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--keep-freed", choices=KEEP, default="ours", help="who keeps the memory it frees"
    )
    distill_quality.options(parser)


def run(chosen: argparse.Namespace, checkpoint: Path) -> Report:
    if chosen.quality:
        return distill_quality.run(chosen, checkpoint)
    folder = commands.LOCAL / "distill-cost"
    ours, theirs = KEEP[chosen.keep_freed]
    settings = worker_settings(folder, "SD1.5", chosen.side, "fp32")
    settings |= {"keep_freed": ours, "threads": chosen.threads}
    told, start = compare(settings, chosen.steps, {"keep_freed": theirs})
    return report(told, start, f"SD1.5 {8 * chosen.side}px")


def worker_settings(folder: Path, family: str, side: int, dtype: str) -> dict:
    """What every subject is told; `folder` is for its files, and emptied."""
    import comfy

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return {
        "host": str(Path(comfy.__path__[0]).parent), "folder": str(folder), "family": family,
        "config": networks.FAMILIES[family], "side": side, "dtype": dtype, "batch": 1,
        "rank": RANK, "threads": os.cpu_count(), "keep_freed": True, "recompute": False,
        "weights": "", "bank": "",
    }  # fmt: skip


def compare(
    settings: dict, steps: int, theirs: dict | None = None
) -> tuple[dict[str, list[dict]], dict[str, int]]:
    """One warming and `steps` counted steps of each in turn, on one random network; -> what each
    step of each subject told, and the bytes that each held before its steps.

    theirs: settings of the reference's own.
    """
    folder = Path(settings["folder"])
    settings = settings | common_files(folder, settings["config"])
    reference = {
        "diffusers": networks.DIFFUSERS.get(settings["family"]), "gradient_checkpointing": True
    }  # fmt: skip
    reference = settings | reference | (theirs or {})
    workers: dict[str, Worker] = {}
    told: dict[str, list[dict]] = {"ours": [], "reference": []}
    try:
        workers["reference"] = Worker("reference", reference)  # first, for it writes the bank
        workers["ours"] = Worker("engine", settings)
        for number, name in in_turn(workers, steps):
            told[name].append(workers[name].step())
            log.info("step %d, %s: %s", number, name, told[name][-1])
    finally:
        for worker in workers.values():
            worker.close()
        shutil.rmtree(folder, ignore_errors=True)
    return told, {name: worker.start for name, worker in workers.items()}


def common_files(folder: Path, config: dict) -> dict[str, str]:
    """Writes the weights and their names in diffusers, and says where the bank is to be."""
    import comfy.utils
    import torch
    from safetensors.torch import save_file

    weights = networks.host_unet(config, "cpu").to(torch.float16).state_dict()
    save_file(weights, folder / "weights.safetensors")
    (folder / "names.json").write_text(json.dumps(comfy.utils.unet_to_diffusers(config)))
    files = {"weights": "weights.safetensors", "names": "names.json", "bank": "bank.safetensors"}
    return {kind: str(folder / name) for kind, name in files.items()}


def report(told: dict[str, list[dict]], start: dict[str, int], case: str) -> Report:
    """The first step of each warms up: of it only the loss counts."""
    found = Report("distill")
    counted = {name: steps[1:] for name, steps in told.items()}
    for name, steps in counted.items():
        found.add(case, name, "step", "s", [each["seconds"] for each in steps])
        # Where other programs run beside this one, the time that says more, with --threads 1.
        found.add(case, name, "step, all cores", "s", [each["processor_seconds"] for each in steps])
        found.add(case, name, "rate", "samples/s", [1 / each["seconds"] for each in steps])
        found.add(case, name, "peak memory", "GB", [max(each["peak"] for each in steps) / 1e9])
        found.add(case, name, "before steps", "GB", [start[name] / 1e9])
        found.add(case, name, "network calls", "a step", [each["calls"] for each in steps])
        share = [each["network_seconds"] / each["seconds"] for each in steps]
        found.add(case, name, "network's share", "", share)
    pairs = list(zip(counted["ours"], counted["reference"], strict=True))
    ratios = [b["seconds"] / a["seconds"] for a, b in pairs]
    found.add(case, "ours / reference", "rate", "", ratios)
    used = [b["processor_seconds"] / a["processor_seconds"] for a, b in pairs]
    found.add(case, "ours / reference", "rate, all cores", "", used)
    losses = list(zip(told["ours"], told["reference"], strict=True))
    apart = [abs(a["loss"] / b["loss"] - 1) for a, b in losses]
    found.add(case, "ours - reference", "loss, relative", "", apart)
    found.bar("step time, ours / reference", 1 / statistics.median(ratios), 1 / 1.5)
    peaks = [max(each["peak"] for each in counted[name]) for name in ("ours", "reference")]
    found.bar("peak memory, ours / reference", peaks[0] / peaks[1], 0.6)
    found.bar("loss, greatest relative difference", max(apart), 0.001)
    outside = [1 - each["network_seconds"] / each["seconds"] for each in counted["ours"]]
    found.bar("share of a step outside the network", statistics.median(outside), 0.1)
    return found


class Worker:
    """A subject's process."""

    def __init__(self, subject: str, settings: dict):
        told = json.dumps(settings | {"subject": subject})
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), told], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=os.environ | {"PYTORCH_ALLOC_CONF": ""},
        )  # fmt: skip
        self.name = subject
        self.start = self._answer()["memory"]

    def step(self) -> dict:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"The process of {self.name!r} ended with {self.process.wait()}.")
