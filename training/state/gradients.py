"""The gradients of a training step: its pictures from the bank, and the losses on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ...samplers.transfer import sent
from ..adapter import Adapter
from ..data import draws
from ..data.answers import Answers, folder
from ..data.bank import Bank, Tensors
from ..objectives.batch import Batch
from ..objectives.solver import teacher_step
from ..objectives.table import loss_of, solver_of
from ..ranks import Ranks
from ..spec import Spec
from ..teacher import Teacher

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """Some pictures of a step's batch on the CPU, as the bank and data/draws.py give them.

    places: their places in this process's share of the batch. numbers: their places in the batch of
    all processes.
    """

    places: slice
    numbers: range
    latents: torch.Tensor
    eps: torch.Tensor
    index: torch.Tensor
    cfg: torch.Tensor
    texts: Tensors
    sizes: torch.Tensor


class Consistency:
    """Gradients of the consistency losses: the student at z_t, its target where the teacher's
    solver step leads.

    groups: the parameters that are trained, by optimiser group.
    """

    def __init__(
        self, spec: Spec, job: Path, teacher: Teacher, adapter: Adapter, bank: Bank, ranks: Ranks
    ):
        self.spec, self.teacher, self.adapter, self.bank = spec, teacher, adapter, bank
        self.ranks, self.loss = ranks, loss_of(spec)
        self.groups = [list(adapter.parameters())]
        self.shuffle = draws.Shuffle(bank.shapes, spec.batch * ranks.world, spec.seed)
        self._read: tuple[tuple[int, int], list[Part]] | None = None
        # torch.compile joins the casts with other kernels, where they cost nothing.
        self.dtype = torch.float32 if spec.compile else teacher.dtype
        self.answers = None
        if spec.passes > 1:
            kept = folder(job, spec, bank.folder.name, ranks.world)
            self.answers = Answers(kept, ranks.rank)

    def add(self, step: int, at_a_time: int, scale: float) -> torch.Tensor:
        """Adds `scale` times the gradients of this process's share of step `step` (0, 1, ...),
        `at_a_time` pictures together; -> the mean loss, float32."""
        spec, teacher = self.spec, self.teacher
        original = self.shuffle.original(step, spec.passes)
        answers = self.answers.read(original) if self.answers else None
        total, new_answers = torch.zeros((), device=teacher.device), []
        for part in self.parts(step, at_a_time):
            batch = self.batch(part)
            if answers is None:
                z_s = teacher_step(teacher, self.adapter, teacher.schedule, batch)
                new_answers.append(z_s)
            else:
                z_s = sent(answers[part.places], teacher.device)
            share = len(part.latents) / spec.batch
            with self.adapter.cast(self.dtype):
                loss = self.loss(teacher, teacher.schedule, batch, z_s) * share
                (loss * scale).backward()
            total += loss.detach()
        if self.answers and answers is None:
            self.answers.write(original, torch.cat(new_answers))
            if original % (spec.passes * self.shuffle.per_epoch) == 0:
                self.answers.forget_before(original)
        return total

    def rates(self, step: int) -> list[float]:
        """The learning rate of each group at step `step`, as a multiple of the job's."""
        return [1.0]

    def limit(self, step: int) -> torch.Tensor:
        """Limits the norm of the gradients of step `step`; -> their norm before."""
        return nn.utils.clip_grad_norm_(self.groups[0], self.spec.clip)

    def may_collapse(self, step: int) -> bool:
        """Whether the pictures may become alike after `step` steps. The loss does not show it."""
        return False

    def after(self, step: int) -> None:  # noqa: B027 (most have nothing to do)
        """Called after the optimiser has taken step `step`."""

    def parts(self, step: int, at_a_time: int) -> list[Part]:
        """This process's pictures of step `step`, in parts of `at_a_time`. Keeps the last result,
        so that the caller can read the next step's pictures early."""
        if self._read is None or self._read[0] != (step, at_a_time):
            count = self.spec.batch
            places = [slice(at, min(at + at_a_time, count)) for at in range(0, count, at_a_time)]
            original = self.shuffle.original(step, self.spec.passes)
            self._read = (step, at_a_time), [self._part(original, place) for place in places]
        return self._read[1]

    def _part(self, step: int, places: slice) -> Part:
        """The pictures at these places of this process's part of the batch, with the noise,
        timesteps and guidance of their places in the whole batch."""
        spec, first = self.spec, self.ranks.rank * self.spec.batch
        numbers = range(first + places.start, first + places.stop)
        rows = self.shuffle.rows(step)
        latents, texts, sizes = self.bank.batch([rows[number] for number in numbers])
        starts = len(self.teacher.schedule.starts)
        drawn = draws.draw(spec.seed, step, numbers, latents.shape[1:], spec.guidance, starts)
        return Part(places, numbers, latents, *drawn, texts, sizes)

    def batch(self, part: Part) -> Batch:
        """A part as the objectives take it, on the device."""
        device = self.teacher.device
        cond, uncond = self.teacher.conditions(part.texts, part.sizes)
        z0, eps, index, cfg = (
            sent(x, device) for x in (part.latents, part.eps, part.index, part.cfg)
        )
        schedule = self.teacher.schedule
        return Batch(z0, eps, index, cond, uncond, cfg, *solver_of(self.spec, schedule))

    def result(self) -> State:
        """The factors for the LoRA file, in the form of Adapter.state."""
        return self.adapter.state()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the adapter has the factors of `result`."""
        yield

    def more(self) -> State:
        """What a checkpoint needs besides `result`."""
        return {}

    def close(self) -> None:
        """Removes everything but the adapter from the network."""

    def restore(self, result: State, more: State) -> None:
        """Sets the state that `result` and `more` returned."""
        self.adapter.restore(result)
