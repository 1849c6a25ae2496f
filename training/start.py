"""The LoRA that a training starts from, as the factors of its layers."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from ..lora.formats import files
from ..lora.reduce import decomposed
from . import disk
from .adapter import Adapter
from .result import STYLES
from .teacher import Teacher

log = logging.getLogger("lcm_lora")


def start_from(adapter: Adapter, teacher: Teacher, path: Path) -> None:
    """Gives the adapter the changes of a LoRA file, whatever names and ranks the file has.

    If the file's rank is higher, the largest singular values stay. If it is lower, the other ranks
    start as in a training from nothing, and so do layers that the file does not have.

    Raises ValueError if the file is missing or damaged, is for another architecture, changes layers
    that are not trained here, is no plain LoRA (DoRA, full differences), is all zero, or contains a
    style.
    """
    name = disk.shown(path.name)
    if not path.is_file():
        raise ValueError(
            f"start_from: there is no LoRA {disk.shown(path)}. Put it back, or start a new job."
        )
    vector = files.read(path)
    if styles := _styles(vector.metadata.get(STYLES, "")):
        raise ValueError(
            f"start_from: {name} contains the style {styles}, which would become a part of the "
            "acceleration. Choose a LoRA without a style."
        )
    layers = teacher.layers(vector)
    foreign = sorted(layers.keys() - set(adapter.names))
    if foreign:
        raise ValueError(
            f"start_from: {name} changes {len(foreign)} layers that a distillation does not train, "
            f"such as {foreign[0]}. Choose an LCM-LoRA."
        )
    rank, kept, total = adapter.rank, 0.0, 0.0
    with torch.no_grad():
        for layer, up, down in adapter.tensors():
            if layer not in layers:
                continue
            parts = decomposed(layers[layer])
            energy = parts.values.double().square()
            kept, total = kept + float(energy[:rank].sum()), total + float(energy.sum())
            delta = parts.cut(min(rank, len(energy)))
            up.zero_()
            # The layer's scale is alpha / rank, the delta's is 1.
            up[:, : delta.rank] = delta.up.view(-1, *up[0, : delta.rank].shape) / adapter.scale
            down[: delta.rank] = delta.down.view(down[: delta.rank].shape)
    if not total:
        raise ValueError(
            f"start_from: {name} is zero in every layer. Choose another LoRA, or none."
        )
    log.info(
        "starting from %s: %d of %d layers, %.2f %% of its energy at rank %d",
        name, len(layers), len(adapter.names), 100 * kept / total, rank,
    )  # fmt: skip


def _styles(metadata: str) -> str:
    """The names of the styles in a result's metadata; "" for none."""
    try:
        styles = json.loads(metadata or "[]")
        return ", ".join(str(style) for style, _ in styles)
    except (ValueError, TypeError):
        return ""
