"""Two LoRA files into one, as the pack does it and as the least that any program must do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ...lora import files
from ...lora.combine import exact
from ...lora.whole import whole_file


def start(settings: dict) -> Callable[[], tuple[float, int, float]]:
    """-> a function that merges the two files once; what it tells of itself means nothing here."""
    one, other, output = (Path(settings[name]) for name in ("one", "other", "output"))

    def ours() -> None:
        combined, _ = exact([files.read(one), files.read(other)], settings["weights"])
        files.write(output, combined, "fp32", overwrite=True)

    def reading_and_writing() -> None:
        """No arithmetic at all: both files read, and as many numbers written as the sum has, until
        they are on the disk, in a file that is there whole or not at all."""
        a, b = load_file(one), load_file(other)
        made = {}
        for key in a.keys() | b.keys():
            parts = [each[key] for each in (a, b) if key in each]
            size = sum(part.numel() for part in parts) if parts[0].dim() else 1
            made[key] = torch.zeros(size)
        with whole_file(output) as new:
            save_file(made, new)

    merge = ours if settings["how"] == "ours" else reading_and_writing

    def step() -> tuple[float, int, float]:
        merge()
        return 0.0, 0, 0.0

    return step
