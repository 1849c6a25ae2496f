"""A job's checkpoints: written completely or not at all, verified when read, skipped if damaged."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ...lora.atomic import patiently
from .. import disk, tensors
from ..objectives.table import OBJECTIVES

log = logging.getLogger("lcm_lora")
MANIFEST = "manifest.json"
MORE = "objective.safetensors"  # only if the objective has more tensors
BYTES_A_PARAMETER = 12  # in a checkpoint: the weight and AdamW's two moments in float32
MATCHING_BYTES = 2 * BYTES_A_PARAMETER + 4  # with the fake score and the student's average


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` steps.

    Attributes:
        adapter: as Adapter.state gives it. optimiser: as `flat` gives it.
        state: the fields of progress.Progress, in JSON.
        more: further tensors of the objective, if it has any.
    """

    step: int
    adapter: dict[str, torch.Tensor]
    optimiser: dict[str, torch.Tensor]
    state: dict[str, Any]
    more: dict[str, torch.Tensor] = field(default_factory=dict)


def room(parameters: int, keep: int, objective: str) -> int:
    """Bytes of a job's checkpoints: the last `keep`, the best one, and the one being written."""
    return size(parameters, objective) * (keep + 2)


def size(parameters: int, objective: str) -> int:
    """Bytes of a checkpoint of an adapter with this many parameters."""
    return parameters * (MATCHING_BYTES if OBJECTIVES[objective].matches else BYTES_A_PARAMETER)


def flat(optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """An optimiser's tensors as "<number of the parameter>.<name>"."""
    state = optimiser.state_dict()["state"]
    return {f"{i}.{name}": tensor for i, part in state.items() for name, tensor in part.items()}


def restore(optimiser: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Gives an optimiser the tensors that `flat` returned."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes `folder`/step-N, unless a complete one exists. If the disk is full, raises OSError and
    leaves no files behind."""
    path = folder / f"step-{checkpoint.step:08d}"
    if path.exists():
        if not _torn(path):
            return path  # the same step has the same state, and this may be the only checkpoint
        patiently(shutil.rmtree, path)
    folder.mkdir(parents=True, exist_ok=True)
    with disk.whole_folder(path) as new:
        tensors.save(new / "adapter.safetensors", checkpoint.adapter)
        tensors.save(new / "optimiser.safetensors", checkpoint.optimiser)
        if checkpoint.more:
            tensors.save(new / MORE, checkpoint.more)
        state = {"step": checkpoint.step, **checkpoint.state}
        (new / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        manifest = {
            file.name: {"bytes": file.stat().st_size, "sha256": disk.sha256(file)}
            for file in sorted(new.iterdir())
        }
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return path


def newest(folder: Path) -> Checkpoint | None:
    """The last checkpoint whose files match its manifest. The log names the damaged ones."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if damage := _torn(path):
            log.warning("checkpoint %s is skipped: %s", path.name, damage)
            continue
        return _read(path)
    return None


def steps(folder: Path) -> list[int]:
    """The steps of the existing checkpoints, in order."""
    return disk.numbered(folder, "step-")


def read(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of one step. Raises FileNotFoundError if there is none, and ValueError if it
    is damaged."""
    path = folder / f"step-{step:08d}"
    if not path.is_dir():
        raise FileNotFoundError(f"There is no checkpoint {path.name}.")
    if damage := _torn(path):
        raise ValueError(f"The checkpoint of step {step} is damaged: {damage}.")
    return _read(path)


def _read(path: Path) -> Checkpoint:
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(
        state.pop("step"), load_file(path / "adapter.safetensors"),
        load_file(path / "optimiser.safetensors"), state,
        load_file(path / MORE) if (path / MORE).exists() else {},
    )  # fmt: skip


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Removes all checkpoints but the last `keep` and the one of step `best`."""
    for path in sorted(folder.glob("step-*"))[:-keep]:
        if path.name != f"step-{best or 0:08d}":
            patiently(shutil.rmtree, path)


def _torn(path: Path) -> str:
    """Why a checkpoint cannot be used; "" if it is complete. Raises OSError if the disk fails."""
    manifest = disk.read_surely(path / MANIFEST)
    if not isinstance(manifest, dict):
        return f"it has no {MANIFEST}"
    for name, written in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != written["bytes"] or disk.sha256(file) != written["sha256"]:
            return f"{name} has changed since it was written"
    return ""
