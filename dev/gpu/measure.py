"""`python3 dev gpu`: measures the pack on a GPU, part by part, within a budget of seconds.

Each part runs in a process of its own and is ended when its time is over. Every row of figures is
in results.json as soon as it is measured; the parts' own output is in log.txt.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

from ...training.disk import replace
from ..environment import ROOT

log = logging.getLogger("lcm_lora")

# name: (module, share of the budget, what it measures). In this order by default.
PARTS = {
    "tests": ("tests", 85, "the project's tests on the device"),
    "server": ("server", 50, "a real server draws the shipped workflows"),
    "toy": ("toy", 135, "distillation of the demo model: quality, CPU's losses, kill and resume"),
    "sampling": ("sampling", 80, "sampling at full size, compared with ComfyUI and diffusers"),
    "distill": ("distill", 80, "a distillation step at full size, compared with the recipe"),
    "same": ("same", 25, "is a picture the same alone, in a batch and on the CPU?"),
    "merge": ("merge", 25, "LoRA arithmetic on CPU and GPU"),
    "compile": ("compiled", 60, "a step with torch.compile"),
}
LEAST = 8  # seconds that a part needs to start


def main(arguments: list[str], host: Path, local: Path) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 dev gpu", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="parts and their shares:\n" + "\n".join(
            f"  {name:<9} {share:>3}  {what}" for name, (_, share, what) in PARTS.items()
        ),
    )  # fmt: skip
    parser.add_argument(
        "--parts", default=",".join(PARTS),
        help="in the order they are to run in; NAME:SHARE changes a part's share of the budget",
    )  # fmt: skip
    parser.add_argument("--budget", type=float, default=490, help="seconds for all parts")
    parser.add_argument("--tiny", action="store_true", help="small networks, which a CPU can do")
    parser.add_argument("--out", type=Path, default=local / "gpu", help="where the results go")
    parser.add_argument("--work", type=Path, default=local / "gpu-work")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.part:
        return one(chosen, host)
    import torch

    if not (chosen.tiny or torch.cuda.is_available()):
        parser.error("PyTorch sees no GPU; --tiny tries all this on the CPU.")
    shares = {}
    for word in filter(None, chosen.parts.split(",")):
        name, _, share = word.partition(":")
        if name not in PARTS:
            parser.error(f"unknown part {name}; known: {', '.join(PARTS)}")
        shares[name] = float(share) if share else PARTS[name][1]
    for folder in (chosen.out, chosen.work):
        folder.mkdir(parents=True, exist_ok=True)
    begun, results = time.monotonic(), chosen.out / "results.json"
    summary: dict[str, Any] = {"machine": None, "parts": {}}
    names = list(shares)
    with open(chosen.out / "log.txt", "ab") as output:
        for at, name in enumerate(names):
            left = chosen.budget - (time.monotonic() - begun)
            # Time that earlier parts did not use goes to the later ones.
            seconds = left * shares[name] / sum(shares[each] for each in names[at:])
            if seconds < LEAST:
                summary["parts"][name] = {"state": f"left out, {left:.0f} s are left"}
                save(results, summary)
            else:
                follow(chosen, name, seconds, output, summary, results)
            show(name, summary["parts"][name])
    log.info("\n%.0f s in all; %s", time.monotonic() - begun, results)
    parts = summary["parts"].values()
    failed = any("FAILED" in note for part in parts for note in part.get("notes", []))
    return int(failed or any(part["state"] != "done" for part in parts))


def follow(
    chosen: argparse.Namespace, name: str, seconds: float, output: BinaryIO, summary: dict,
    results: Path,
) -> None:  # fmt: skip
    """Runs a part, and copies its report every second."""
    file = chosen.work / f"{name}.json"
    file.unlink(missing_ok=True)
    command = [
        sys.executable, str(ROOT / "dev"), "gpu", "--part", name, "--budget", f"{seconds - 3:.1f}",
        "--work", str(chosen.work), "--out", str(chosen.out), *(["--tiny"] if chosen.tiny else []),
    ]  # fmt: skip
    log.info("\n===== %s: %s (at most %.0f s)", name, PARTS[name][2], seconds)
    begun = time.monotonic()
    output.write(f"\n===== {name}\n".encode())
    output.flush()
    process = subprocess.Popen(
        command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    state, stamp = "running", 0.0
    while state == "running":
        try:
            process.wait(1)
            state = "done" if process.returncode == 0 else f"ended with {process.returncode}"
        except subprocess.TimeoutExpired:
            if time.monotonic() - begun > seconds:
                state = f"ended after its {seconds:.0f} s"
                end(process)
        now = file.stat().st_mtime if file.exists() else 0.0
        if now != stamp or state != "running":
            stamp = now
            written = json.loads(file.read_text()) if file.exists() else {}
            summary["parts"][name] = written | {"state": state, "seconds": time.monotonic() - begun}
            summary["machine"] = written.get("machine") or summary["machine"]
            save(results, summary)
    end(process)  # ends what it may have left running


def end(process: subprocess.Popen) -> None:
    """Ends a part's process and its child processes."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(5 if number == signal.SIGTERM else None)
        except subprocess.TimeoutExpired:
            continue


def save(file: Path, summary: dict) -> None:
    replace(file, json.dumps(summary, indent=1) + "\n")


def show(name: str, part: dict) -> None:
    from ..bench.report import Report

    log.info("--- %s: %s, %.0f s", name, part["state"], part.get("seconds", 0))
    rows = [row for row in part.get("rows", []) if row["metric"] != "device span"]
    log.info("%s", Report(name, rows, part.get("bars", []), {}).table())
    for note in part.get("notes", []):
        log.info("note: %s", note)


def one(chosen: argparse.Namespace, host: Path) -> int:
    """A part, in this process."""
    from .kit import Kit

    name = chosen.part
    kit = Kit(name, host, chosen.tiny, chosen.budget, chosen.work, chosen.out)
    kit.write()
    status = 1
    with kit.case(f"part {name}"):
        importlib.import_module(f".{PARTS[name][0]}", __package__).run(kit)
        status = 0
    return status
