"""Everything random in a run, as functions of (seed, step, place in the batch).

No generator's state survives a step, so a resumed run draws what the unbroken one would have, two
processes draw together what one would draw alone, and a smaller micro-batch draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ...samplers.noise import picture_seed
from ..objectives.lcm import ORIGIN_STEPS


class Order:
    """Which rows of the bank make which batch: each epoch a new order, every row once.

    shapes: of each row's latent; a batch holds one shape. batch: over all processes. Where a
    shape's rows do not fill their last batch, the first of them come twice in that epoch.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], batch: int, seed: int):
        self.batch, self.seed = batch, seed
        self.groups: dict[tuple[int, ...], list[int]] = {}
        for row, shape in enumerate(shapes):
            self.groups.setdefault(tuple(shape), []).append(row)
        self.per_epoch = sum(math.ceil(len(rows) / batch) for rows in self.groups.values())
        self._epoch = -1
        self._batches: list[list[int]] = []

    def rows(self, step: int) -> list[int]:
        """The rows of step `step` (0, 1, ...): `batch` of them."""
        epoch, at = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._batches, self._epoch = self._shuffled(epoch), epoch
        return self._batches[at]

    def original(self, step: int, passes: int) -> int:
        """The step whose batch and draws this one repeats, where each is used in `passes` passes
        over the bank, one after the other; step itself for 1."""
        epoch, at = divmod(step, self.per_epoch)
        return epoch // passes * passes * self.per_epoch + at

    def _shuffled(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(picture_seed(self.seed, epoch, 1 << 40))
        batches = []
        for rows in self.groups.values():
            order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
            for start in range(0, len(order), self.batch):
                part = order[start : start + self.batch]
                batches.append([part[i] if i < len(part) else order[(i - len(part)) % len(order)]
                                for i in range(self.batch)])  # fmt: skip
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def draw(
    seed: int, step: int, places: Sequence[int], shape: Sequence[int], guidance: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For the pictures at these places of step's batch: (eps, index, cfg) on the CPU.

    eps: [B, *shape] float32; index: int64 [B] in 0..49, the place on the solver's grid; cfg:
    float32 [B, 1, 1, 1], within the range of guidance.
    """
    eps = torch.empty(len(places), *shape)
    index = torch.empty(len(places), dtype=torch.int64)
    cfg = torch.empty(len(places), 1, 1, 1)
    generator = torch.Generator()
    low, high = guidance[0], guidance[-1]
    for i, place in enumerate(places):
        generator.manual_seed(picture_seed(seed, place, step))
        index[i] = torch.randint(ORIGIN_STEPS, (), generator=generator)
        cfg[i] = low + (high - low) * torch.rand((), generator=generator)
        eps[i].normal_(generator=generator)
    return eps, index, cfg
