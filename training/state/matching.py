"""Distribution matching in the loop: its stages, the fake score, and the student's average."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from ...samplers.families import FAMILIES
from ...samplers.transfer import sent
from ..adapter import Adapter
from ..data import draws
from ..data.bank import Bank
from ..objectives.dmd import Draws, Pair
from ..objectives.table import OBJECTIVES
from ..ranks import Ranks
from ..spec import Spec
from ..teacher import Teacher
from .gradients import Consistency, Part, State

FAKE, STUDENT, STAGES = "fake.", "student.", "stages"
RATE, FAKE_RATE = 0.5, 5.0  # of the student while it matches, and of the fake score; x the job's
ALONE = 40  # steps, at most, in which the fake score learns alone
AVERAGE = 0.98  # of the student's moving average, which is what the LoRA file gets


class Matching(Consistency):
    """First the consistency loss, then distribution matching with the consistency loss as anchor.

    A job that starts from a LoRA skips the first part; in any other job it takes half of the steps.
    In the second part, the fake score learns alone for a few steps. Then matching and anchor take
    turns, each with a gradient of the same norm, so that neither outweighs the other.
    """

    def __init__(
        self, spec: Spec, job: Path, teacher: Teacher, adapter: Adapter, bank: Bank, ranks: Ranks
    ):
        super().__init__(spec, job, teacher, adapter, bank, ranks)
        self.fake = Adapter(
            teacher.network, spec.rank, spec.lora_alpha, spec.seed + 1, teacher.targets,
            teacher.device,
        )  # fmt: skip
        self.fake.on = False
        self.pair = Pair(teacher, teacher.schedule, adapter, self.fake, self.dtype)
        self.groups.append(list(self.fake.parameters()))
        self.begins = 0 if spec.start_from else spec.steps // 2
        self.judges_from = self.begins + min(ALONE, (spec.steps - self.begins) // 10)
        self.average: State = {}

    def add(self, step: int, at_a_time: int, scale: float) -> torch.Tensor:
        if not self.is_matching(step):
            return super().add(step, at_a_time, scale)
        if step == self.begins:
            self.average = {name: x.detach().clone() for name, x in self.adapter.state().items()}
            self.fake.restore(self.average)
        total = torch.zeros((), device=self.teacher.device)
        timesteps = draws.run(
            self.spec.seed, step, partial(self.teacher.schedule.run, FAMILIES["lcm"])
        )
        judged = step >= self.judges_from
        for part in self.parts(step, at_a_time):
            batch, drawn = self.batch(part), self._draws(step, part)
            share = len(part.latents) / self.spec.batch
            loss = self.pair.add_gradients(batch, drawn, timesteps, share * scale, judged)
            total += share * loss
        return total

    def is_matching(self, step: int) -> bool:
        """Whether the step trains distribution matching, and not the consistency loss."""
        is_anchor = step > self.judges_from and (step - self.judges_from) % 2 == 1
        return step >= self.begins and not is_anchor

    def may_collapse(self, step: int) -> bool:
        return step > self.judges_from

    def _draws(self, step: int, part: Part) -> Draws:
        shape = part.latents.shape[1:]
        drawn = draws.matching(self.spec.seed, step, part.numbers, shape, self.teacher.schedule.T)
        return Draws(*(sent(x, self.teacher.device) for x in drawn))

    def rates(self, step: int) -> list[float]:
        return [1.0 if step < self.begins else RATE, FAKE_RATE]

    def limit(self, step: int) -> torch.Tensor:
        if step < self.begins:
            return super().limit(step)
        norms = []
        for parameters in self.groups:
            if gradients := [p.grad for p in parameters if p.grad is not None]:
                norm = torch.stack(torch._foreach_norm(gradients)).norm()
                torch._foreach_mul_(gradients, self.spec.clip / norm.clamp(min=1e-12))
                norms.append(norm)
        return norms[0]

    def after(self, step: int) -> None:
        """Moves the average towards the student; faster in its first steps."""
        if step < self.judges_from:
            return
        taken = step - self.judges_from
        weight = 1 - min(AVERAGE, (1 + taken) / (10 + taken))
        for name, factor in self.adapter.state().items():
            self.average[name].lerp_(factor, weight)

    def result(self) -> State:
        return self.average or self.adapter.state()

    @contextmanager
    def shown(self) -> Iterator[None]:
        if not self.average:
            yield
            return
        student = {name: factor.clone() for name, factor in self.adapter.state().items()}
        self.adapter.restore(self.average)
        try:
            yield
        finally:
            self.adapter.restore(student)

    def more(self) -> State:
        if not self.average:
            return {}
        factors = {
            prefix + name: factor
            for prefix, adapter in ((STUDENT, self.adapter), (FAKE, self.fake))
            for name, factor in adapter.state().items()
        }
        return factors | {STAGES: torch.tensor([self.begins, self.judges_from])}

    def restore(self, result: State, more: State) -> None:
        if not more:
            super().restore(result, more)
            return
        # From the checkpoint, because a job that trains for more steps would compute later stages.
        self.begins, self.judges_from = more[STAGES].tolist()
        self.average = {name: x.to(self.teacher.device) for name, x in result.items()}
        for prefix, adapter in ((STUDENT, self.adapter), (FAKE, self.fake)):
            adapter.restore({name.removeprefix(prefix): x for name, x in more.items()})

    def close(self) -> None:
        self.fake.detach()


def gradients_of(
    spec: Spec, job: Path, teacher: Teacher, adapter: Adapter, bank: Bank, ranks: Ranks
) -> Consistency:
    """The gradients that the job's objective needs."""
    kind = Matching if OBJECTIVES[spec.objective].matches else Consistency
    return kind(spec, job, teacher, adapter, bank, ranks)
