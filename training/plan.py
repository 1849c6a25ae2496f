"""What a job will do and cost, before it starts. The times are measured on two steps."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from .adapter import Adapter
from .data import draws
from .data.bank import square_sizes, together
from .memory import forget_peak, give_back, is_out_of_memory, memory, recompute_blocks
from .objectives.batch import Batch
from .objectives.solver import teacher_step
from .objectives.table import (
    OBJECTIVES,
    consistency_passes,
    forward_passes,
    loss_of,
    solver_of,
)  # fmt: skip
from .spec import Spec
from .state.checkpoints import size
from .state.progress import Progress, use_less_memory
from .teacher import Teacher


def plan(spec: Spec, teacher: Teacher, adapter: Adapter, examples: int) -> str:
    """The plan as text. Runs a step with random latents twice, the first time to warm up."""
    parameters = sum(p.numel() for p in adapter.parameters())
    network = teacher.weight_bytes
    checkpoint = size(parameters, spec.objective)
    teacher_call = "teacher, no gradient"
    if teacher.guided_calls > 1:
        teacher_call = f"teacher: {teacher.guided_calls} pictures in one, no gradient"
    progress = Progress.first(spec)
    progress.recompute |= teacher.offloaded
    if progress.recompute:
        recompute_blocks(teacher.network)
    forget_peak(teacher.device)
    seconds = _seconds_a_step(spec, teacher, adapter, progress, asks_teacher=True)
    calls = f"3 network calls a step ({teacher_call}; target; student)"
    if spec.passes > 1:
        later = _seconds_a_step(spec, teacher, adapter, progress, asks_teacher=False)
        seconds = (seconds + (spec.passes - 1) * later) / spec.passes
        calls = (
            f"2 network calls a step (target; student), and one more ({teacher_call}) in one of "
            f"{spec.passes} passes over the bank"
        )
    if OBJECTIVES[spec.objective].matches:
        guided = teacher.guided_calls
        seconds *= forward_passes(spec, guided) / consistency_passes(spec, guided)
        calls += ", and steps of distribution matching, whose time follows from their calls"
    count = progress.micro_batch
    measured = f", {count} pictures at a time" if count < spec.batch else ""
    measured += ", blocks computed again in backward" if progress.recompute else ""
    measured += ", their weights in the computer's memory" if teacher.offloaded else ""
    # Added, because the plan makes neither AdamW's two moments nor a second adapter.
    most = memory(teacher.device) + checkpoint - 4 * parameters
    lines = [
        f"teacher: {Path(spec.checkpoint).name}, {teacher.architecture}, "
        f"{teacher.prediction} prediction, {network / 1e9:.2f} GB, computes in "
        f"{str(teacher.dtype).removeprefix('torch.')} on {teacher.device}",
        f"LoRA: {len(adapter.names)} modules of rank {spec.rank}, {parameters / 1e6:.2f} M "
        f"parameters, a file of {2 * parameters / 1e6:.1f} MB",
        f"checkpoints: {checkpoint / 1e9:.2f} GB each, the last {spec.keep} and the best are kept",
        f"memory: about {most / 1e9:.1f} GB, measured here in a step, with AdamW's state added: "
        f"{network / 1e9:.2f} GB of weights, {(checkpoint + 4 * parameters) / 1e9:.2f} GB for the "
        "LoRA, its gradient and AdamW, and the rest for activations and the program",
        f"bank: {examples} latents from {spec.data.kind}",
        f"steps: {spec.steps} of {spec.batch} pictures at {spec.resolution} pixels, objective "
        f"{spec.objective}, guidance {' to '.join(f'{w:g}' for w in spec.guidance)}; {calls}",
        f"time: {seconds:.2f} s per step as measured here{measured}, "
        f"{seconds * spec.steps / 60:.0f} minutes in all, without the bank and the samples",
    ]
    return "\n".join(lines)


def _seconds_a_step(
    spec: Spec, teacher: Teacher, adapter: Adapter, progress: Progress, asks_teacher: bool
) -> float:
    """Measures a step. If memory runs out, changes `progress` as the job would.

    asks_teacher: whether the step calls the teacher, as in the first pass over the bank.
    """
    while True:
        count = progress.micro_batch
        try:
            return _measured(spec, teacher, adapter, count, asks_teacher) * spec.batch / count
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, because its traceback would keep the tensors that did not fit.
        adapter.zero_grad()
        give_back()
        use_less_memory(progress, spec, teacher)


def _measured(
    spec: Spec, teacher: Teacher, adapter: Adapter, count: int, asks_teacher: bool
) -> float:
    """Seconds of a step with `count` pictures, measured on the second of two."""
    shape = teacher.latent_shape(spec.resolution)
    schedule = teacher.schedule
    starts = len(schedule.starts)
    eps, index, cfg = draws.draw(0, 0, range(count), shape, spec.guidance, starts)
    sizes = torch.tensor([square_sizes(spec.resolution)] * count)
    cond, uncond = teacher.conditions(together([teacher.uncond] * count), sizes)
    eps, index, cfg = (x.to(teacher.device) for x in (eps, index, cfg))
    batch = Batch(eps, eps, index, cond, uncond, cfg, *solver_of(spec, schedule))
    for _ in range(2):
        begun = time.monotonic()
        z_s = teacher_step(teacher, adapter, teacher.schedule, batch) if asks_teacher else eps
        with adapter.cast(teacher.dtype):
            loss = loss_of(spec)(teacher, teacher.schedule, batch, z_s)
            loss.backward()
        float(loss.detach())  # waits for the device
        seconds = time.monotonic() - begun
        adapter.zero_grad()
    return seconds
