"""LoRA arithmetic on the layers of SDXL, with the factors on the processor and on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ...lora.combine import elementwise, exact
from ...lora.delta import Delta, Vector
from ...lora.elementwise.table import RULES
from ...lora.nearest import nearest
from ...lora.reduce import truncated
from ..bench import merge
from .kit import Kit

WEIGHTS = 1.0, 0.8
CPU = torch.device("cpu")


def run(kit: Kit) -> None:
    architecture = "SD1.5" if kit.tiny else "SDXL"
    shapes = merge.layers(architecture)
    few = {str(shape): shape for shape in shapes.values()}
    few = dict(list(few.items())[:3]) if kit.tiny else few
    ranks = (8, 4) if kit.tiny else merge.RANKS
    title, rank = f"{architecture}, one layer of each of {len(few)} shapes", ranks[0]
    made = vectors(few, ranks)
    places = [CPU, kit.device] if kit.cuda else [CPU]
    reduced = {}
    for where in places:
        on = moved(made, where)
        ways: dict[str, Callable] = {
            "exact": lambda on=on: exact(on, WEIGHTS)[0],
            f"svd to rank {rank}": lambda on=on: truncated(exact(on, WEIGHTS)[0], rank)[0],
        } | {
            name: lambda on=on, rule=RULES[name], where=where: elementwise(
                on, WEIGHTS, rule, 0.5, rank, 0, where
            )
            for name in list(RULES)[:2]
        }  # fmt: skip
        for name, call in ways.items():
            with kit.case(f"{title}, {name} on {where.type}", 3) as go:
                if go:
                    seconds = kit.seconds(call, 2)
                    kit.add(title, f"{name}, factors on {where.type}", "time", "s", seconds)
        with kit.case(f"the svd on {where.type}", 3) as go:
            if go:
                (reduced[where],) = moved([ways[f"svd to rank {rank}"]()], CPU)
        for shape in list(few.values())[:: max(1, len(few) // 4)]:
            with kit.case(f"nearest {shape} on {where.type}", 2) as go:
                if go:
                    whole = torch.randn(shape, device=where)
                    seconds = kit.seconds(lambda w=whole: nearest(w, rank, 0), 2)
                    case = f"randomised SVD of {list(shape)}"
                    kit.add(case, where.type, "time", "s", seconds)
    if len(reduced) == 2:
        pairs = zip(*(vector.deltas.values() for vector in reduced.values()), strict=True)
        apart = (float((a.matrix() - b.matrix()).norm() / a.matrix().norm()) for a, b in pairs)
        kit.bar("svd, CPU and GPU, relative difference", max(apart), 1e-3)
    whole = vectors(shapes, ranks)
    for where in reversed(places):
        with kit.case(f"{architecture}, all layers, on {where.type}", 5) as go:
            if go:
                on = moved(whole, where)
                seconds = kit.seconds(lambda on=on: exact(on, WEIGHTS), 2)
                case = f"{architecture}, {len(shapes)} layers"
                kit.add(case, f"exact, factors on {where.type}", "time", "s", seconds)


def vectors(shapes: merge.Shapes, ranks: tuple[int, ...]) -> list[Vector]:
    generator = torch.Generator().manual_seed(0)
    return [
        Vector({
            name: Delta(*merge.factors(shape, rank, generator), None, float(rank))
            for name, shape in shapes.items()
        })
        for rank in ranks
    ]  # fmt: skip


def moved(vectors: list[Vector], device: torch.device) -> list[Vector]:
    return [
        replace(vector, deltas={
            name: delta.on(device) for name, delta in vector.deltas.items()
        })
        for vector in vectors
    ]  # fmt: skip
