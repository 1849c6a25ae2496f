"""The random choices of a training step, as functions of (seed, step, place in the batch).

No random state outlives a step. So a resumed run draws the same numbers as an uninterrupted one,
two processes draw together what one would draw alone, and the micro-batch has no influence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ...samplers.families import ORIGIN_STEPS
from ...samplers.noise import picture_seed


class Shuffle:
    """Which rows of the bank form which batch: every row once per epoch, in a new order each time.

    shapes: of the rows' latents; a batch has one shape. batch: pictures per step, of all processes
    together. If the rows of a shape do not fill their last batch, the first of them appear twice in
    that epoch.
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
        """The step whose batch and draws this step repeats, if `passes` consecutive passes over the
        bank use the same ones. With 1 pass it is the step itself."""
        epoch, at = divmod(step, self.per_epoch)
        return epoch // passes * passes * self.per_epoch + at

    def _shuffled(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(picture_seed(self.seed, epoch, 1 << 40))
        batches = []
        for rows in self.groups.values():
            order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
            for start in range(0, len(order), self.batch):
                part = order[start : start + self.batch]
                missing = self.batch - len(part)
                batches.append(part + [order[i % len(order)] for i in range(missing)])
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def mean_guidance(guidance: Sequence[float]) -> float:
    """The middle of the range that `draw` takes cfg from."""
    return sum(guidance) / len(guidance)


RUNS = (1, 2, 4)  # sampling steps that distribution matching trains for
# Timesteps of 1000 of what it draws, noised again (arXiv 2311.18828, 3.3).
LOWEST, HIGHEST = 20, 979


def run(seed: int, step: int, timesteps: Callable[[int], list[int]]) -> list[int]:
    """The timesteps of a sampling run up to the call that a step of distribution matching trains.
    They are the same for all pictures. timesteps(n): the timesteps of a run of n steps."""
    generator = torch.Generator().manual_seed(picture_seed(seed, step, 1 << 41))
    steps = RUNS[int(torch.randint(len(RUNS), (), generator=generator))]
    call = int(torch.randint(steps, (), generator=generator))
    return timesteps(steps)[: call + 1]


def matching(
    seed: int,
    step: int,
    places: Sequence[int],
    shape: Sequence[int],
    T: int = 1000,  # noqa: N803
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The fields of objectives.dmd.Draws for the pictures at these places, on the CPU. T: the
    number of timesteps."""
    noise = torch.empty(len(places), max(RUNS) + 2, *shape)
    tau = torch.empty(len(places), 2, dtype=torch.int64)
    generator = torch.Generator()
    for i, place in enumerate(places):
        generator.manual_seed(picture_seed(seed, place, step))
        tau[i].random_(LOWEST * T // 1000, (HIGHEST + 1) * T // 1000, generator=generator)
        noise[i].normal_(generator=generator)
    run, eps = noise.split([max(RUNS), 2], 1)
    return run, eps, tau


def draw(
    seed: int, step: int, places: Sequence[int], shape: Sequence[int], guidance: Sequence[float],
    starts: int = ORIGIN_STEPS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(eps, index, cfg) for the pictures at these places of a step's batch, on the CPU.

    eps: noise [B, *shape] float32; index: int64 [B], below `starts`, the number of places where a
    solver step can start; cfg: float32 [B, 1, 1, 1], within the range of guidance.
    """
    eps = torch.empty(len(places), *shape)
    index = torch.empty(len(places), dtype=torch.int64)
    cfg = torch.empty(len(places), 1, 1, 1)
    generator = torch.Generator()
    low, high = guidance[0], guidance[-1]
    for i, place in enumerate(places):
        generator.manual_seed(picture_seed(seed, place, step))
        index[i] = torch.randint(starts, (), generator=generator)
        cfg[i] = low + (high - low) * torch.rand((), generator=generator)
        eps[i].normal_(generator=generator)
    return eps, index, cfg
