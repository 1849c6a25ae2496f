"""The cells of a sheet, and which of them are drawn together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ...samplers.host import Run
from .axes import Axis
from .settings import OF_VECTOR, Changes, written


class Source(NamedTuple):
    """Where a vector comes from: kind is "vector" (connected; name is its number), "lora" (name is
    a file's) or "checkpoint" (name is a job's id and a step)."""

    kind: str
    name: str


Mix = tuple[tuple[Source, float], ...]
"""Vectors with their weights, in the order in which they are applied."""


@dataclass(frozen=True)
class Cell:
    """One cell of a sheet.

    Attributes:
        mix: its vectors and their weights.
        prompt: None to use the node's positive.
        text: its settings, in the form that `settings.read` reads.
    """

    run: Run
    mix: Mix
    prompt: str | None
    text: str

    @property
    def added(self) -> Mix:
        """The vectors that change something."""
        return tuple((source, weight) for source, weight in self.mix if weight != 0)

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(source for source, _ in self.mix)


class Together(NamedTuple):
    """Cells that are drawn as one batch, by their numbers.

    live: whether their vectors stay beside the layers instead of being merged into the weights.
    """

    cells: tuple[int, ...]
    live: bool


def cells_of(columns: Axis, rows: Axis, defaults: Changes, wired: Sequence[bool]) -> list[Cell]:
    """The cells, row by row.

    wired: for each vector of the node, whether one is connected.

    Raises:
        ValueError: a setting is of a vector that the node does not have, or that is not connected.
    """
    return [
        _cell({**defaults, **column.changes, **row.changes}, wired)
        for row in rows.points
        for column in columns.points
    ]


def _cell(settings: dict[str, Any], wired: Sequence[bool]) -> Cell:
    for name in settings:
        kind, _, vector = name.partition("_")
        if kind in OF_VECTOR and not 1 <= int(vector) <= len(wired):
            raise ValueError(
                f"{name} belongs to vector {vector}, but the node has {len(wired)} vectors; set "
                f"count to at least {vector}."
            )
    mix = []
    for number, connected in enumerate(wired, 1):
        weight, source = settings[f"weight_{number}"], Source("vector", str(number))
        replaced_by = [kind for kind in ("lora", "checkpoint") if f"{kind}_{number}" in settings]
        if len(replaced_by) == 2:
            raise ValueError(
                f"A cell has both lora_{number} and checkpoint_{number}; expected only one of "
                "them. Remove the other from the line."
            )
        if replaced_by:
            source = Source(replaced_by[0], settings[f"{replaced_by[0]}_{number}"])
        elif not connected:
            if weight == 0:
                continue
            raise ValueError(
                f"vector_{number} is not connected. Connect a vector, compare LoRA files or "
                "checkpoints in its place, or lower count."
            )
        mix.append((source, weight))
    eta = settings["eta"]
    run = Run(
        settings["seed"], settings["steps"], settings["cfg"], settings["denoise"],
        None if eta < 0 else eta,
    )  # fmt: skip
    return Cell(run, tuple(mix), settings.get("prompt"), written(settings))


def together(
    cells: Sequence[Cell],
    most: int,
    family: Callable[[Cell], Hashable],
    text: Callable[[Cell], Hashable],
    may_live: Callable[[tuple[Source, ...]], bool],
) -> list[Together]:
    """Groups cells into batches. Batches with the same weights follow each other, so that the model
    gets each sum once.

    Cells with different weights can share a batch if their vectors stay beside the layers. That is
    quicker than merging one sum after the other into the model, unless many cells share a sum.

    Args:
        most: the most cells in a batch.
        family, text: what cells of a batch must have in common besides the run's settings: the
            family that they are sampled as, and the form of their text.
        may_live: whether vectors can stay beside the layers.
    """
    compatible: dict[Hashable, list[int]] = {}
    for number, cell in enumerate(cells):
        run = replace(cell.run, seed=0)
        compatible.setdefault((run, cell.sources, family(cell), text(cell)), []).append(number)
    live: list[Together] = []
    merged: dict[Mix, list[Together]] = {}
    for numbers in compatible.values():
        by_mix: dict[Mix, list[int]] = {}
        for number in numbers:
            by_mix.setdefault(cells[number].added, []).append(number)
        pool = []
        for mix, same_mix in by_mix.items():
            fills_a_batch = 2 * len(same_mix) > most or len(by_mix) == 1
            if most > 1 and not fills_a_batch and may_live(cells[same_mix[0]].sources):
                pool += same_mix
            else:
                batches = [Together(batch, False) for batch in _split(same_mix, most)]
                merged.setdefault(mix, []).extend(batches)
        if pool:
            live += [Together(batch, True) for batch in _split(sorted(pool), most)]
    # Consecutive live batches with the same vectors prepare these vectors only once.
    live.sort(key=lambda batch: cells[batch.cells[0]].sources)
    return live + [batch for batches in merged.values() for batch in batches]


def _split(numbers: Sequence[int], most: int) -> Iterator[tuple[int, ...]]:
    """The numbers in parts of nearly equal size, each at most `most` long."""
    count = -(-len(numbers) // most)
    ends = [round(i * len(numbers) / count) for i in range(count + 1)]
    return (tuple(numbers[a:b]) for a, b in zip(ends, ends[1:], strict=False))


def sources_of(cells: Iterable[Cell]) -> list[Source]:
    """All vectors of the cells, each once."""
    return list(dict.fromkeys(source for cell in cells for source in cell.sources))
