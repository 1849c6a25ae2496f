"""What changes during a run: micro-batch, loss scale, learning rate, and means to report."""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import dataclass, field
from statistics import fmean

from ..memory import TooLittleMemory, has_own_memory, recompute_blocks
from ..spec import Spec
from ..teacher import Teacher

log = logging.getLogger("lcm_lora")
FIRST_SCALE, GROWTH = 2.0**16, 1000


@dataclass
class Progress:
    """The state of a run that its checkpoints keep in state.json, besides the step.

    micro_batch: pictures at a time, as many as memory allows.
    recompute: whether blocks are computed again in backward.
    best, best_step: the smallest distance of the sample pictures. waited: samplings since then.
    best_recall: the largest recall of the sample pictures; None if it was never measured.
    seconds: time spent in the loop.
    unsampled: whether the job has yet to draw this step's sample pictures.
    scale: factor of the loss in float16. It doubles after GROWTH good steps and is halved when a
        gradient overflows (arXiv 1710.03740, section 3.2). good: good steps since then.
    """

    micro_batch: int
    recompute: bool = False
    best: float | None = None
    best_step: int | None = None
    waited: int = 0
    seconds: float = 0.0
    scale: float = 1.0
    good: int = 0
    unsampled: bool = False
    best_recall: float | None = None

    @classmethod
    def first(cls, spec: Spec, half: bool = False) -> Progress:
        """The progress before step 1. half: whether the network computes in float16.

        A job that starts from a LoRA draws samples first, to show what it improves on.
        """
        return cls(
            min(spec.micro_batch or spec.batch, spec.batch), spec.checkpointing == "on",
            scale=FIRST_SCALE if half else 1.0,
            unsampled=bool(spec.start_from and spec.sample_every),
        )  # fmt: skip


@dataclass
class Means:
    """Means over the steps between two lines of metrics; samples and checkpoints do not count."""

    count: int = 0
    losses: float = 0.0
    norms: float = 0.0
    seconds: float = 0.0

    def add(self, loss: float, norm: float, seconds: float) -> None:
        self.count += 1
        self.losses += loss
        self.norms += norm
        self.seconds += seconds

    @property
    def loss(self) -> float:
        return self.losses / self.count

    @property
    def norm(self) -> float:
        return self.norms / self.count

    @property
    def seconds_a_step(self) -> float:
        return self.seconds / self.count


CALLS_A_STEP = 6  # of one picture: teacher (2), target, student, and about two for backward


@dataclass
class Pace:
    """The seconds of the last steps, of a call for sample pictures, and of a checkpoint."""

    steps: deque[float] = field(default_factory=lambda: deque(maxlen=32))
    a_call: float | None = None
    a_save: float = 0.0
    _warm: bool = False

    def add_step(self, seconds: float) -> None:
        """Adds a step. A process's first step prepares more, so it counts only until the second."""
        if len(self.steps) == 1 and not self._warm:
            self.steps.clear()
            self._warm = True
        self.steps.append(seconds)

    def seconds_left(
        self, spec: Spec, step: int, prompts: int = 0, calls: float = 0
    ) -> float | None:
        """An estimate of the seconds left after `step` steps; None before the first step.

        prompts, calls: of the remaining sample pictures; see Samples.calls.
        """
        if not self.steps:
            return None
        a_step = fmean(self.steps)
        # Until a call was measured, estimated from a step and its number of calls.
        a_call = a_step * prompts / (spec.batch * CALLS_A_STEP)
        a_call = a_call if self.a_call is None else self.a_call
        both = math.lcm(spec.sample_every, spec.checkpoint_every)
        saves = [times(every, step, spec.steps) for every in (
            spec.sample_every, spec.checkpoint_every, both)]  # fmt: skip
        saving = self.a_save * (saves[0] + saves[1] - saves[2])
        return a_step * (spec.steps - step) + a_call * calls + saving


def is_due(every: int, step: int, steps: int) -> bool:
    """Whether something that happens every `every` steps, and after the last, follows `step`."""
    return every > 0 and (step % every == 0 or step == steps)


def times(every: int, step: int, steps: int) -> int:
    """How often something that happens every `every` steps, and after the last, follows `step`."""
    if every <= 0 or step >= steps:
        return 0
    return steps // every - step // every + (steps % every > 0)


def use_less_memory(progress: Progress, spec: Spec, teacher: Teacher) -> None:
    """Halves the number of pictures at a time; at 1, recomputes blocks in backward; then keeps
    their weights off the device.

    Raises TooLittleMemory if nothing is left to do.
    """
    if progress.micro_batch > 1:
        progress.micro_batch = math.ceil(progress.micro_batch / 2)
        log.warning(
            "out of memory: going on with %d pictures at a time, %d times a step",
            progress.micro_batch, math.ceil(spec.batch / progress.micro_batch),
        )  # fmt: skip
    elif not progress.recompute and spec.checkpointing == "auto":
        recompute_blocks(teacher.network)
        progress.recompute = True
        log.warning("out of memory: going on with blocks computed again in backward")
    elif progress.recompute and _may_offload(spec, teacher):
        log.warning("out of memory: going on with the blocks' weights off the device")
        teacher.offload()
    else:
        raise TooLittleMemory(
            "The device's memory is too small for a training step with one picture. Choose a "
            "smaller resolution or rank, or close other programs that use the device."
        )


def _may_offload(spec: Spec, teacher: Teacher) -> bool:
    return spec.offloads == "auto" and not teacher.offloaded and has_own_memory(teacher.device)


def learning_rate(spec: Spec, step: int) -> float:
    """The rate of step 0, 1, ...: a linear warm-up, then the decay to 0 over the other steps."""
    if step < spec.warmup:
        return spec.lr * (step + 1) / spec.warmup
    share = (step - spec.warmup) / max(1, spec.steps - spec.warmup)
    if spec.decay == "cosine":
        return spec.lr * 0.5 * (1 + math.cos(math.pi * share))
    return spec.lr * (1 - share) if spec.decay == "linear" else spec.lr
