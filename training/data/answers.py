"""The teacher's steps on disk, so that later passes over the bank need not ask it again.

A solver step of the frozen teacher depends on the latent, its noise, the timestep and the guidance
alone. Where these are kept for several passes, so is its answer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from ...lora.whole import patiently
from ..spec import Spec
from ..tensors import save

FOLDER = "answers"  # in the job's folder


def folder(job: Path, spec: Spec, bank: str, world: int) -> Path:
    """Where a job keeps its answers: another folder for other settings, another bank, or another
    number of processes, with which the same step has other pictures."""
    told = f"{bank}\n{world}\n{spec.to_json()}"
    return job / FOLDER / hashlib.sha256(told.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Answers:
    """z_s of a process's part of each batch, a file for each step that asked the teacher."""

    folder: Path
    rank: int

    def read(self, step: int) -> torch.Tensor | None:
        """[B, C, H, W] on the CPU, or None where the teacher must be asked."""
        file = self._file(step)
        return load_file(file)["z_s"] if file.exists() else None

    def write(self, step: int, z_s: torch.Tensor) -> None:
        """Raises OSError when the disk is full."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save(self._file(step), {"z_s": z_s})

    def forget_before(self, step: int) -> None:
        """Removes the files of earlier steps, which no later pass uses."""
        for file in self.folder.glob(f"{self.rank}-*.safetensors"):
            if int(file.stem.partition("-")[2]) < step:
                patiently(file.unlink)

    def _file(self, step: int) -> Path:
        return self.folder / f"{self.rank}-{step}.safetensors"
