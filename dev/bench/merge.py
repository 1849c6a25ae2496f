"""LoRA arithmetic on the real layers of SD1.5 and SDXL, against peft and the least there is to do.

Exact sums of two whole files, and reductions to rank 64 of the same layers that peft reduces, one
layer of each shape; beside them the plain way, which forms the changes and decomposes them whole.
Factors are random with singular values that fall off as k^-0.7.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...lora.combine import exact
from ...lora.delta import Delta, Vector
from ...lora.formats import files
from ...lora.reduce import truncated
from ...training.adapter import Adapter
from .. import commands
from . import networks
from .distill import Worker
from .report import Report
from .turns import in_turn

log = logging.getLogger("lcm_lora")
RANKS, WEIGHTS, REDUCED = (64, 32), (1.0, 0.8), 64
FALL = 0.7
PADDED = "padded"
WAYS = {
    "ours": "this pack",
    "safely": "reading, and writing to the disk",
    "plainly": "reading, and writing without waiting for the disk",
}
MINUTES = {"peft, svd", "peft, ties_svd"}  # run once, for what warms up is nothing beside that


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each subject")


def run(chosen: argparse.Namespace, checkpoint: Path) -> Report:
    report = Report("merge")
    for family in ("SD1.5", "SDXL"):
        shapes = layers(family)
        whole_files(report, family, shapes, chosen.runs)
        few = {str(shape): shape for shape in shapes.values()}
        reductions(report, f"{family}, {len(few)} layers", few, chosen.runs)
    return report


def layers(family: str) -> dict[str, tuple[int, ...]]:
    """Every layer that an LCM-LoRA has, by the host's name, with its weight's shape."""
    network = networks.host_unet(networks.FAMILIES[family], "meta")
    names = Adapter(network, 1, 1.0).names
    weights = {name.removesuffix(".weight"): p.shape for name, p in network.named_parameters()}
    return {name: tuple(weights[name]) for name in names}


def factors(shape: tuple[int, ...], rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    out, columns, *kernel = shape
    fall = torch.arange(1, rank + 1) ** -FALL
    up = torch.randn(out, rank, generator=generator) * fall * out**-0.5
    down = torch.randn(rank, columns, *kernel, generator=generator) * columns**-0.5
    return up.reshape(*up.shape, *[1] * len(kernel)), down


def whole_files(
    report: Report, family: str, shapes: dict[str, tuple[int, ...]], runs: int
) -> None:  # fmt: skip
    """Time, memory and error of an exact sum, each subject in a process of its own."""
    folder = commands.LOCAL / "merge"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    paths = [folder / f"rank-{rank}.safetensors" for rank in RANKS]
    for path, rank in zip(paths, RANKS, strict=True):
        tensors = {}
        for name, shape in shapes.items():
            up, down = factors(shape, rank, generator)
            module = f"diffusion_model.{name}"
            tensors[f"{module}.lora_up.weight"] = up.half()
            tensors[f"{module}.lora_down.weight"] = down.half()
            tensors[f"{module}.alpha"] = torch.tensor(float(rank))
        save_file(tensors, path)
    settings = {
        "one": str(paths[0]), "other": str(paths[1]), "weights": WEIGHTS, "keep_freed": False,
        "threads": os.cpu_count(),
    }  # fmt: skip
    outputs = {how: folder / f"{how}.safetensors" for how in WAYS}
    workers = {
        how: Worker("merging", settings | {"how": how, "output": str(path)})
        for how, path in outputs.items()
    }
    told: dict[str, list[dict]] = {how: [] for how in workers}
    for _, how in in_turn(workers, runs):
        os.sync()  # so that no one waits for what another has written
        told[how].append(workers[how].step())
    for worker in workers.values():
        worker.close()
    for how, steps in told.items():
        seconds = [each["seconds"] for each in steps[1:]]
        report.add(f"{family}, exact", WAYS[how], "time", "s", seconds)
        # Of the first run: in the others what the allocator has kept of it counts too.
        used = [(steps[0]["peak"] - workers[how].start) / 1e9]
        report.add(f"{family}, exact", WAYS[how], "peak memory", "GB", used)
    for how in ("safely", "plainly"):
        pairs = zip(told["ours"][1:], told[how][1:], strict=True)
        ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)
        report.bar(f"{family}: time of an exact sum / of {WAYS[how]}", ratio, 2)
    size = sum(path.stat().st_size for path in (*paths, outputs["ours"]))
    peak = told["ours"][0]["peak"] - workers["ours"].start
    report.bar(f"{family}: peak memory / size of all three files", peak / size, 1.1)
    report.bar(f"{family}: relative error of an exact sum", error(paths, outputs["ours"]), 1e-6)
    shutil.rmtree(folder)


def error(paths: list[Path], output: Path) -> float:
    """The written sum against the one in float64, relative, over all layers' factors' products."""
    one, other, made = (files.read(path).deltas for path in (*paths, output))
    lost = whole = 0.0
    for name, found in made.items():
        expected = WEIGHTS[0] * product(one[name]) + WEIGHTS[1] * product(other[name])
        lost += float((product(found) - expected).square().sum())
        whole += float(expected.square().sum())
    return (lost / whole) ** 0.5


def product(delta: Delta) -> Tensor:
    """The delta as a matrix in float64."""
    return delta.up.double().flatten(1) @ delta.down.double().flatten(1) * delta.scale


def reductions(report: Report, case: str, shapes: dict[str, tuple[int, ...]], runs: int) -> None:
    """To rank 64, in turn: this pack and peft's add_weighted_adapter, on the same factors."""
    generator = torch.Generator().manual_seed(1)
    made = {
        rank: {name: factors(shape, rank, generator) for name, shape in shapes.items()}
        for rank in RANKS
    }
    vectors = [
        Vector({name: Delta(*pair, None, float(rank)) for name, pair in of.items()})
        for rank, of in made.items()
    ]
    model = peft_model(shapes, made)

    def ours() -> list[Delta]:
        combined, _ = exact(vectors, WEIGHTS)
        return list(truncated(combined, REDUCED)[0].deltas.values())

    def theirs(kind: str, other: str = "", **options) -> Callable[[], list[Delta]]:
        def merge() -> list[Delta]:
            names = [f"rank{RANKS[0]}", other or f"rank{RANKS[1]}"]
            model.add_weighted_adapter(names, list(WEIGHTS), "sum", kind, **options)
            found = [
                Delta(
                    layer.lora_B["sum"].weight.detach(), layer.lora_A["sum"].weight.detach(), None,
                    layer.scaling["sum"] * layer.lora_A["sum"].weight.shape[0],
                )
                for layer in model.model.layers
            ]  # fmt: skip
            model.delete_adapter("sum")
            return found

        return merge

    subjects = {
        "this pack": ours,
        "peft, svd": theirs("svd", svd_rank=REDUCED),
        "peft, cat": theirs("cat"),
        "peft, ties_svd": theirs("ties_svd", svd_rank=REDUCED, density=0.5),
        "peft, ties": theirs("ties", PADDED, density=0.5),
        "peft, dare_linear": theirs("dare_linear", PADDED, density=0.5),
    }
    one, other = (vector.deltas for vector in vectors)
    wholes = [WEIGHTS[0] * product(one[n]) + WEIGHTS[1] * product(other[n]) for n in shapes]
    total = sum(float(whole.square().sum()) for whole in wholes)
    begun = time.perf_counter()
    spectra = [torch.linalg.svd(whole.float(), full_matrices=False)[1] for whole in wholes]
    report.add(case, "whole SVD", "time", "s", [time.perf_counter() - begun])  # once, for minutes
    best = sum(float(values[REDUCED:].double().square().sum()) for values in spectra)
    report.add(case, "whole SVD", "relative error", "", [(best / total) ** 0.5])
    took: dict[str, list[float]] = {name: [] for name in subjects}
    for number, name in in_turn(subjects, runs):
        if name in MINUTES and number < runs:
            continue
        begun = time.perf_counter()
        found = subjects[name]()
        took[name].append(time.perf_counter() - begun)
        log.info("%s, %s: %.2f s", case, name, took[name][-1])
        if number == runs:
            pairs = zip(found, wholes, strict=True)
            lost = sum(float((product(a) - b).square().sum()) for a, b in pairs)
            report.add(case, name, "relative error", "", [(lost / total) ** 0.5])
            if name == "this pack":
                report.bar(f"{case}: error / the least there is", (lost / best) ** 0.5, 1.01)
    counted = {name: s if name in MINUTES else s[1:] for name, s in took.items()}
    for name, seconds in counted.items():
        report.add(case, name, "time", "s", seconds)
    ratio = statistics.median(counted["this pack"]) / statistics.median(counted["peft, svd"])
    report.bar(f"{case}: time to rank {REDUCED} / peft's svd", ratio, 1 / 40)


def peft_model(shapes: dict[str, tuple[int, ...]], made: dict):
    """A module with these layers and both adapters on it; the second also with zeros up to the rank
    of the first, for what peft does with adapters of one rank only."""
    from peft import LoraConfig, LoraModel

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Conv2d(shape[1], shape[0], shape[2:], bias=False) if len(shape) == 4
                else nn.Linear(shape[1], shape[0], bias=False)
                for shape in shapes.values()
            )  # fmt: skip

    names = [f"layers.{i}" for i in range(len(shapes))]
    wide, narrow = RANKS
    adapters = {f"rank{rank}": (rank, made[rank]) for rank in RANKS}
    adapters[PADDED] = wide, made[narrow]
    configs = {
        name: LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
        for name, (rank, _) in adapters.items()
    }
    first, *others = configs
    model = LoraModel(Net(), {first: configs[first]}, first)
    for name in others:
        model.peft_config[name] = configs[name]
        model.inject_adapter(model.model, name)
    with torch.no_grad():
        for name, (_, of) in adapters.items():
            for layer, (up, down) in zip(model.model.layers, of.values(), strict=True):
                layer.lora_B[name].weight.zero_()[:, : up.shape[1]] = up
                layer.lora_A[name].weight.zero_()[: down.shape[0]] = down
    return model
