"""What background jobs cost the graph: routes with a thousand jobs, the node, prompts beside one.

Through a real server. The thousand are paused copies of a job. The server and the trainer have one
thread each, so that on two cores neither waits for the other.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import time
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

from ...training import disk
from ...training.jobs.store import Store
from .. import commands
from ..client import Client
from ..demo import toy_subject
from ..server import Server, install
from ..toy import assemble
from .report import Report

log = logging.getLogger("lcm_lora")
PROMPTS = 5
BESIDE, STEPS_BESIDE = "beside", 100_000  # the LoRA's name; steps that are never reached


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--calls", type=int, default=300, help="of each route")


def run(chosen: argparse.Namespace, checkpoint: Path) -> Report:
    import comfy

    local = commands.LOCAL / "jobs-bench"
    shutil.rmtree(local, ignore_errors=True)
    server = Server(Path(comfy.__path__[0]).parent, local)
    install(checkpoint, server.base / "models" / "checkpoints")
    install(assemble.LCM_LORA, server.base / "models" / "loras")
    store = Store(server.base / "user" / "__lcm_lora" / "jobs")
    report = Report("jobs")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the server, and of the trainer, which inherits it
    with server:
        client, subject = server.client(), toy_subject(checkpoint)
        client.run(drawing(subject, 0))  # loads the models
        alone = [_timed(lambda i=i: client.run(drawing(subject, i))) for i in range(1, PROMPTS + 1)]
        report.add("prompt of four steps", "alone", "time", "s", alone)
        client.run(distilling(subject, "finished", steps=2, seed=1))
        finished = _until(lambda: next((j for j in store.jobs() if j.state == "done"), None))
        for _ in range(chosen.jobs - 1):
            _copied(store, finished.id)
        _routes(report, server.url, finished.id, chosen)
        try:
            _beside_a_training(report, client, subject, store, chosen.jobs)
        finally:
            for job in store.jobs():
                if job.name == BESIDE:
                    store.ask(job.id, "stop")
                    _until(lambda job=job: store.job(job.id).state == "paused")
    shutil.rmtree(local, ignore_errors=True)
    return report


def _beside_a_training(report: Report, client: Client, subject, store: Store, jobs: int) -> None:
    """How soon the node returns, and how long prompts take then. Leaves the job training."""
    order = distilling(subject, BESIDE, steps=STEPS_BESIDE, seed=2)
    first, *again = (_timed(lambda: client.run(order)) for _ in range(PROMPTS))
    report.add("Distill LCM-LoRA, a new job", f"{jobs} jobs", "returns after", "s", [first])
    report.add("Distill LCM-LoRA, the same again", f"{jobs} jobs", "returns after", "s", again)
    report.bar("seconds until Distill LCM-LoRA returns, worst", max(first, *again), 1.0)
    beside = _until(lambda: next((j for j in store.jobs() if j.state == "running"), None))
    took = [_timed(lambda i=i: client.run(drawing(subject, 10 + i))) for i in range(PROMPTS)]
    report.add("prompt of four steps", "beside a training", "time", "s", took)
    if store.job(beside.id).state != "running":
        raise SystemExit("the training did not go on beside the prompts")


def _routes(report: Report, url: str, job: str, chosen: argparse.Namespace) -> None:
    """Milliseconds of each route, one call after another, as pages make them."""
    worst = 0.0
    for path in ("jobs", f"jobs/{job}", f"jobs/{job}/metrics", f"jobs/{job}/log"):
        took = [1000 * _timed(lambda path=path: _read(f"{url}/lcm_lora/{path}"))
                for _ in range(chosen.calls + 5)][5:]  # fmt: skip
        took.sort()
        at = took[math.ceil(0.99 * len(took)) - 1]
        name = path.replace(job, "{id}")
        report.add(f"GET {name}", f"{chosen.jobs} jobs", "time", "ms", took)
        report.add(f"GET {name}", f"{chosen.jobs} jobs", "99th percentile", "ms", [at])
        worst = max(worst, at)
    report.bar(f"ms of a route at the 99th percentile, {chosen.jobs} jobs", worst, 50)


def distilling(subject, name: str, **changes) -> dict:
    """An API prompt that orders a small job."""
    source = {"source": "prompts", "source.prompts": "a photo of a bag", "source.count": 8}
    source |= {"source.draw_steps": 4, "resolution": 64}
    order = {
        "checkpoint": subject.checkpoint, "data": ["1", 0], "name": name, "batch": 2, "rank": 4,
        "guidance": 2.5, "lr": 1e-3, "precision": "fp32", "checkpoint_every": 1000,
        "sample_every": 0, "device": "", "overwrite": False, "style_lora": "none",
        "style_strength": 1.0, "policy": "share",
    }  # fmt: skip
    return {
        "1": {"class_type": "LCMDistillData", "inputs": source},
        "2": {"class_type": "LCMDistill", "inputs": order | changes},
    }


def drawing(subject, seed: int) -> dict:
    """An API prompt that draws a picture in four steps."""
    nodes = {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": subject.checkpoint}),
        "2": ("LCMLoRALoader", {
            "model": ["1", 0], "lora_name": subject.lcm_lora, "strength": 1.0, "family": "auto",
        }),
        "3": ("CLIPTextEncode", {"clip": ["1", 1], "text": subject.captions[0]}),
        "4": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "5": ("LCMKSampler", {
            "model": ["2", 0], "seed": seed, "steps": 4, "cfg": 1.0, "positive": ["3", 0],
            "negative": ["3", 0], "latent": ["4", 0], "denoise": 1.0,
        }),
        "6": ("VAEDecode", {"samples": ["5", 0], "vae": ["1", 2]}),
        "7": ("SaveImage", {"images": ["6", 0], "filename_prefix": "drawn"}),
    }  # fmt: skip
    return {key: {"class_type": kind, "inputs": given} for key, (kind, given) in nodes.items()}


def _copied(store: Store, job: str) -> None:
    """A paused job beside `job`: of ended ones only the newest few hundred stay."""
    path = store.folder / str(uuid.uuid4())
    shutil.copytree(store.path(job), path)
    for name, told in (("control.json", {"action": "pause"}), ("status.json", {"state": "paused"})):
        disk.replace(path / name, json.dumps(disk.read_object(path / name) | told))


def _read(address: str) -> None:
    with urllib.request.urlopen(address, timeout=60) as answer:
        answer.read()


def _timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _until(check: Callable[[], object], seconds: float = 300):
    until = time.monotonic() + seconds
    while not (found := check()):
        if time.monotonic() > until:
            raise SystemExit("waited too long for a job")
        time.sleep(0.2)
    return found
