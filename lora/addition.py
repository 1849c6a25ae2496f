"""The sum of deltas of one weight, as one delta."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .delta import Delta


def stacked(parts: Sequence[tuple[Delta, float]]) -> Delta:
    """The sum of weighted deltas as one delta with their stacked factors, in float32."""
    plain = [(delta.plain(), weight) for delta, weight in parts]
    # Some tools save a convolution's factors as matrices, others with the kernel. Keep the kernel.
    columns = max((delta.down.shape[1:] for delta, _ in plain), key=len)
    kernel = [1] * (len(columns) - 1)
    rank = sum(delta.rank for delta, _ in plain)
    first = plain[0][0]
    # Written into place, because copies would cost most of the time and memory here.
    up = first.up.new_empty(first.up.shape[0], rank, dtype=torch.float32)
    down = first.down.new_empty(rank, math.prod(columns), dtype=torch.float32)
    begin = 0
    for delta, weight in plain:
        rows = slice(begin, begin := begin + delta.rank)
        up[:, rows] = delta.up.flatten(1)
        up[:, rows] *= weight * delta.scale
        down[rows] = delta.down.flatten(1)
    return Delta(up.reshape(*up.shape, *kernel), down.reshape(rank, *columns), None, float(rank))
