"""Tensors on disk: whole, and with the disk's own errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from . import disk


def save(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None):
    """A safetensors file, there whole or not at all. Raises OSError when the disk is full."""
    with disk.whole_file(path) as new:
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, new, metadata)
        except SafetensorError as error:  # which the library makes of the disk's own
            raise OSError(f"{path.name} could not be written: {error}") from error
