"""Checkpoints of a job: each whole and verified, or passed over."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ...lora.whole import patiently
from .. import disk, tensors

log = logging.getLogger("lcm_lora")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after `step` steps.

    Attributes:
        adapter: the LoRA layers by name. optimiser: its tensors by name.
        state: everything else, JSON.
    """

    step: int
    adapter: dict[str, torch.Tensor]
    optimiser: dict[str, torch.Tensor]
    state: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes `folder`/step-N where it is not there whole. Raises OSError when the disk is full;
    nothing is then left of it."""
    path = folder / f"step-{checkpoint.step:08d}"
    if path.exists():
        if not _torn(path):
            return path  # the same step has the same state, and it may be the only one
        patiently(shutil.rmtree, path)
    folder.mkdir(parents=True, exist_ok=True)
    with disk.whole_folder(path) as new:
        tensors.save(new / "adapter.safetensors", checkpoint.adapter)
        tensors.save(new / "optimiser.safetensors", checkpoint.optimiser)
        state = {"step": checkpoint.step, **checkpoint.state}
        (new / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        manifest = {
            file.name: {"bytes": file.stat().st_size, "sha256": disk.sha256(file)}
            for file in sorted(new.iterdir())
        }
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return path


def newest(folder: Path) -> Checkpoint | None:
    """The last checkpoint whose files are those of its manifest; others are named in the log."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if wrong := _torn(path):
            log.warning("checkpoint %s is passed over: %s", path.name, wrong)
            continue
        return _read(path)
    return None


def read(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of one step. Raises OSError where it is not there."""
    return _read(folder / f"step-{step:08d}")


def _read(path: Path) -> Checkpoint:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(
        state.pop("step"), load_file(path / "adapter.safetensors"),
        load_file(path / "optimiser.safetensors"), state,
    )  # fmt: skip


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Removes all but the last `keep` checkpoints and the one of step `best`."""
    paths = sorted(folder.glob("step-*"))
    for path in paths[:-keep]:
        if path.name != f"step-{best or 0:08d}":
            patiently(shutil.rmtree, path)


def _torn(path: Path) -> str:
    """Why a checkpoint cannot be used; "" for a whole one. Raises OSError where the disk fails."""
    manifest = disk.read_surely(path / MANIFEST)
    if not isinstance(manifest, dict):
        return f"it has no {MANIFEST}"
    for name, told in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != told["bytes"] or disk.sha256(file) != told["sha256"]:
            return f"{name} is not what was written"
    return ""
