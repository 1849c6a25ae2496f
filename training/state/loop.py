"""The distillation loop: from a bank and a teacher to a trained adapter, resumable to the bit."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from .. import disk
from ..adapter import Adapter
from ..data import draws
from ..data.bank import Bank
from ..memory import compile_blocks, give_back, is_out_of_memory, memory, recompute_blocks
from ..ranks import Ranks
from ..spec import Spec
from ..teacher import Teacher
from ..waiting import ACTIONS, Action
from . import checkpoints
from .journal import Journal
from .matching import gradients_of
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
from .samples import Samples

log = logging.getLogger("lcm_lora")
INTERRUPTED = -1e9  # in place of a distance
COLLAPSED = 0.5  # share of the best recall so far; chance does not halve the recall


class Diverged(ValueError):
    """The loss or the gradient is not a finite number."""


class Interrupted(Exception):
    """A request came between two calls of the network. Drops the step or sampling under way."""


@dataclass
class Run:
    """One process's share of a training.

    journal, samples: set in the first process, None in the others. request() returns the requested
    action. step: the number of finished steps.
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
        self.gradients = gradients_of(
            spec, self.job, self.teacher, self.adapter, self.bank, self.ranks
        )
        # Fused into one kernel on CUDA; on the CPU that would change the order of rounding.
        fused = self.teacher.device.type == "cuda" or None
        groups = [{"params": group} for group in self.gradients.groups]
        self.optimiser = torch.optim.AdamW(groups, lr=spec.lr, weight_decay=0.0, fused=fused)
        self.half = self.teacher.dtype == torch.float16
        self.progress = Progress.first(spec, self.half)
        self.means, self.pace = Means(), Pace()
        self._interrupted: Action = ""
        self._draws: float | None = None  # remaining calls of the current sampling

    def train(self) -> str:
        """Trains to the last step, or until a request; -> "done", "pause" or "finish".

        Raises Diverged (the last good checkpoint stays), and OSError if the disk is full.
        """
        self.resume()
        self.progress.recompute |= self.teacher.offloaded
        if self.progress.recompute:
            recompute_blocks(self.teacher.network)
        if self.spec.compile:
            compile_blocks(self.teacher.network)
        if self.journal is not None:
            figures = {"step": self.step, "steps": self.spec.steps, "seconds_left": None}
            self.journal.state("running", "training", **figures)
        self.teacher.before_call = self._before_call
        try:
            action = self._train()
            if action != "pause":
                self.adapter.restore(self.gradients.result())
            return action
        finally:
            self.teacher.before_call = lambda: None
            self.gradients.close()

    def _train(self) -> str:
        begun, before = time.monotonic(), self.progress.seconds
        while self.step < self.spec.steps or self.progress.unsampled:
            if action := self._agreed(self._requested()):
                self.save()
                return action
            if self.progress.unsampled:
                is_enough = self.draw_samples()
                if self.progress.unsampled:
                    continue  # a request interrupted the sampling
                # Saved after sampling, because this adapter may be the best so far.
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

    def _requested(self) -> Action:
        """The request to this process. A "finish" waits for step 1, because before it the LoRA has
        no effect. After an interruption, the answer stays the same."""
        action = self._interrupted or self.request()
        return "" if action == "finish" and not self.step else action

    def _before_call(self) -> None:
        """Raises Interrupted if there is a request. Several processes must take each step together,
        so there a request waits for the end of the step."""
        if self._draws is not None or self.ranks.world == 1:
            self._interrupted = self._requested()
            if self._interrupted:
                raise Interrupted

    def one_step(self) -> tuple[float, float]:
        """One optimiser step; -> (loss, gradient norm before clipping), over all processes."""
        while True:
            try:
                at_a_time, scale = self.progress.micro_batch, self.progress.scale
                self.optimiser.zero_grad()
                total = self.gradients.add(self.step, at_a_time, scale)
                parameters = (p for group in self.gradients.groups for p in group)
                gradients = [p.grad for p in parameters if p.grad is not None]
                self.ranks.mean_([total, *gradients])
                if self.step + 1 < self.spec.steps:
                    self.gradients.parts(self.step + 1, at_a_time)  # while the device computes
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler, because its traceback would keep the tensors that did not fit.
            self.optimiser.zero_grad()
            give_back()
            use_less_memory(self.progress, self.spec, self.teacher)
        if self.progress.scale != 1:
            torch._foreach_div_(gradients, self.progress.scale)
        before = self.gradients.limit(self.step).to(total.device)
        # The only moment of a step that waits for the device.
        loss, norm = torch.stack([total, before]).tolist()
        if self._is_finite(loss, norm):
            rates = self.gradients.rates(self.step)
            for group, rate in zip(self.optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate(self.spec, self.step)
            self.optimiser.step()
            self.gradients.after(self.step)
        return loss, norm

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
            "newest checkpoint is still good. Start a new job with a lower lr"
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
        """Reports the current activity and its progress in the journal's next beat."""
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
        """Remaining calls for sample pictures, in the current sampling and in later ones."""
        if self.samples is None:
            return 0
        later = times(self.spec.sample_every, self.step, self.spec.steps)
        if self._draws is not None:
            return self._draws + self.samples.calls(later)
        return self.samples.calls(later + self.progress.unsampled)

    def draw_samples(self) -> bool:
        """Draws sample pictures; -> whether the last `patience` samplings were no better.

        Better means a smaller distance to the bank's pictures, added up over 1, 2 and 4 steps; or,
        if the bank has too few pictures for that, to the teacher's at 1 step. If a request comes
        meanwhile, progress.unsampled stays true. Raises Diverged if the pictures have collapsed.
        """
        progress, score, recall = self.progress, math.nan, math.nan
        if self.samples is not None:
            cfg = draws.mean_guidance(self.spec.guidance)
            try:
                with self.gradients.shown():
                    counter = self._counter()
                    errors = self.samples.draw(self.adapter, self.step, cfg, counter)
                    likeness = self.samples.compare(self.adapter, counter)
                if self.journal is not None:
                    self.journal.metrics(step=self.step, endpoint_error=errors, **likeness)
                log.info("step %d: endpoint error %s %s", self.step, errors, likeness or "")
                score = errors["1"]
                if likeness:
                    score = sum(likeness["distance"].values())
                    recall = fmean(likeness["recall"].values())
            except Interrupted:
                score = INTERRUPTED
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                log.warning("out of memory: no sample pictures of step %d", self.step)
            finally:
                self._draws = None
        score = self.ranks.from_first(score, self.teacher.device)
        recall = self.ranks.from_first(recall, self.teacher.device)
        progress.unsampled = score == INTERRUPTED
        if progress.unsampled or math.isnan(score):
            return False
        if not math.isnan(recall):
            self._require_variety(recall)
        if progress.best is None or score < progress.best:
            progress.best, progress.best_step, progress.waited = score, self.step, 0
        else:
            progress.waited += 1
        return 0 < self.spec.patience <= progress.waited

    def _require_variety(self, recall: float) -> None:
        """Raises Diverged if distribution matching has made all pictures alike."""
        progress = self.progress
        if progress.best_recall is None:
            progress.best = None  # an earlier version measured it in another way
        best = progress.best_recall = max(progress.best_recall or 0.0, recall)
        if self.gradients.may_collapse(self.step) and recall < COLLAPSED * best:
            raise Diverged(
                f"The pictures became alike: at step {self.step} their recall is {recall:.2f}, and "
                f"it was {best:.2f} before. The best checkpoint, of step {progress.best_step}, is "
                "kept: use it in the graph, or start a new job from it with a lower lr."
            )

    def _counter(self) -> Callable[[float], None]:
        """Begins a sampling; -> the function that counts its calls and reports its pictures."""
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
                self.step, self.gradients.result(), checkpoints.flat(self.optimiser),
                vars(self.progress).copy(), self.gradients.more(),
            )  # fmt: skip
            checkpoints.save(self.folder, checkpoint)
            checkpoints.prune(self.folder, self.spec.keep, self.progress.best_step)
        self.ranks.wait()
        self.pace.a_save = time.monotonic() - begun
        self.note("training")

    def resume(self) -> None:
        """Continues from the newest complete checkpoint, or starts at step 0."""
        if self.ranks.first:
            disk.clear_torn(self.folder)
        checkpoint = checkpoints.newest(self.folder)
        if checkpoint is not None:
            self.gradients.restore(checkpoint.adapter, checkpoint.more)
            checkpoints.restore(self.optimiser, checkpoint.optimiser)
            self.progress = Progress(**checkpoint.state)
            self.step = checkpoint.step
            log.info("continuing after step %d", self.step)
        if self.journal is not None:
            self.journal.forget_after(self.step, self.progress.unsampled)

    def take_back_best(self) -> None:
        """Returns to the checkpoint with the smallest distance. The result names its step."""
        best = checkpoints.read(self.folder, self.progress.best_step or 0)
        self.gradients.restore(best.adapter, best.more)
        self.step = best.step
        log.info("no improvement since step %d: ending early", best.step)

    def _is_due(self, every: int) -> bool:
        return is_due(every, self.step, self.spec.steps)

    def _agreed(self, action: Action) -> Action:
        """The request that any of the processes got, because all must follow it together."""
        return ACTIONS[int(self.ranks.highest(ACTIONS.index(action), self.teacher.device))]
