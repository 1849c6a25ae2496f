"""The distillation loop: from a bank and a teacher to a trained adapter, resumable to the bit."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
from .progress import GROWTH, Means, Progress, learning_rate, use_less_memory
from .samples import Samples

log = logging.getLogger("lcm_lora")


class Diverged(ValueError):
    """The loss or the gradient is not a finite number."""


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
        begun, before = time.monotonic(), self.progress.seconds
        means = Means()
        while self.step < self.spec.steps:
            if action := self._agreed(self.request()):
                self.save()
                return action
            started = time.monotonic()
            loss, norm = self.one_step()
            self.step += 1
            means.add(loss, norm, time.monotonic() - started)
            self.progress.seconds = before + time.monotonic() - begun
            if self._is_due(self.spec.log_every):
                self.report(means)
                means = Means()
            samples_are_due = self._is_due(self.spec.sample_every)
            is_enough = samples_are_due and self.draw_samples()
            # Saved after sampling too, because the best adapter so far may be needed again.
            if samples_are_due or self._is_due(self.spec.checkpoint_every):
                self.save()
            if is_enough:
                self.take_back_best()
                break
        return "done"

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

    def report(self, means: Means) -> None:
        """Writes a line of metrics and the state. The loss is the mean since the last line."""
        if self.journal is None:
            return
        seconds_left = means.seconds_a_step * (self.spec.steps - self.step)
        pictures = self.spec.batch * self.ranks.world
        figures = {
            "step": self.step, "loss": means.loss, "gradient_norm": means.norm,
            "lr": learning_rate(self.spec, self.step - 1),
            "samples_per_second": round(pictures / means.seconds_a_step, 3),
            "memory": memory(self.teacher.device), "seconds_left": round(seconds_left, 1),
        }  # fmt: skip
        self.journal.metrics(**figures)
        self.journal.state("running", steps=self.spec.steps, **figures)
        log.info(
            "step %d of %d: loss %.4f, %.0f s left",
            self.step, self.spec.steps, means.loss, seconds_left,
        )  # fmt: skip

    def draw_samples(self) -> bool:
        """Draws sample pictures; -> whether their error has not improved for `patience` times."""
        progress, first_error = self.progress, math.nan
        if self.samples is not None:
            cfg = draws.mean_guidance(self.spec.guidance)
            try:
                errors = self.samples.draw(self.adapter, self.step, cfg)
                if self.journal is not None:
                    self.journal.metrics(step=self.step, endpoint_error=errors)
                log.info("step %d: endpoint error %s", self.step, errors)
                first_error = errors["1"]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                log.warning("out of memory: no sample pictures of step %d", self.step)
        endpoint_error = self.ranks.from_first(first_error, self.teacher.device)
        if math.isnan(endpoint_error):
            return False
        if progress.best is None or endpoint_error < progress.best:
            progress.best, progress.best_step, progress.waited = endpoint_error, self.step, 0
        else:
            progress.waited += 1
        return 0 < self.spec.patience <= progress.waited

    def save(self) -> None:
        """The first process writes a checkpoint of this step and removes old ones beyond `keep`."""
        if self.ranks.first:
            checkpoint = checkpoints.Checkpoint(
                self.step, self.adapter.state(), checkpoints.flat(self.optimiser),
                vars(self.progress).copy(),
            )  # fmt: skip
            checkpoints.save(self.folder, checkpoint)
            checkpoints.prune(self.folder, self.spec.keep, self.progress.best_step)
        self.ranks.wait()

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
            self.journal.forget_after(self.step)

    def take_back_best(self) -> None:
        """Returns to the adapter with the smallest error, whose step the result then names."""
        best = checkpoints.read(self.folder, self.progress.best_step or 0)
        self.adapter.restore(best.adapter)
        self.step = best.step
        log.info("no improvement since step %d: ending early", best.step)

    def _is_due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.spec.steps)

    def _agreed(self, action: Action) -> Action:
        """What any process was asked to do, because all must do the same."""
        return ACTIONS[int(self.ranks.highest(ACTIONS.index(action), self.teacher.device))]
