"""What background jobs cost the graph: the routes, the node that orders a job, prompts during one.

Measured on a real server with a thousand jobs, which are paused copies of one. The server and the
trainer have one thread each, so that neither waits for the other on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...training import disk
from ...training.jobs.store import Job, Store
from .. import commands
from ..client import Client
from ..demo import toy_subject
from ..server import Server
from ..sheet import Graph, Subject
from ..toy import assemble
from .report import Report

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
    assemble.install(server.base)
    store = Store(server.base / "user" / "__lcm_lora" / "jobs")
    report = Report("jobs")
    os.environ["OMP_NUM_THREADS"] = "1"  # the server's, and the trainer's, which inherits it
    with server:
        client, subject = server.client(), toy_subject()
        client.run(drawing(subject, 0))  # loads the models
        alone = [seconds(client.run, drawing(subject, i)) for i in range(1, PROMPTS + 1)]
        report.add("prompt of four steps", "alone", "time", "s", alone)
        client.run(distilling(subject, "finished", steps=2, seed=1))
        finished = wait_for(store, "done")
        for _ in range(chosen.jobs - 1):
            paused_copy(store, finished.id)
        routes(report, server.url, finished.id, chosen)
        try:
            beside_a_training(report, client, subject, store, chosen.jobs)
        finally:
            for job in store.jobs():
                if job.name == BESIDE:
                    store.ask(job.id, "stop")
                    wait_for(store, "paused", BESIDE)
    shutil.rmtree(local, ignore_errors=True)
    return report


def beside_a_training(
    report: Report, client: Client, subject: Subject, store: Store, jobs: int
) -> None:
    """How soon the node returns, and how long prompts take then. Leaves the job running."""
    order = distilling(subject, BESIDE, steps=STEPS_BESIDE, seed=2)
    first, *again = (seconds(client.run, order) for _ in range(PROMPTS))
    report.add("Distil LCM-LoRA, a new job", f"{jobs} jobs", "returns after", "s", [first])
    report.add("Distil LCM-LoRA, the same again", f"{jobs} jobs", "returns after", "s", again)
    report.bar("seconds until Distil LCM-LoRA returns, worst", max(first, *again), 1.0)
    running = wait_for(store, "running")
    times = [seconds(client.run, drawing(subject, 10 + i)) for i in range(PROMPTS)]
    report.add("prompt of four steps", "beside a training", "time", "s", times)
    if store.job(running.id).state != "running":
        raise SystemExit("The training stopped while the prompts ran.")


def routes(report: Report, url: str, job: str, chosen: argparse.Namespace) -> None:
    """Milliseconds of each route, one call after another."""
    worst = 0.0
    for path in ("jobs", f"jobs/{job}", f"jobs/{job}/metrics", f"jobs/{job}/log"):
        address, name = f"{url}/lcm_lora/{path}", path.replace(job, "{id}")
        times = [1000 * seconds(read, address) for _ in range(chosen.calls + 5)]
        times = sorted(times[5:])  # the first five warm up
        slow = times[math.ceil(0.99 * len(times)) - 1]
        report.add(f"GET {name}", f"{chosen.jobs} jobs", "time", "ms", times)
        report.add(f"GET {name}", f"{chosen.jobs} jobs", "99th percentile", "ms", [slow])
        worst = max(worst, slow)
    report.bar(f"ms of a route at the 99th percentile, {chosen.jobs} jobs", worst, 50)


def distilling(subject: Subject, name: str, **changes: Any) -> dict:
    """An API prompt that orders a small job."""
    graph = Graph(subject)
    source = {"source": "prompts", "source.prompts": "a photo of a bag", "source.count": 8}
    data = graph.wire("LCMDistillData", resolution=64, **source, **{"source.draw_steps": 4})
    order = {
        "checkpoint": subject.checkpoint, "data": data, "name": name, "batch": 2, "rank": 4,
        "guidance": 2.5, "lr": 1e-3, "precision": "fp32", "checkpoint_every": 1000,
        "sample_every": 0, "device": "", "overwrite": False, "style_lora": "none",
        "style_strength": 1.0, "policy": "share",
    }  # fmt: skip
    graph.add("LCMDistill", **order | changes)
    return graph.nodes


def drawing(subject: Subject, seed: int) -> dict:
    """An API prompt that draws a picture in four steps."""
    graph = Graph(subject)
    base, clip, vae = graph.checkpoint()
    (text,), empty = graph.texts(clip, subject.captions[:1])
    inputs = {"positive": text, "negative": empty, "latent": graph.latent()}
    model = graph.accelerated(base)
    graph.picture(vae, "LCMKSampler", model=model, seed=seed, steps=4, cfg=1.0, **inputs)
    return graph.nodes


def paused_copy(store: Store, job: str) -> None:
    """Adds a paused job. The store would delete all but a few hundred finished ones."""
    path = store.folder / str(uuid.uuid4())
    shutil.copytree(store.path(job), path)
    changes = {"control.json": {"action": "pause"}, "status.json": {"state": "paused"}}
    for name, change in changes.items():
        disk.replace(path / name, json.dumps(disk.read_object(path / name) | change))


def read(address: str) -> None:
    with urllib.request.urlopen(address, timeout=60) as answer:
        answer.read()


def seconds(call: Callable[..., object], *arguments: Any) -> float:
    begun = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - begun


def wait_for(store: Store, state: str, name: str = "") -> Job:
    """A job in this state, of this name if one is given."""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        for job in store.jobs():
            if job.state == state and name in ("", job.name):
                return job
        time.sleep(0.2)
    raise SystemExit(f"No job was {state} within 300 seconds.")
