"""Compare Settings against its bare pictures, and against a prompt of the server for each cell.

For the bare pictures, LCM KSampler and VAE Decode run once for each cell, on one MODEL that already
has its weights: nothing is loaded or merged in between.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...lora.delta import Vector
from ...lora.formats import files
from ...lora.formats.wire import to_wire
from ...lora.host import apply
from ...nodes.compare.node import LCMCompare
from ...nodes.sampling import LCMKSampler
from ...samplers.host import patch_sampling
from ..client import Client
from ..commands import LOCAL
from ..server import Server
from ..sheet import Graph, Subject, Wire
from ..toy import assemble
from .report import Report
from .subjects import LATENT, Toy
from .timing import Taken, take_turns, timed

NODE, BARE, MERGED = "Compare Settings", "bare pictures", "merged one by one"
ALONE, TOGETHER = "a prompt a cell", "one prompt"
PROMPT = "a photo of a fox on a teal background"
Axis = tuple[str, tuple[float, ...]]
Cell = dict[str, float]
WEIGHTS: tuple[Axis, Axis] = (
    ("weight_1", (0.6, 0.8, 1.0, 1.2, 1.4)), ("weight_2", (0.0, 0.3, 0.6, 0.9, 1.2)),
)  # fmt: skip
NUMBERS: tuple[Axis, Axis] = ("steps", (1, 2, 3, 4, 5)), ("cfg", (1.0, 1.2, 1.4, 1.6, 1.8))
GRIDS = {"5 x 5 of weights": (WEIGHTS, 1.1), "5 x 5 of steps and cfg": (NUMBERS, 1.02)}


def add(report: Report, runs: int, checkpoint: Path, host: Path) -> None:
    """Adds both grids to a report. runs: counted ones of each subject."""
    toy = Toy.load(checkpoint)
    vectors = [
        files.read_named(path, path.name)
        for path in map(assemble.lora, (assemble.LCM_LORA, assemble.STICKER_LORA))
    ]
    texts = toy.encode(PROMPT), toy.encode("")
    server = Server(host, LOCAL / "bench")
    assemble.install(server.base)
    with server:
        for case, (axes, limit) in GRIDS.items():
            ways: dict[str, Callable[[], object]] = {
                NODE: partial(by_node, toy, vectors, texts, axes),
                BARE: partial(one_by_one, toy, vectors, texts, cells(axes), False),
            }
            if axes is WEIGHTS:
                ways[MERGED] = partial(one_by_one, toy, vectors, texts, cells(axes), True)
            compared(report, case, ways, runs, (NODE, BARE, limit))
            client, seeds = server.client(), itertools.count(1)
            queued: dict[str, Callable[[], object]] = {
                TOGETHER: lambda client=client, axes=axes, seeds=seeds: client.run(
                    by_prompt(axes, next(seeds))
                ),
                ALONE: lambda client=client, axes=axes, seeds=seeds: queue_all(
                    client, cells(axes), next(seeds)
                ),
            }
            compared(report, f"{case}, server", queued, runs, (TOGETHER, ALONE, 1.0))


def cells(axes: tuple[Axis, Axis]) -> list[Cell]:
    (across, xs), (down, ys) = axes
    return [{across: x, down: y} for y in ys for x in xs]


def compared(
    report: Report, case: str, ways: dict[str, Callable[[], object]], runs: int,
    bar: tuple[str, str, float],
) -> None:  # fmt: skip
    one, other, limit = bar

    def untimed_result(way: Callable[[], object]) -> Taken:
        return timed(lambda: way() and None)

    turns = take_turns({name: partial(untimed_result, way) for name, way in ways.items()}, runs)
    for name in ways:
        report.add(case, name, "wall", "s", turns.seconds(name))
        report.add(case, name, "cores", "s", [run.cpu_seconds for run in turns.counted(name)])
    for name in ways:
        if name != other:
            report.add(case, f"{name} / {other}", "wall", "", turns.ratios(name, other))
            ratios = turns.ratios(name, other, "cpu_seconds")
            report.add(case, f"{name} / {other}", "cores", "", ratios)
    report.bar(f"{case}: time, {one} / {other}", turns.ratio(one, other), limit)


def axis(name: str, given: Axis) -> dict[str, Any]:
    """The inputs of columns or rows."""
    setting, values = given
    kind, _, vector = setting.partition("_")
    inputs = {name: kind, "values": ", ".join(map(str, values))}
    return inputs | ({"vector": int(vector)} if vector else {})


@torch.inference_mode()
def by_node(
    toy: Toy, vectors: list[Vector], texts: tuple[list, list], axes: tuple[Axis, Axis]
) -> None:  # fmt: skip
    one, two = map(to_wire, vectors)
    count = {"count": "2", "vector_1": one, "weight_1": 1.0, "vector_2": two, "weight_2": 0.8}
    LCMCompare.execute(
        toy.base, toy.vae, {"samples": torch.zeros(1, *LATENT)}, count, axis("columns", axes[0]),
        axis("rows", axes[1]), 7, 4, 1.0, 1.0, positive=texts[0], negative=texts[1],
    )  # fmt: skip


@torch.inference_mode()
def one_by_one(
    toy: Toy, vectors: list[Vector], texts: tuple[list, list], every: list[Cell], merge: bool
) -> None:  # fmt: skip
    """merge: the weights of each cell into the MODEL, instead of the same weights for all."""
    model = merged(toy, vectors, 1.0, 0.8)
    for cell in every:
        if merge:
            model = merged(toy, vectors, cell["weight_1"], cell["weight_2"])
        latent = {"samples": torch.zeros(1, *LATENT)}
        steps, cfg = int(cell.get("steps", 4)), cell.get("cfg", 1.0)
        output = LCMKSampler.execute(model, 7, steps, cfg, *texts, latent, 1.0)
        toy.vae.decode(output.result[0]["samples"])


def merged(toy: Toy, vectors: list[Vector], *weights: float) -> ModelPatcher:
    model = toy.base
    for vector, weight in zip(vectors, weights, strict=True):
        model = apply(model, None, vector, weight, 0.0)[0]
    return patch_sampling(model)


def graph_of(seed: int) -> tuple[Graph, Wire, dict[str, Wire], tuple[Wire, Wire]]:
    """A graph up to its vectors: (graph, VAE, what every sampler takes, vectors)."""
    names = assemble.checkpoint().name, assemble.LCM_LORA, assemble.STICKER_LORA
    graph = Graph(Subject(*names, (PROMPT,), guidance=1.0, size=8 * LATENT[-1], seed=seed))
    model, clip, vae = graph.checkpoint()
    (text,), empty = graph.texts(clip, (PROMPT,))
    common = {"positive": text, "negative": empty, "latent": graph.latent(), "model": model}
    return graph, vae, common, graph.vectors()


def by_prompt(axes: tuple[Axis, Axis], seed: int) -> dict[str, dict]:
    """A prompt with Compare Settings."""
    graph, vae, common, vectors = graph_of(seed)
    count = {"count": "2", "count.weight_1": 1.0, "count.weight_2": 0.8}
    count |= {f"count.vector_{number}": wire for number, wire in enumerate(vectors, 1)}
    nested = {
        name if name == key else f"{name}.{key}": value
        for name, given in zip(("columns", "rows"), axes, strict=True)
        for key, value in axis(name, given).items()
    }
    numbers = {"seed": seed, "steps": 4, "cfg": 1.0, "denoise": 1.0}
    graph.add("LCMCompare", vae=vae, **common, **count, **nested, **numbers)
    return graph.nodes


def queue_all(client: Client, every: list[Cell], seed: int) -> None:
    """A prompt for each cell, all queued at once; returns when the last one has run."""
    *before, last = (alone(cell, seed) for cell in every)
    for prompt in before:
        client.post("/prompt", {"prompt": prompt, "client_id": client.id})
    client.run(last)
    while client.get("/queue")["queue_running"]:
        time.sleep(0.05)


def alone(cell: Cell, seed: int) -> dict[str, dict]:
    """A prompt for one cell."""
    graph, vae, common, vectors = graph_of(seed)
    model = common.pop("model")
    for number, wire in enumerate(vectors, 1):
        weight = cell.get(f"weight_{number}", (1.0, 0.8)[number - 1])
        strengths = {"strength_model": weight, "strength_clip": 1.0}
        model = graph.wire("LCMLoRAApply", model=model, vector=wire, **strengths)
    numbers = {"seed": seed, "steps": int(cell.get("steps", 4)), "cfg": cell.get("cfg", 1.0)}
    sampled = graph.wire("LCMKSampler", model=model, denoise=1.0, **common, **numbers)
    graph.add("PreviewImage", images=graph.wire("VAEDecode", samples=sampled, vae=vae))
    return graph.nodes
