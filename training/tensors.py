"""Tensors on disk, written completely or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from . import disk


def save(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file. Raises OSError if the disk is full."""
    with disk.whole_file(path) as new:
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, new, metadata)
        except SafetensorError as error:  # the library wraps errors of the disk in this type
            raise OSError(f"{path.name} could not be written: {error}") from error
