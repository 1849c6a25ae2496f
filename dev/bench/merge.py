"""LoRA arithmetic on the real layers of SD1.5, SDXL, Flux and Qwen-Image.

The exact sum of two complete files is compared with the least that any program must do: read both
files and write as many numbers. A reduction to rank 64 is compared with PEFT on one layer of each
shape, and with the error of the full SVD. The factors are random, with singular values that fall
off as k^-0.7.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...lora.atomic import whole_file
from ...lora.combine import exact
from ...lora.delta import Delta, Vector
from ...lora.formats import files
from ...lora.reduce import truncated
from ...training.adapter import Adapter
from .. import commands
from . import networks
from .report import Report
from .timing import Process, Taken, take_turns, timed

RANKS, WEIGHTS, REDUCED = (64, 32), (1.0, 0.8), 64
MODELS = ("SD1.5", "SDXL", *networks.TRANSFORMERS)
FALL = 0.7
OURS, PEFT, SUM = "this pack", "peft, svd", "sum"
SAFELY = "reading, and writing to the disk"
PLAINLY = "reading, and writing without waiting for the disk"
Shapes = dict[str, tuple[int, ...]]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each subject")
    parser.add_argument(
        "--only", choices=MODELS, nargs="+", default=MODELS, help="the models whose layers to merge"
    )


def run(chosen: argparse.Namespace, _checkpoint: Path) -> Report:
    report = Report("merge")
    for architecture in chosen.only:
        shapes = layers(architecture)
        exact_sums(report, architecture, shapes, chosen.runs)
        few = {str(shape): shape for shape in shapes.values()}
        reductions(report, f"{architecture}, {len(few)} layers", few, chosen.runs)
    return report


def layers(architecture: str) -> Shapes:
    """Every layer that an LCM-LoRA changes, by ComfyUI's name, with the shape of its weight. Of a
    transformer, every linear layer of its blocks."""
    if architecture in networks.TRANSFORMERS:
        network = networks.host_transformer(architecture)
        linear = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear)}
        return {name: tuple(m.weight.shape) for name, m in linear.items() if "blocks." in name}
    network = networks.host_unet(networks.ARCHITECTURES[architecture], "meta")
    shapes = {name.removesuffix(".weight"): p.shape for name, p in network.named_parameters()}
    return {name: tuple(shapes[name]) for name in Adapter(network, 1, 1.0).names}


def factors(shape: tuple[int, ...], rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """up and down."""
    out, columns, *kernel = shape
    fall = torch.arange(1, rank + 1) ** -FALL
    up = torch.randn(out, rank, generator=generator) * fall * out**-0.5
    down = torch.randn(rank, columns, *kernel, generator=generator) * columns**-0.5
    return up.reshape(*up.shape, *[1] * len(kernel)), down


def product(delta: Delta) -> Tensor:
    """The delta as a matrix in float64."""
    return delta.up.double().flatten(1) @ delta.down.double().flatten(1) * delta.scale


def summed(one: Vector, other: Vector, name: str) -> Tensor:
    """The weighted sum of a layer as a matrix in float64."""
    return WEIGHTS[0] * product(one.deltas[name]) + WEIGHTS[1] * product(other.deltas[name])


@dataclass(frozen=True)
class Merge:
    """Two files to be merged into a third, and the way to do it."""

    inputs: tuple[Path, Path]
    output: Path
    way: str


def prepare(merge: Merge) -> Callable[[], None]:
    """The function that merges the files once."""
    one, other = merge.inputs

    def ours() -> None:
        combined, _ = exact([files.read(one), files.read(other)], WEIGHTS)
        files.write(merge.output, combined, "fp32", overwrite=True)

    def reading() -> dict[str, Tensor]:
        """No arithmetic: reads both files, and makes as many numbers as the sum has."""
        a, b = load_file(one), load_file(other)
        tensors = {}
        for key in a.keys() | b.keys():
            parts = [part[key] for part in (a, b) if key in part]
            size = sum(part.numel() for part in parts) if parts[0].dim() else 1
            tensors[key] = torch.zeros(size)
        return tensors

    def safely() -> None:
        """The file is complete and on the disk, or does not exist."""
        tensors = reading()
        with whole_file(merge.output) as new:
            save_file(tensors, new)

    def plainly() -> None:
        save_file(reading(), merge.output)

    return {OURS: ours, SAFELY: safely, PLAINLY: plainly}[merge.way]


def exact_sums(report: Report, architecture: str, shapes: Shapes, runs: int) -> None:
    """Time, memory and error, each subject in a process of its own."""
    folder = commands.LOCAL / "merge"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    inputs = folder / "one.safetensors", folder / "other.safetensors"
    for path, rank in zip(inputs, RANKS, strict=True):
        tensors = {}
        for name, shape in shapes.items():
            up, down = factors(shape, rank, generator)
            module = f"diffusion_model.{name}"
            tensors[f"{module}.lora_up.weight"] = up.half()
            tensors[f"{module}.lora_down.weight"] = down.half()
            tensors[f"{module}.alpha"] = torch.tensor(float(rank))
        save_file(tensors, path)
    outputs = {way: folder / f"{way}.safetensors" for way in (OURS, SAFELY, PLAINLY)}
    processes = {
        way: Process(prepare, Merge(inputs, path, way), processor_only=True)
        for way, path in outputs.items()
    }

    def synced(process: Process) -> Taken:
        os.sync()  # so that no subject waits for what another has written
        return process()

    turns = take_turns({way: partial(synced, process) for way, process in processes.items()}, runs)
    used = {}
    for way, process in processes.items():
        process.close()
        # Of the first run: in the others, what the allocator has kept counts too.
        used[way] = turns.runs[way][0].peak - process.start
        report.add(f"{architecture}, exact", way, "time", "s", turns.seconds(way))
        report.add(f"{architecture}, exact", way, "peak memory", "GB", [used[way] / 1e9])
    for way in (SAFELY, PLAINLY):
        report.bar(f"{architecture}: time of an exact sum / of {way}", turns.ratio(OURS, way), 2)
    size = sum(path.stat().st_size for path in (*inputs, outputs[OURS]))
    report.bar(f"{architecture}: peak memory / size of all three files", used[OURS] / size, 1.1)
    one, other, merged = (files.read(path) for path in (*inputs, outputs[OURS]))
    lost = total = 0.0
    # Of one layer of each shape: all of Flux's in float64 would take a quarter of an hour.
    for name in {tuple(delta.shape): name for name, delta in merged.deltas.items()}.values():
        expected = summed(one, other, name)
        lost += float((product(merged.deltas[name]) - expected).square().sum())
        total += float(expected.square().sum())
    report.bar(f"{architecture}: relative error of an exact sum", (lost / total) ** 0.5, 1e-6)
    shutil.rmtree(folder)


def reductions(report: Report, case: str, shapes: Shapes, runs: int) -> None:
    """To rank 64, in turn: this pack, and once PEFT's add_weighted_adapter, on the same factors and
    on ComfyUI's device."""
    import comfy.model_management  # not at the top: a merging process has no ComfyUI

    device = comfy.model_management.get_torch_device()
    generator = torch.Generator().manual_seed(1)
    vectors = [
        Vector({
            name: Delta(*factors(shape, rank, generator), None, float(rank)).on(device)
            for name, shape in shapes.items()
        })
        for rank in RANKS
    ]  # fmt: skip
    model = peft_model(shapes, vectors).to(device)

    def ours() -> list[Delta]:
        combined, _ = exact(vectors, WEIGHTS)
        return list(truncated(combined, REDUCED)[0].deltas.values())

    def theirs() -> list[Delta]:
        names = [f"rank{rank}" for rank in RANKS]
        # PEFT's own default computes the square U of each layer too: hours on Flux, for nothing.
        model.add_weighted_adapter(
            names, list(WEIGHTS), SUM, "svd", svd_rank=REDUCED, svd_full_matrices=False
        )
        return [
            Delta(
                layer.lora_B[SUM].weight.detach(), layer.lora_A[SUM].weight.detach(), None,
                layer.scaling[SUM] * REDUCED,
            )
            for layer in model.model.layers
        ]  # fmt: skip

    expected = [summed(*vectors, name) for name in shapes]
    total = sum(float(change.square().sum()) for change in expected)
    begun = time.perf_counter()
    spectra = [torch.linalg.svd(change.float(), full_matrices=False)[1] for change in expected]
    report.add(case, "whole SVD", "time", "s", [time.perf_counter() - begun])
    least = sum(float(values[REDUCED:].double().square().sum()) for values in spectra)
    report.add(case, "whole SVD", "relative error", "", [(least / total) ** 0.5])
    turns = take_turns({OURS: partial(timed, ours)}, runs)
    once = timed(theirs)  # it takes a minute
    for name, seconds, merged in (
        (OURS, turns.seconds(OURS), turns.counted(OURS)[-1].result),
        (PEFT, [once.seconds], once.result),
    ):
        pairs = zip(merged, expected, strict=True)
        lost = sum(float((product(delta) - change).square().sum()) for delta, change in pairs)
        report.add(case, name, "relative error", "", [(lost / total) ** 0.5])
        report.add(case, name, "time", "s", seconds)
        if name == OURS:
            report.bar(f"{case}: error / the least there is", (lost / least) ** 0.5, 1.01)
    ratio = statistics.median(turns.seconds(OURS)) / once.seconds
    report.bar(f"{case}: time to rank {REDUCED} / peft's svd", ratio, 1 / 40)


def peft_model(shapes: Shapes, vectors: list[Vector]) -> nn.Module:
    """A module with these layers, and each vector as an adapter."""
    from peft import LoraConfig, LoraModel

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Conv2d(shape[1], shape[0], shape[2:], bias=False) if len(shape) == 4
                else nn.Linear(shape[1], shape[0], bias=False)
                for shape in shapes.values()
            )  # fmt: skip

    names = [f"layers.{i}" for i in range(len(shapes))]
    configs = {
        f"rank{rank}": LoraConfig(r=rank, lora_alpha=rank, target_modules=names) for rank in RANKS
    }
    (first, config), *others = configs.items()
    model = LoraModel(Net(), {first: config}, first)
    for name, config in others:
        model.peft_config[name] = config
        model.inject_adapter(model.model, name)
    with torch.no_grad():
        for name, vector in zip(configs, vectors, strict=True):
            for layer, delta in zip(model.model.layers, vector.deltas.values(), strict=True):
                layer.lora_B[name].weight.copy_(delta.up)
                layer.lora_A[name].weight.copy_(delta.down)
    return model
