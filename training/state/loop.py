"""The distillation loop: from a bank and a teacher to a trained adapter, resumable to the bit."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...samplers.transfer import sent
from .. import disk
from ..adapter import Adapter
from ..data import draws
from ..data.answers import Answers, folder
from ..data.bank import Bank, Tensors
from ..memory import compile_blocks, give_back, is_out_of_memory, memory, recompute_blocks
from ..objectives.batch import Batch
from ..objectives.solver import teacher_step
from ..objectives.table import loss_of
from ..ranks import Ranks
from ..spec import Spec
from ..teacher import Teacher
from ..waiting import ACTIONS, Action
from . import checkpoints
from .journal import Journal
from .progress import (
    GROWTH,
    Means,
    Pace,
    Progress,
    is_due,
    learning_rate,
    times,
    use_less_memory,
)  # fmt: skip
from .samples import CALLS, Samples

log = logging.getLogger("lcm_lora")
INTERRUPTED = -1.0  # in place of an error, which is never negative


class Diverged(ValueError):
    """The loss or the gradient is not a finite number."""


class Interrupted(Exception):
    """An action was asked for between two calls of the network. What was begun is not counted."""


@dataclass(frozen=True)
class _Part:
    """Some pictures of a step's batch on the CPU, as the bank and data/draws.py give them.

    places: which of this process's part of the batch they are.
    """

    places: slice
    latents: torch.Tensor
    eps: torch.Tensor
    index: torch.Tensor
    cfg: torch.Tensor
    texts: Tensors
    sizes: torch.Tensor


@dataclass
class Run:
    """One process's part of a training.

    journal, samples: set in the first process, None in the others. request() returns the requested
    action. step: how many steps are done.
    """

    spec: Spec
    job: Path
    teacher: Teacher
    adapter: Adapter
    bank: Bank
    ranks: Ranks
    journal: Journal | None
    samples: Samples | None
    request: Callable[[], Action]
    step: int = 0

    def __post_init__(self) -> None:
        spec = self.spec
        self.folder = self.job / "checkpoints"
        self.loss = loss_of(spec)
        self.parameters = list(self.adapter.parameters())
        # Fused into one kernel on CUDA; on the CPU that would change the order of rounding.
        fused = self.teacher.device.type == "cuda" or None
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=spec.lr, weight_decay=0.0, fused=fused
        )
        self.shuffle = draws.Shuffle(self.bank.shapes, spec.batch * self.ranks.world, spec.seed)
        self.half = self.teacher.dtype == torch.float16
        self.progress = Progress.first(spec, self.half)
        self.means, self.pace = Means(), Pace()
        self._interrupted: Action = ""
        self._draws: float | None = None  # calls that are left of the sampling under way
        self._read: tuple[tuple[int, int], list[_Part]] | None = None
        self.answers = None
        if spec.passes > 1:
            kept = folder(self.job, spec, self.bank.folder.name, self.ranks.world)
            self.answers = Answers(kept, self.ranks.rank)

    def train(self) -> str:
        """Trains to the last step, or until something is asked; -> "done", "pause" or "finish".

        Raises Diverged (the last good checkpoint stays), and OSError if the disk is full.
        """
        self.resume()
        if self.progress.recompute:
            recompute_blocks(self.teacher.network)
        if self.spec.compile:
            compile_blocks(self.teacher.network)
        if self.journal is not None:
            figures = {"step": self.step, "steps": self.spec.steps, "seconds_left": None}
            self.journal.state("running", "training", **figures)
        self.teacher.before_call = self._before_call
        try:
            return self._train()
        finally:
            self.teacher.before_call = lambda: None

    def _train(self) -> str:
        begun, before = time.monotonic(), self.progress.seconds
        while self.step < self.spec.steps or self.progress.unsampled:
            if action := self._agreed(self._asked()):
                self.save()
                return action
            if self.progress.unsampled:
                is_enough = self.draw_samples()
                if self.progress.unsampled:
                    continue  # something is asked
                # Saved after sampling, because the best adapter so far may be needed again.
                self.save()
                if is_enough:
                    self.take_back_best()
                    break
                continue
            started = time.monotonic()
            try:
                loss, norm = self.one_step()
            except Interrupted:
                continue
            self.step += 1
            seconds = time.monotonic() - started
            self.means.add(loss, norm, seconds)
            self.pace.add_step(seconds)
            self.progress.seconds = before + time.monotonic() - begun
            self.progress.unsampled = self._is_due(self.spec.sample_every)
            if self._is_due(self.spec.log_every):
                self.report()
            else:
                self.note("training")
            if not self.progress.unsampled and self._is_due(self.spec.checkpoint_every):
                self.save()
        return "done"

    def _asked(self) -> Action:
        """What is asked of this process. A "finish" waits for step 1: before it, the LoRA does
        nothing. Once something was interrupted, the answer stays the same."""
        action = self._interrupted or self.request()
        return "" if action == "finish" and not self.step else action

    def _before_call(self) -> None:
        """Raises Interrupted if something is asked. Several processes must all take a step, so
        there an action waits for the step's end."""
        if self._draws is not None or self.ranks.world == 1:
            self._interrupted = self._asked()
            if self._interrupted:
                raise Interrupted

    def one_step(self) -> tuple[float, float]:
        """One optimiser step; -> (loss, gradient norm before clipping), over all processes."""
        while True:
            try:
                total = self.add_gradients()
                gradients = [p.grad for p in self.parameters if p.grad is not None]
                self.ranks.mean_([total, *gradients])
                if self.step + 1 < self.spec.steps:
                    self.parts(self.step + 1)  # while the device computes this step
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler, because its traceback would keep the tensors that did not fit.
            self.optimiser.zero_grad()
            give_back()
            use_less_memory(self.progress, self.spec, self.teacher.network)
        if self.progress.scale != 1:
            torch._foreach_div_(gradients, self.progress.scale)
        clipped = nn.utils.clip_grad_norm_(self.parameters, self.spec.clip)
        # The only moment of a step that waits for the device.
        loss, norm = torch.stack([total, clipped]).tolist()
        if self._is_finite(loss, norm):
            for group in self.optimiser.param_groups:
                group["lr"] = learning_rate(self.spec, self.step)
            self.optimiser.step()
        return loss, norm

    def add_gradients(self) -> torch.Tensor:
        """Adds up the gradients of this process's part of the batch; -> its mean loss, float32."""
        self.optimiser.zero_grad()
        spec, teacher = self.spec, self.teacher
        step = self.shuffle.original(self.step, spec.passes)
        answers = self.answers.read(step) if self.answers else None
        total, new_answers = torch.zeros((), device=teacher.device), []
        # torch.compile joins the casts with other kernels, where they cost nothing.
        dtype = torch.float32 if spec.compile else teacher.dtype
        for part in self.parts(self.step):
            batch = self.batch(part)
            if answers is None:
                z_s = teacher_step(teacher, self.adapter, teacher.schedule, batch)
                new_answers.append(z_s)
            else:
                z_s = sent(answers[part.places], teacher.device)
            share = len(part.latents) / spec.batch
            with self.adapter.cast(dtype):
                loss = self.loss(teacher, teacher.schedule, batch, z_s) * share
                (loss * self.progress.scale).backward()
            total += loss.detach()
        if self.answers and answers is None:
            self.answers.write(step, torch.cat(new_answers))
            if step % (spec.passes * self.shuffle.per_epoch) == 0:
                self.answers.forget_before(step)
        return total

    def parts(self, step: int) -> list[_Part]:
        """This process's pictures of step `step` (0, 1, ...), as many at a time as memory allows.
        The last ones are kept, so that they can be read before their step begins."""
        size = self.progress.micro_batch
        if self._read is None or self._read[0] != (step, size):
            starts = range(0, self.spec.batch, size)
            places = [slice(start, min(start + size, self.spec.batch)) for start in starts]
            original = self.shuffle.original(step, self.spec.passes)
            self._read = (step, size), [self._part(original, place) for place in places]
        return self._read[1]

    def _part(self, step: int, places: slice) -> _Part:
        """The pictures at these places of this process's part of the batch, with the noise,
        timesteps and guidance of their places in the whole batch."""
        spec, first = self.spec, self.ranks.rank * self.spec.batch
        numbers = range(first + places.start, first + places.stop)
        rows = self.shuffle.rows(step)
        latents, texts, sizes = self.bank.batch([rows[number] for number in numbers])
        drawn = draws.draw(spec.seed, step, numbers, latents.shape[1:], spec.guidance)
        return _Part(places, latents, *drawn, texts, sizes)

    def batch(self, part: _Part) -> Batch:
        """A part as the objectives take it, on the device."""
        device = self.teacher.device
        cond, uncond = self.teacher.conditions(part.texts, part.sizes)
        z0, eps, index, cfg = (
            sent(x, device) for x in (part.latents, part.eps, part.index, part.cfg)
        )
        return Batch(z0, eps, index, cond, uncond, cfg)

    def _is_finite(self, loss: float, norm: float) -> bool:
        """Whether the step may be taken. Raises Diverged if a smaller scale cannot help."""
        progress = self.progress
        if math.isfinite(loss) and math.isfinite(norm):
            progress.good += 1
            if self.half and progress.good % GROWTH == 0:
                progress.scale *= 2
            return True
        if math.isfinite(loss) and self.half and progress.scale > 1:
            progress.scale, progress.good = progress.scale / 2, 0
            log.info("a gradient overflowed: step %d is skipped", self.step + 1)
            return False
        raise Diverged(
            f"The loss became {loss} and the gradient's norm {norm} in step {self.step + 1}. The "
            "newest checkpoint is good; continue from it with a lower lr"
            + (" or with precision bf16." if self.half else ".")
        )

    def report(self) -> None:
        """Writes a line of metrics and the status. The loss is the mean since the last line."""
        if self.journal is not None:
            figures = self._figures()
            self.journal.metrics(**figures)
            self.journal.state("running", "training", **figures)
            log.info(
                "step %d of %d: loss %.4f, %s left",
                self.step, self.spec.steps, figures["loss"],
                str(timedelta(seconds=round(figures["seconds_left"]))),
            )  # fmt: skip
        self.means = Means()

    def note(self, activity: str, done: int = 0, total: int = 0) -> None:
        """Says what is being done, and how far it is, in the journal's next beat."""
        if self.journal is not None:
            self.journal.note(activity, activity_done=done, activity_total=total, **self._figures())

    def _figures(self) -> dict[str, Any]:
        """Step, time left, and the means of the steps since the last line of metrics."""
        left = self.pace.seconds_left(
            self.spec, self.step, len(self.samples.texts) if self.samples else 0, self._calls_left()
        )
        figures = {"step": self.step, "seconds_left": None if left is None else round(left, 1)}
        if not self.means.count:
            return figures
        pictures = self.spec.batch * self.ranks.world
        return figures | {
            "loss": self.means.loss, "gradient_norm": self.means.norm,
            "lr": learning_rate(self.spec, self.step - 1),
            "samples_per_second": round(pictures / self.means.seconds_a_step, 3),
            "memory": memory(self.teacher.device),
        }  # fmt: skip

    def _calls_left(self) -> float:
        """Calls for sample pictures, in the rest of the present sampling and in later ones."""
        if self.samples is None:
            return 0
        later = times(self.spec.sample_every, self.step, self.spec.steps)
        if self._draws is not None:
            return self._draws + later * CALLS
        return self.samples.calls(later + self.progress.unsampled)

    def draw_samples(self) -> bool:
        """Draws sample pictures; -> whether their error has not improved for `patience` times.

        If something is asked meanwhile, progress.unsampled stays true.
        """
        progress, first_error = self.progress, math.nan
        if self.samples is not None:
            cfg = draws.mean_guidance(self.spec.guidance)
            try:
                errors = self.samples.draw(self.adapter, self.step, cfg, self._counter())
                if self.journal is not None:
                    self.journal.metrics(step=self.step, endpoint_error=errors)
                log.info("step %d: endpoint error %s", self.step, errors)
                first_error = errors["1"]
            except Interrupted:
                first_error = INTERRUPTED
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                log.warning("out of memory: no sample pictures of step %d", self.step)
            finally:
                self._draws = None
        endpoint_error = self.ranks.from_first(first_error, self.teacher.device)
        progress.unsampled = endpoint_error == INTERRUPTED
        if progress.unsampled:
            return False
        if math.isnan(endpoint_error):
            return False
        if progress.best is None or endpoint_error < progress.best:
            progress.best, progress.best_step, progress.waited = endpoint_error, self.step, 0
        else:
            progress.waited += 1
        return 0 < self.spec.patience <= progress.waited

    def _counter(self) -> Callable[[float], None]:
        """Counts the calls of the sampling that begins, and says how many pictures they are."""
        assert self.samples is not None
        total, pictures, begun = self.samples.calls(1), self.samples.pictures, time.monotonic()
        self._draws = left = float(total)
        self.note("drawing samples", 0, pictures)

        def drawn(calls: float) -> None:
            nonlocal left
            # Not below 0, because calls are repeated when memory runs out.
            self._draws = left = max(0.0, left - calls)
            self.pace.a_call = (time.monotonic() - begun) / (total - left)
            share = 1 - left / total
            self.note("drawing samples", int(pictures * share + 1e-6), pictures)

        return drawn

    def save(self) -> None:
        """The first process writes a checkpoint of this step and removes old ones beyond `keep`."""
        begun = time.monotonic()
        self.note("saving")
        if self.ranks.first:
            checkpoint = checkpoints.Checkpoint(
                self.step, self.adapter.state(), checkpoints.flat(self.optimiser),
                vars(self.progress).copy(),
            )  # fmt: skip
            checkpoints.save(self.folder, checkpoint)
            checkpoints.prune(self.folder, self.spec.keep, self.progress.best_step)
        self.ranks.wait()
        self.pace.a_save = time.monotonic() - begun
        self.note("training")

    def resume(self) -> None:
        """Goes on from the newest complete checkpoint, or starts at step 0."""
        if self.ranks.first:
            disk.clear_torn(self.folder)
        checkpoint = checkpoints.newest(self.folder)
        if checkpoint is not None:
            self.adapter.restore(checkpoint.adapter)
            checkpoints.restore(self.optimiser, checkpoint.optimiser)
            self.progress = Progress(**checkpoint.state)
            self.step = checkpoint.step
            log.info("going on after step %d", self.step)
        if self.journal is not None:
            self.journal.forget_after(self.step, self.progress.unsampled)

    def take_back_best(self) -> None:
        """Returns to the adapter with the smallest error, whose step the result then names."""
        best = checkpoints.read(self.folder, self.progress.best_step or 0)
        self.adapter.restore(best.adapter)
        self.step = best.step
        log.info("no improvement since step %d: ending early", best.step)

    def _is_due(self, every: int) -> bool:
        return is_due(every, self.step, self.spec.steps)

    def _agreed(self, action: Action) -> Action:
        """What any process was asked to do, because all must do the same."""
        return ACTIONS[int(self.ranks.highest(ACTIONS.index(action), self.teacher.device))]
