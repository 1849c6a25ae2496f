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

from .. import disk
from ..adapter import Adapter
from ..data import draws
from ..data.answers import Answers, folder
from ..data.bank import Bank
from ..memory import (
    TooLittleMemory,
    compile_blocks,
    give_back,
    is_out_of_memory,
    memory,
    recompute_blocks,
)
from ..objectives.lcm import lcm_loss, teacher_step
from ..objectives.phased import phased_loss
from ..ranks import Ranks
from ..spec import Spec
from . import checkpoints
from .journal import Journal
from .samples import Samples

log = logging.getLogger("lcm_lora")
FIRST_SCALE, GROWTH = 2.0**16, 1000


class Diverged(ValueError):
    """The loss or the gradient is not a finite number."""


@dataclass
class Progress:
    """What a checkpoint's state.json holds beside the step.

    micro_batch: pictures at a time, as memory allows. recompute: blocks are run again in backward.
    best, best_step, waited: of the sampled error at 1 step, for keeping and early stopping.
    seconds: spent in the loop so far.
    scale, good: fp16's loss is multiplied by scale, which doubles after GROWTH good steps and is
        halved when a gradient overflows (arXiv 1710.03740, section 3.2).
    """

    micro_batch: int
    recompute: bool = False
    best: float | None = None
    best_step: int | None = None
    waited: int = 0
    seconds: float = 0.0
    scale: float = 1.0
    good: int = 0


@dataclass
class Run:
    """One process's part of a job."""

    spec: Spec
    job: Path
    teacher: object
    adapter: Adapter
    bank: Bank
    ranks: Ranks
    journal: Journal | None
    samples: Samples | None
    asked: Callable[[], str]
    """What the outside wants: "", "pause" (save and end) or "finish" (save, export and end)."""

    def __post_init__(self) -> None:
        spec = self.spec
        self.folder = self.job / "checkpoints"
        self.parameters = list(self.adapter.parameters())
        # In one kernel on CUDA; on the processor that would be another order of rounding.
        fused = self.teacher.device.type == "cuda" or None
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=spec.lr, weight_decay=0.0, fused=fused
        )
        self.order = draws.Order(self.bank.shapes, spec.batch * self.ranks.world, spec.seed)
        self.half = self.teacher.dtype == torch.float16
        self.progress = Progress(
            spec.micro_batch or spec.batch, spec.checkpointing == "on",
            scale=FIRST_SCALE if self.half else 1.0,
        )  # fmt: skip
        self.step = 0
        self.answers = None
        if spec.passes > 1:
            kept = folder(self.job, spec, self.bank.folder.name, self.ranks.world)
            self.answers = Answers(kept, self.ranks.rank)

    def train(self) -> str:
        """Runs to the last step, or until something is asked; -> "done", "pause" or "finish".

        Raises Diverged (the last good checkpoint stays), OSError when the disk is full.
        """
        self.resume()
        if self.progress.recompute:
            recompute_blocks(self.teacher.network)
        if self.spec.compile:
            compile_blocks(self.teacher.network)
        begun, before = time.monotonic(), self.progress.seconds
        since = _Since()
        while self.step < self.spec.steps:
            if wanted := self._agreed(self.asked()):
                self.save()
                return wanted
            started = time.monotonic()
            loss, norm = self.one_step()
            self.step += 1
            since.add(loss, norm, time.monotonic() - started)
            self.progress.seconds = before + time.monotonic() - begun
            if self.step % self.spec.log_every == 0 or self.step == self.spec.steps:
                self.report(since)
                since = _Since()
            sampling = self._due(self.spec.sample_every)
            enough = sampling and self.sampled()
            # After sampling too, for the best adapter so far may be asked for again.
            if sampling or self._due(self.spec.checkpoint_every):
                self.save()
            if enough:
                return self.settle()
        return "done"

    def one_step(self) -> tuple[float, float]:
        """One optimiser step; -> (loss, gradient norm before clipping), over all ranks."""
        while True:
            try:
                loss = self._gradients()
                gradients = [parameter.grad for parameter in self.parameters]
                self.ranks.mean_([loss, *gradients])
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler, whose traceback would keep the tensors that did not fit.
            self._use_less_memory()
        if self.progress.scale != 1:
            torch._foreach_div_(gradients, self.progress.scale)
        clipped = nn.utils.clip_grad_norm_(self.parameters, self.spec.clip)
        # The one moment of a step in which the device is waited for.
        loss, norm = torch.stack([loss, clipped]).tolist()
        if self._finite(loss, norm):
            for group in self.optimiser.param_groups:
                group["lr"] = learning_rate(self.spec, self.step)
            self.optimiser.step()
        return loss, norm

    def _finite(self, loss: float, norm: float) -> bool:
        """Whether the step may be taken; raises Diverged where a smaller scale will not help."""
        progress = self.progress
        if math.isfinite(loss) and math.isfinite(norm):
            progress.good += 1
            if self.half and progress.good % GROWTH == 0:
                progress.scale *= 2
            return True
        if math.isfinite(loss) and self.half and progress.scale > 1:
            progress.scale, progress.good = progress.scale / 2, 0
            log.info("a gradient overflowed: step %d is left out", self.step + 1)
            return False
        raise Diverged(
            f"The loss became {loss} and the gradient's norm {norm} in step "
            f"{self.step + 1}. The newest checkpoint is good; go on from it with a lower lr"
            + (" or with precision bf16." if self.half else ".")
        )

    def _gradients(self) -> torch.Tensor:
        """Adds up the gradients of this process's batch; -> its mean loss, float32."""
        self.optimiser.zero_grad()
        spec, first = self.spec, self.ranks.rank * self.spec.batch
        step = self.order.original(self.step, spec.passes)
        rows = self.order.rows(step)[first : first + spec.batch]
        total = torch.zeros((), device=self.teacher.device)
        known = self.answers.read(step) if self.answers else None
        answers = []
        for start in range(0, spec.batch, self.progress.micro_batch):
            part = range(start, min(spec.batch, start + self.progress.micro_batch))
            z0, about = self.bank.batch([rows[i] for i in part])
            eps, index, cfg = draws.draw(
                spec.seed, step, [first + i for i in part], z0.shape[1:], spec.guidance
            )
            cond, uncond = self.teacher.conditions(about)
            z0, eps, index, cfg = (x.to(self.teacher.device) for x in (z0, eps, index, cfg))
            batch = z0, eps, index, cond, uncond, cfg
            if known is None:
                answers.append(
                    teacher_step(self.teacher, self.adapter, self.teacher.schedule, *batch)
                )
                z_s = answers[-1]
            else:
                z_s = known[part.start : part.stop].to(self.teacher.device)
            loss = loss_of(spec, self.teacher, self.adapter, *batch, z_s)
            loss = loss * (len(part) / spec.batch)
            (loss * self.progress.scale).backward()
            total += loss.detach()
        if self.answers and known is None:
            self.answers.write(step, torch.cat(answers))
            if step % (spec.passes * self.order.per_epoch) == 0:
                self.answers.forget_before(step)
        return total

    def _use_less_memory(self) -> None:
        self.optimiser.zero_grad()
        give_back()
        use_less_memory(self.progress, self.spec, self.teacher.network)

    def report(self, since: _Since) -> None:
        """A line of metrics and the state; the loss is the mean since the last line."""
        if self.journal is None:
            return
        left = since.seconds_a_step * (self.spec.steps - self.step)
        pictures = self.spec.batch * self.ranks.world
        figures = {
            "step": self.step, "loss": since.loss, "gradient_norm": since.norm,
            "lr": learning_rate(self.spec, self.step - 1),
            "samples_per_second": round(pictures / since.seconds_a_step, 3),
            "memory": memory(self.teacher.device), "seconds_left": round(left, 1),
        }  # fmt: skip
        self.journal.metrics(**figures)
        self.journal.state("running", steps=self.spec.steps, **figures)
        log.info(
            "step %d of %d: loss %.4f, %.0f s left", self.step, self.spec.steps, since.loss, left
        )

    def sampled(self) -> bool:
        """Draws sample pictures; -> whether the figure has not improved for long enough."""
        progress, error = self.progress, torch.full((), math.nan, device=self.teacher.device)
        if self.samples is not None:
            cfg = sum(self.spec.guidance) / len(self.spec.guidance)
            try:
                errors = self.samples.draw(self.adapter, self.step, cfg)
                self.journal.metrics(step=self.step, endpoint_error=errors)
                log.info("step %d: endpoint error %s", self.step, errors)
                error.fill_(errors["1"])
            except (RuntimeError, MemoryError) as failed:
                if not is_out_of_memory(failed):
                    raise
                log.warning("out of memory: no sample pictures of step %d", self.step)
        error = self._from_first(error)
        if math.isnan(error):
            return False
        if progress.best is None or error < progress.best:
            progress.best, progress.best_step, progress.waited = error, self.step, 0
        else:
            progress.waited += 1
        return 0 < self.spec.patience <= progress.waited

    def save(self) -> None:
        """A checkpoint of this step, by the first process; older ones beyond `keep` go."""
        if self.ranks.first:
            state = self.optimiser.state_dict()["state"]
            optimiser = {f"{i}.{k}": v for i, each in state.items() for k, v in each.items()}
            told = checkpoints.Checkpoint(
                self.step, self.adapter.state(), optimiser, vars(self.progress).copy()
            )
            checkpoints.save(self.folder, told)
            checkpoints.prune(self.folder, self.spec.keep, self.progress.best_step)
        self.ranks.wait()

    def resume(self) -> None:
        """Goes on where the newest whole checkpoint was written, or starts at step 0."""
        if self.ranks.first:
            disk.clear_torn(self.folder)
        found = checkpoints.newest(self.folder)
        if found is not None:
            self._take_over(found)
        if self.journal is not None:
            self.journal.forget_after(self.step)

    def _take_over(self, found: checkpoints.Checkpoint) -> None:
        self.adapter.restore(found.adapter)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in found.optimiser.items():
            number, _, field_name = name.partition(".")
            state.setdefault(int(number), {})[field_name] = tensor
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state, "param_groups": groups})
        self.progress = Progress(**found.state)
        self.step = found.step
        log.info("going on after step %d", self.step)

    def settle(self) -> str:
        """Ends early, with the adapter that was best."""
        best = checkpoints.read(self.folder, self.progress.best_step)
        self.adapter.restore(best.adapter)
        self.step = best.step  # what the result and the state tell is about it
        log.info("no better since step %d: done early", best.step)
        return "done"

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.spec.steps)

    def _agreed(self, wanted: str) -> str:
        """What the first process was asked, or any process to pause: all must do the same."""
        if self.ranks.world == 1:
            return wanted
        answers = ("", "pause", "finish")
        told = torch.tensor(float(answers.index(wanted)), device=self.teacher.device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        return answers[int(told)]

    def _from_first(self, value: torch.Tensor) -> float:
        if self.ranks.world > 1:
            torch.distributed.broadcast(value, 0)
        return float(value)


class _Since:
    """Means over the steps between two lines of metrics; samples and checkpoints do not count."""

    def __init__(self) -> None:
        self.count, self.losses, self.norms, self.seconds = 0, 0.0, 0.0, 0.0

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


def use_less_memory(progress: Progress, spec: Spec, network: nn.Module) -> None:
    """Half as many pictures at a time, and then blocks that are computed again.

    Raises TooLittleMemory when neither is left to do.
    """
    if progress.micro_batch > 1:
        progress.micro_batch = math.ceil(progress.micro_batch / 2)
        log.warning(
            "out of memory: going on with %d pictures at a time, %d times a step",
            progress.micro_batch, math.ceil(spec.batch / progress.micro_batch),
        )  # fmt: skip
    elif not progress.recompute and spec.checkpointing == "auto":
        recompute_blocks(network)
        progress.recompute = True
        log.warning("out of memory: going on with blocks computed again in backward")
    else:
        raise TooLittleMemory(
            "The device's memory does not hold one picture's training step. Choose a smaller "
            "resolution or rank, or close what else uses the device."
        )


def loss_of(spec: Spec, teacher, adapter: Adapter, *batch) -> torch.Tensor:
    """The loss of the job's objective; batch: z0, eps, index, cond, uncond, cfg, and z_s where the
    teacher's step is known."""
    if spec.objective == "phased":
        return phased_loss(teacher, adapter, teacher.schedule, *batch, phases=spec.phases)
    return lcm_loss(teacher, adapter, teacher.schedule, *batch)


def learning_rate(spec: Spec, step: int) -> float:
    """lr of step 0, 1, ...: a linear warm-up, then the decay to 0 over the steps that are left."""
    if step < spec.warmup:
        return spec.lr * (step + 1) / spec.warmup
    share = (step - spec.warmup) / max(1, spec.steps - spec.warmup)
    if spec.decay == "cosine":
        return spec.lr * 0.5 * (1 + math.cos(math.pi * share))
    return spec.lr * (1 - share) if spec.decay == "linear" else spec.lr
