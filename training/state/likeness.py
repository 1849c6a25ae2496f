"""Measures how near the student's few-step pictures are to the data, with the frozen network.

The network without the adapter sees each picture with a little noise. The mean and deviation of
each channel of its deepest block are the features of the picture. Two sets of pictures are compared
by the energy distance of their features (Szekely and Rizzo 2013, equation 5) and by recall (arXiv
1904.06991, equation 1). Unlike the distance to the teacher's pictures, neither rewards blur, and
fresh noise does no harm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...samplers.families import FAMILIES
from ...samplers.noise import picture_noise
from ..adapter import Adapter
from ..data.bank import Bank, Tensors, square_sizes, together
from ..memory import blocks_of, in_parts
from ..teacher import Teacher
from .few_steps import few_steps

STEPS = (1, 2, 4)
PICTURES, LEAST = 64, 16  # the most, and the fewest: with fewer, chance decides the figures
TIMESTEP = 49  # of 1000: little noise, so that sharpness counts
NEIGHBOURS = 3
AT_ONCE = 8  # pictures in a call
Figures = dict[str, dict[str, float]]


class Likeness:
    """Compares the student's pictures of the bank's captions with the bank's latents.

    Captions and noise stay the same, so that only the student makes two measurements differ.
    """

    def __init__(self, teacher: Teacher, bank: Bank, family: str, seed: int) -> None:
        """Raises ValueError if the bank has fewer than LEAST latents of one shape."""
        self.teacher, self.bank = teacher, bank
        self.family, self.seed = FAMILIES[family], seed
        shape, count = Counter(bank.shapes).most_common(1)[0]
        if count < LEAST:
            raise ValueError(f"the bank has {count} latents of one shape, expected {LEAST} or more")
        rows = [row for row, other in enumerate(bank.shapes) if other == shape]
        number = min(PICTURES, count)
        self.rows = [rows[i * count // number] for i in range(number)]
        self._tap = _deepest(teacher.network)
        self._real: Tensor | None = None
        self._called: Callable[[int], None] = lambda calls: None

    @property
    def calls(self) -> int:
        """Network calls of one picture that a measurement takes."""
        return len(self.rows) * (sum(STEPS) + len(STEPS) + (self._real is None))

    @torch.no_grad()
    def measure(
        self, adapter: Adapter, called: Callable[[int], None] = lambda calls: None
    ) -> Figures:
        """{"distance": {"1": ..., "2": ..., "4": ...}, "recall": {...}}, by the number of steps.
        called(n): called after n network calls for one picture."""
        self._called = called
        if self._real is None:
            self._real = torch.stack(in_parts(self.rows, AT_ONCE, self._of_bank(adapter)))
        deviation = self._real.std(0).clamp(min=1e-6)
        real = self._real / deviation
        figures: Figures = {"distance": {}, "recall": {}}
        for steps in STEPS:
            drawn = torch.stack(in_parts(self.rows, AT_ONCE, self._of_student(adapter, steps)))
            figures["distance"][str(steps)] = energy_distance(drawn / deviation, real)
            figures["recall"][str(steps)] = share_inside(real, drawn / deviation)
        return figures

    def _of_bank(self, adapter: Adapter) -> Callable[[Sequence[int]], list[Tensor]]:
        def make(rows: Sequence[int]) -> list[Tensor]:
            return list(self._features(adapter, self.bank.batch(rows)[0], rows))

        return make

    def _of_student(self, adapter: Adapter, steps: int) -> Callable[[Sequence[int]], list[Tensor]]:
        teacher = self.teacher

        def make(rows: Sequence[int]) -> list[Tensor]:
            latents, texts, sizes = self.bank.batch(rows)
            cond, _ = teacher.conditions(texts, sizes)
            noise = picture_noise(latents, self.seed, rows)
            made = few_steps(
                teacher, teacher.schedule, lambda step: noise(step).to(teacher.device), steps, cond,
                self.family,
            )  # fmt: skip
            self._called(steps * len(rows))
            return list(self._features(adapter, made, rows))

        return make

    def _features(self, adapter: Adapter, latents: Tensor, rows: Sequence[int]) -> Tensor:
        """The features of latents [B, C, h, w]: [B, features], float32 on the CPU."""
        teacher = self.teacher
        eps = picture_noise(latents.cpu(), self.seed + 1, rows)(0).to(teacher.device)
        t = torch.full((len(rows),), TIMESTEP * teacher.schedule.T // 1000, device=teacher.device)
        seen: list[Tensor] = []
        hook = self._tap.register_forward_hook(lambda _m, _i, output: seen.append(summary(output)))
        try:
            with adapter.off():
                z = teacher.schedule.noised(latents.to(teacher.device), eps, t)
                teacher(z, t, **self._empty(len(rows)))
        finally:
            hook.remove()
        self._called(len(rows))
        return torch.cat(seen).cpu()

    def _empty(self, count: int) -> Tensors:
        """The condition of the empty prompt, which is the same for all pictures."""
        text = {name: tensor.cpu() for name, tensor in self.teacher.uncond.items()}
        sizes = torch.tensor(
            [square_sizes(self.teacher.shrink * self.bank.shapes[self.rows[0]][-1])] * count
        )
        return self.teacher.conditions(together([text] * count), sizes)[0]


def _deepest(network: nn.Module) -> nn.Module:
    """The middle of a UNet, or the block in the middle of a transformer."""
    unet: Any = network
    if hasattr(network, "input_blocks"):
        # The block's last layer, because ComfyUI calls the layers of a block one by one.
        middle: nn.Module = (getattr(unet, "middle_block", None) or unet.input_blocks[-1])[-1]
        return middle
    blocks = blocks_of(network)
    return blocks[len(blocks) // 2]


def summary(output: Any) -> Tensor:
    """Mean and deviation of each channel over all places: [B, 2 C] in float32.

    output: [B, C, ...] of a convolution, [B, N, C] of a transformer's block, or several of these.
    """
    parts = output if isinstance(output, tuple | list) else (output,)
    made = []
    for part in parts:
        if torch.is_tensor(part) and part.is_floating_point() and part.ndim >= 3:
            x = part.float().movedim(1, -1) if part.ndim > 3 else part.float()
            x = x.flatten(1, -2)  # [B, places, C]
            made += [x.mean(1), x.std(1)]
    return torch.cat(made, 1)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """The unbiased energy distance of two samples [N, D] and [M, D], divided by the root of D. It
    is 0 on average for samples of one distribution, so single values can be below 0."""
    within = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(2 * torch.cdist(a, b).mean() - within[0] - within[1]) / a.shape[1] ** 0.5


def share_inside(points: Tensor, others: Tensor) -> float:
    """The share of points [N, D] within the manifold of others [M, D] (arXiv 1904.06991, equation
    1). A point is inside if it is as near to one of the others as that one's own third neighbour.
    Recall is the share of real pictures inside the drawn ones."""
    radius = torch.cdist(others, others).kthvalue(NEIGHBOURS + 1, dim=1).values  # first: itself
    return float((torch.cdist(points, others) <= radius).any(1).float().mean())
