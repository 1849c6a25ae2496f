"""The settings of a cell, and their text: `steps=4, cfg=1.5, weight_2=0.8, prompt="a fox"`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Changes = Mapping[str, Any]
"""Settings by name; settings of a vector end with its number: weight_2, lora_2."""


@dataclass(frozen=True)
class Number:
    """The allowed values of a setting, as in LCM KSampler.

    Attributes:
        example: values that are worth comparing.
    """

    low: float
    high: float
    example: str
    whole: bool = False

    def check(self, name: str, value: float) -> float | int:
        """The value. Raises ValueError if it is out of range."""
        if not math.isfinite(value) or (self.whole and value != int(value)):
            kind = "a whole number" if self.whole else "a finite number"
            raise ValueError(f"{name} is {value:g}; expected {kind}, such as {self.example}.")
        if not self.low <= value <= self.high:
            raise ValueError(
                f"{name} is {value:.20g}; expected a number from {self.low:g} to {self.high:.20g}."
            )
        return int(value) if self.whole else value


NUMBERS = {
    "steps": Number(1, 50, "1, 2, 4, 8", whole=True),
    "cfg": Number(0, 30, "1, 1.5, 2"),
    "denoise": Number(0.01, 1, "0.4:1:0.2"),
    "eta": Number(-1, 1, "0, 0.3, 1"),
    "seed": Number(0, 0xFFFFFFFFFFFFFFFF, "1:4", whole=True),
    "weight": Number(-10, 10, "0.4:1.2:0.2"),
}
TEXTS = ("lora", "checkpoint", "prompt")
OF_VECTOR = ("weight", "lora", "checkpoint")
_ENTRY = re.compile(r'\s*(\w+)\s*=\s*("(?:\\.|[^"\\])*"|[^",]+?)\s*(?:,|$)')


def written(settings: Changes) -> str:
    """The settings as text."""
    texts = {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, str) else plain(value)
        for name, value in settings.items()
    }
    return ", ".join(f"{name}={text}" for name, text in texts.items())


def plain(value: float | int) -> str:
    """A number as the shortest text that reads back as the same value."""
    return repr(value).removesuffix(".0")


def read(line: str) -> dict[str, Any]:
    """The settings of a line that `written` wrote, or of a part of it.

    Raises:
        ValueError: a name is unknown or appears twice, or a value is not of its kind.
    """
    settings: dict[str, Any] = {}
    at = 0
    while at < len(line.rstrip().rstrip(",")):
        entry = _ENTRY.match(line, at)
        if entry is None:
            raise ValueError(
                f"{line[at:].strip()[:60]!r} is not a setting; expected a name, = and a value, "
                'such as steps=4 or prompt="a fox".'
            )
        name, value = entry.groups()
        if name in settings:
            raise ValueError(f"{name} appears twice in {line.strip()[:60]!r}; expected one value.")
        settings[name] = _value(name, value)
        at = entry.end()
    return settings


def _value(name: str, text: str) -> Any:
    kind, _, number = name.partition("_")
    if (kind in OF_VECTOR) != number.isdecimal() or kind not in (*NUMBERS, *TEXTS):
        names = ", ".join(f"{each}_1" if each in OF_VECTOR else each for each in (*NUMBERS, *TEXTS))
        raise ValueError(f"There is no setting {name!r}; expected one of {names}.")
    if kind in TEXTS:
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        return value if isinstance(value, str) else text
    try:
        return NUMBERS[kind].check(name, int(text) if text.isdecimal() else float(text))
    except (ValueError, OverflowError) as error:
        if str(error).startswith(name):
            raise
        raise ValueError(
            f"{name} is {text!r}; expected a number, such as {NUMBERS[kind].example}."
        ) from None
