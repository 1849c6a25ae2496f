"""The demo model end to end, by the real program: killed and resumed, compared with the CPU, and
distilled from prompts and judged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from ...lora.formats import files
from ..bench import distill_quality, quality, subjects
from ..toy import assemble, world
from .kit import Kit

RUN = distill_quality.RUN


def run(kit: Kit) -> None:
    count = 4 if kit.tiny else 600
    captions = [spec.caption for spec in world.specs(count, torch.Generator().manual_seed(71))]
    data = {"prompts": captions, "count": count, "draw_steps": 2 if kit.tiny else 20}
    settings = distill_quality.settings(kit.work, assemble.checkpoint(), data)
    settings |= {"host_flags": [] if kit.cuda else ["--cpu"], "precision": "auto"}
    if kit.tiny:
        settings |= {"batch": 1, "rank": 4, "resolution": 64}
    few = {"prompts": captions[:16], "count": len(captions[:16]), "draw_steps": 2}
    short = settings | {"log_every": 1, "warmup": 0, "batch": 1 if kit.tiny else 8, "data": few}
    with kit.case("killed and resumed", 20) as go:
        if go:
            killed(kit, short)
    with kit.case("losses as the CPU's", 25) as go:
        if go and kit.cuda:
            losses(kit, short)
    with kit.case("distilled", 60) as go:
        if go:
            distilled(kit, settings)


class Job:
    """A job's folder and its process."""

    def __init__(self, kit: Kit, name: str, settings: dict, **environment: str) -> None:
        self.folder = kit.work / name
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "tmp").mkdir(parents=True)
        self.output = self.folder / "lcm.safetensors"
        # Jobs of one folder for temporary files take turns on a device; these need not.
        self.environment = os.environ | {"TMPDIR": str(self.folder / "tmp")} | environment
        settings = settings | {"output": str(self.output)}
        (self.folder / "spec.json").write_text(json.dumps(settings), encoding="utf-8")
        self.start()

    def start(self) -> None:
        with open(self.folder / "log.txt", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(RUN), str(self.folder / "spec.json")], stdout=log,
                stderr=subprocess.STDOUT, env=self.environment,
            )  # fmt: skip

    def metrics(self) -> list[dict]:
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.metrics() if "loss" in line]

    def wait_for_step(self, step: int, kit: Kit) -> None:
        while not any(line.get("step", 0) >= step for line in self.metrics()):
            if self.process.poll() is not None or kit.left() < 3:
                return
            time.sleep(0.01)

    def finish(self, kit: Kit) -> Job:
        """Waits for the end. Raises RuntimeError if it is not a good one."""
        try:
            status = self.process.wait(max(1, kit.left() - 2))
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = "ended, because no time is left"
        text = (self.folder / "log.txt").read_text(errors="replace")
        if status:
            raise RuntimeError(f"{self.folder.name}: {status}: {text[-2000:]}")
        return self


def killed(kit: Kit, settings: dict) -> None:
    """Does a killed and resumed job write the same file as an uninterrupted one, byte for byte? And
    does a job that simply runs twice?"""
    steps = 4 if kit.tiny else 40
    settings = settings | {"steps": steps, "checkpoint_every": max(1, steps // 3), "seed": 3}
    whole = Job(kit, "whole", settings)
    whole.wait_for_step(1, kit)  # it has drawn the latents
    torn = Job(kit, "torn", settings)
    again = Job(kit, "again", settings) if kit.cuda else None
    torn.wait_for_step(steps // 2, kit)
    torn.process.send_signal(signal.SIGKILL)
    torn.process.wait()
    kit.note(f"killed at step {max(line.get('step', 0) for line in torn.metrics())} of {steps}")
    begun = time.monotonic()
    torn.start()
    pairs = {"resumed - unbroken": torn} | ({"run twice": again} if again else {})
    whole.finish(kit)
    for name, job in pairs.items():
        one, other = (load_file(each.output) for each in (whole, job.finish(kit)))
        apart = max(float((one[key].float() - other[key].float()).abs().max()) for key in one)
        kit.add("toy, killed", name, "largest difference of a factor", "", apart)
        same = whole.output.read_bytes() == job.output.read_bytes()
        kit.bar(f"{name}: bytes that differ", 0 if same else 1, 0)
    kit.add("toy, killed", "engine", "time until all were done", "s", time.monotonic() - begun)


def losses(kit: Kit, settings: dict) -> None:
    """The first losses on one bank: the device in float32 and as it likes, and the CPU."""
    settings = settings | {"steps": 8, "seed": 2, "precision": "fp32"}
    cpu = {"CUDA_VISIBLE_DEVICES": ""}
    # The bank's key has the precision and not the device, so the CPU reads what the device drew.
    jobs = {"device fp32": Job(kit, "device-fp32", settings).finish(kit)}
    jobs["CPU fp32"] = Job(kit, "cpu-fp32", settings | {"host_flags": ["--cpu"]}, **cpu)
    jobs["device auto"] = Job(kit, "device-auto", settings | {"precision": "auto"})
    losses_of = {name: job.finish(kit).losses() for name, job in jobs.items()}
    for name, values in losses_of.items():
        kit.add("toy, first losses", name, "loss", "", values)
    pairs = zip(losses_of["device fp32"], losses_of["CPU fp32"], strict=True)
    apart = [abs(a / b - 1) for a, b in pairs]
    kit.add("toy, first losses", "device fp32 - CPU", "relative difference", "", apart)
    kit.bar("losses, device fp32 / CPU fp32, first step", apart[0], 1e-4)
    kit.bar("losses, device fp32 / CPU fp32, at most", max(apart), 1e-2)


def distilled(kit: Kit, settings: dict) -> None:
    """From prompts alone, in the device's own precision."""
    steps = 4 if kit.tiny else settings["steps"]
    settings = settings | {"steps": steps, "sample_every": steps, "seed": 1}
    settings |= {"log_every": 1, "warmup": 0} if kit.tiny else {}
    begun = time.monotonic()
    job = Job(kit, "distilled", settings).finish(kit)
    case = f"toy, {steps} steps of {settings['batch']}"
    kit.add(case, "engine", "whole time", "s", time.monotonic() - begun)
    lines = [line for line in job.metrics() if "loss" in line]
    kit.add(case, "engine", "rate", "samples/s", [line["samples_per_second"] for line in lines])
    kit.add(case, "engine", "loss", "", job.losses())
    kit.add(case, "engine", "peak memory", "GB", lines[-1]["memory"] / 1e9)
    for line in job.metrics():
        for count, error in line.get("endpoint_error", {}).items():
            kit.add(case, "engine", f"endpoint error at {count} steps", "", error)
    if sheets := sorted((job.folder / "samples").glob("*.png")):
        shutil.copy(sheets[-1], kit.out / "toy-samples.png")
    if not kit.tiny:  # the teacher's 50 steps take minutes on a CPU
        judged(kit, job.output)


def judged(kit: Kit, lora: Path) -> None:
    """The new LoRA beside the shipped one, the base and the teacher."""
    dtype = torch.bfloat16 if kit.cuda else torch.float32
    toy = subjects.Toy.load(assemble.checkpoint(), dtype)
    columns = subjects.columns(toy)
    columns = {name: columns[name] for name in ("base, LCM sampler", "LCM-LoRA")}
    columns["distilled here"] = subjects.accelerated(toy, files.read(lora))
    pictures, steps = (quality.LEAST, (4,)) if kit.tiny else (500, (1, 4))
    kept = quality.Kept(kit.work / "judged", f"{dtype} {kit.device} {lora.stat().st_mtime}")
    figures = quality.measure(toy, columns, steps, pictures, 1, kept)
    for (case, name, metric), values in figures.items():
        kit.add(f"toy, {pictures} pictures, {case}", name, metric, "", values)
    quality.lcm_bars(kit.report, figures, {n: distill_quality.WORST[n] for n in steps},
                     "distilled here")  # fmt: skip
    kit.write()
