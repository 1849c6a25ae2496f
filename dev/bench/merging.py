"""Two LoRA files into one, as the pack does it and as the least that any program must do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...lora.combine import exact
from ...lora.formats import files
from ...lora.whole import whole_file


def start(settings: dict) -> Callable[[], tuple[float, int, float]]:
    """-> a function that merges the two files once; what it tells of itself means nothing here."""
    one, other, output = (Path(settings[name]) for name in ("one", "other", "output"))

    def ours() -> None:
        combined, _ = exact([files.read(one), files.read(other)], settings["weights"])
        files.write(output, combined, "fp32", overwrite=True)

    def reading() -> dict[str, Tensor]:
        """No arithmetic at all: both files, and as many numbers to write as the sum has."""
        a, b = load_file(one), load_file(other)
        made = {}
        for key in a.keys() | b.keys():
            parts = [each[key] for each in (a, b) if key in each]
            size = sum(part.numel() for part in parts) if parts[0].dim() else 1
            made[key] = torch.zeros(size)
        return made

    def safely() -> None:
        """Until they are on the disk, in a file that is there whole or not at all."""
        made = reading()
        with whole_file(output) as new:
            save_file(made, new)

    def plainly() -> None:
        """Until the system has them, over what was there."""
        save_file(reading(), output)

    merge = {"ours": ours, "safely": safely, "plainly": plainly}[settings["how"]]

    def step() -> tuple[float, int, float]:
        merge()
        return 0.0, 0, 0.0

    return step
