"""The teacher's solver steps on disk, so that later passes over the bank do not compute them again.

A solver step of the frozen teacher depends only on the latent, its noise, the timestep and the
guidance. If several passes use the same ones, they use the same solver step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from ...lora.atomic import patiently
from ..disk import name_of
from ..spec import Spec
from ..tensors import save

FOLDER = "answers"  # in the job's folder


def folder(job: Path, spec: Spec, bank: str, world: int) -> Path:
    """Where a job keeps its answers: a folder for each combination of settings, bank and number of
    processes. With another number of processes, the same step has other pictures."""
    return job / FOLDER / name_of(f"{bank}\n{world}\n{spec.to_json()}")


@dataclass(frozen=True)
class Answers:
    """z_s of a process's part of each batch, one file for each step that called the teacher."""

    folder: Path
    rank: int

    def read(self, step: int) -> torch.Tensor | None:
        """z_s [B, C, H, W] on the CPU, or None if the teacher must be called."""
        file = self._file(step)
        return load_file(file)["z_s"] if file.exists() else None

    def write(self, step: int, z_s: torch.Tensor) -> None:
        """Raises OSError when the disk is full."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save(self._file(step), {"z_s": z_s})

    def forget_before(self, step: int) -> None:
        """Removes the files of earlier steps, which no later pass reads."""
        for file in self.folder.glob(f"{self.rank}-*.safetensors"):
            if int(file.stem.partition("-")[2]) < step:
                patiently(file.unlink)

    def _file(self, step: int) -> Path:
        return self.folder / f"{self.rank}-{step}.safetensors"
