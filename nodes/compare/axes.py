"""The axes of a sheet: what changes from column to column, and from row to row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple

from .settings import NUMBERS, Changes, Number, plain, read

MOST_CELLS = 256


class Point(NamedTuple):
    """A column or a row: its label, and the settings that it changes."""

    label: str
    changes: Changes


@dataclass(frozen=True)
class Axis:
    title: str
    points: Sequence[Point]


ALONE = Axis("", (Point("", {}),))  # the second axis of a sheet that has only one


def of_numbers(name: str, text: str, vector: int | None = None) -> Axis:
    """Values of a numeric setting. vector: its number, if the setting belongs to a vector."""
    setting, kind = (name, NUMBERS[name]) if vector is None else (f"{name}_{vector}", NUMBERS[name])
    points = [Point(plain(value), {setting: value}) for value in numbers(setting, text, kind)]
    return _checked(setting, points, kind.example)


def of_prompts(text: str) -> Axis:
    """One prompt per line."""
    lines = _lines(text)
    return _checked("prompt", [Point(line, {"prompt": line}) for line in lines], "one per line")


def of_files(text: str, available: Sequence[str], vector: int) -> Axis:
    """One LoRA per line: its name in ComfyUI's lists, with or without `.safetensors`, or a pattern
    with * and ?, which stands for all matching names."""
    names: list[str] = []
    for line in _lines(text):
        matches = [name for name in available if line in (name, name.removesuffix(".safetensors"))]
        if not matches and set(line) & set("*?"):
            patterns = (line, f"{line}.safetensors")
            matches = [name for name in available if any(fnmatchcase(name, p) for p in patterns)]
            matches.sort(key=_natural)
        if not matches:
            near = get_close_matches(line, available, 3, 0.3)
            hint = f" Similar names: {', '.join(near)}." if near else ""
            raise ValueError(f"There is no LoRA file {line!r} in ComfyUI's loras folder.{hint}")
        names += [name for name in matches if name not in names]
    points = [Point(_stem(name), {f"lora_{vector}": name}) for name in names]
    return _checked(f"lora_{vector}", points, "one per line, or a pattern such as my-style-*")


def of_checkpoints(job: str, text: str, kept: Sequence[int], vector: int) -> Axis:
    """The LoRA of a distillation job at several checkpoints. text: "all", or a list of steps.

    kept: the steps of the job's checkpoints.
    """
    if text.strip().lower() in ("", "all"):
        steps: Sequence[int] = kept
    else:
        steps = [int(v) for v in numbers("step", text, Number(0, 1e9, "100, 200", whole=True))]
    if missing := [step for step in steps if step not in kept]:
        has = ", ".join(map(str, kept)) or "none"
        raise ValueError(f"The job has no checkpoint of step {missing[0]}. It has: {has}.")
    points = [Point(str(step), {f"checkpoint_{vector}": f"{job}/{step}"}) for step in steps]
    return _checked("the job's checkpoints", points, "all, or steps such as 100, 200", "step")


def of_settings(text: str) -> Axis:
    """The settings of one cell per line, as the node's output `settings` has them."""
    cells = [read(line) for line in _lines(text)]
    # Labels leave out what is the same in all lines.
    common = {
        name for name in (cells[0] if cells else {})
        if all(name in changes and changes[name] == cells[0][name] for changes in cells)
    }  # fmt: skip
    points = []
    for changes in cells:
        label = ", ".join(
            value if name == "prompt" else f"{name} {_shown(name, value)}"
            for name, value in changes.items()
            if name not in common or len(cells) == 1
        )
        points.append(Point(label, changes))
    return _checked("settings", points, "one cell per line", "")


def numbers(name: str, text: str, kind: Number) -> list[float | int]:
    """Numbers from "1, 2, 4", from ranges such as "0.5:1:0.1" (from, to, step), or both.

    Raises:
        ValueError: a number is out of range, or a range is empty, reversed or too long.
    """
    values: list[float | int] = []
    for word in filter(None, re.split(r"[,;\s]+", re.sub(r"\s*:\s*", ":", text))):
        parts = word.split(":")
        try:
            start, *rest = (Decimal(part) for part in parts)
        except InvalidOperation:
            raise ValueError(
                f"{name}: {word!r} is not a number; expected values such as {kind.example}, or a "
                "range from:to:step such as 0.5:1:0.1."
            ) from None
        for value in _range(name, word, start, rest) if rest else [start]:
            whole = kind.whole and value == value.to_integral_value()
            values.append(kind.check(name, int(value) if whole else float(value)))
    return values


def _range(name: str, word: str, start: Decimal, rest: Sequence[Decimal]) -> Iterable[Decimal]:
    end, step = rest[0], rest[1] if len(rest) > 1 else Decimal(1)
    if len(rest) > 2 or not all(number.is_finite() for number in (start, end, step)):
        raise ValueError(
            f"{name}: {word!r} is not a range; expected from:to:step, such as 0.5:1:0.1."
        )
    if step <= 0:
        raise ValueError(f"{name}: the step of the range {word} is {step}; expected more than 0.")
    if end < start:
        raise ValueError(
            f"{name}: the range {word} is empty, because it starts above its end. Write "
            f"{end}:{start}:{step}."
        )
    count = int((end - start) / step) + 1
    _limit(f"{name}: the range {word}", count, "values")
    return (start + number * step for number in range(count))


def _checked(name: str, points: Sequence[Point], example: str, title: str | None = None) -> Axis:
    """An axis of at least two different points."""
    if len(points) < 2:
        found = f"only {points[0].label!r}" if points else "nothing"
        raise ValueError(
            f"There is {found} to compare for {name}; expected at least two values ({example}). "
            "For a single axis, set rows to none."
        )
    for number, point in enumerate(points):
        if any(point.changes == before.changes for before in points[:number]):
            raise ValueError(f"{point.label!r} appears twice in {name}; list it once.")
    return Axis(name if title is None else title, points)


def require_crossed(columns: Axis, rows: Axis) -> None:
    """Raises ValueError if both axes change the same setting, or if the sheet would have too many
    cells."""
    changed = [{n for p in axis.points for n in p.changes} for axis in (columns, rows)]
    if both := sorted(changed[0] & changed[1]):
        raise ValueError(
            f"columns and rows both change {', '.join(both)}. Set rows to none, or compare another "
            "setting in one of them."
        )
    count = len(columns.points) * len(rows.points)
    _limit(f"A sheet of {len(columns.points)} x {len(rows.points)}", count, "cells")


def _limit(what: str, count: int, unit: str) -> None:
    if count > MOST_CELLS:
        raise ValueError(f"{what} has {count} {unit}; expected at most {MOST_CELLS}. Use fewer.")


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _stem(name: str) -> str:
    return re.split(r"[\\/]", name)[-1].removesuffix(".safetensors")


def _shown(name: str, value: object) -> str:
    if isinstance(value, str):
        return _stem(value)
    assert isinstance(value, int | float)
    return plain(value)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts step-900 before step-1000."""
    parts = re.split(r"(\d+)", name)
    return [(int(part) if part.isdecimal() else -1, part) for part in parts]
