"""What a job will do and cost, before it starts; the times are measured on two steps."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from .adapter import Adapter
from .data import draws
from .memory import give_back, is_out_of_memory, recompute_blocks
from .spec import Spec
from .state.loop import Progress, loss_of, use_less_memory

TEACHER = "teacher: 2 pictures in one, no gradient"


def plan(spec: Spec, teacher, adapter: Adapter, examples: int) -> str:
    """The plan as text. Runs a step of random latents twice, the first to warm up."""
    parameters = sum(p.numel() for p in adapter.parameters())
    network = sum(p.numel() * p.element_size() for p in teacher.network.parameters())
    checkpoint = 12 * parameters  # the layers and AdamW's two moments, float32
    progress = Progress(min(spec.micro_batch or spec.batch, spec.batch), spec.checkpointing == "on")
    if progress.recompute:
        recompute_blocks(teacher.network)
    seconds = _measured(spec, teacher, adapter, progress, known=False)
    calls = f"3 network calls a step ({TEACHER}; target; student)"
    if spec.passes > 1:
        kept = _measured(spec, teacher, adapter, progress, known=True)
        seconds = (seconds + (spec.passes - 1) * kept) / spec.passes
        calls = (
            f"2 network calls a step (target; student), and one more ({TEACHER}) in one of "
            f"{spec.passes} passes over the bank"
        )
    count = progress.micro_batch
    at_once = f", {count} pictures at a time" if count < spec.batch else ""
    at_once += ", blocks computed again in backward" if progress.recompute else ""
    lines = [
        f"teacher: {Path(spec.checkpoint).name}, {teacher.family}, {teacher.schedule.prediction} "
        f"prediction, {network / 1e9:.2f} GB as {str(teacher.dtype).removeprefix('torch.')} "
        f"on {teacher.device}",
        f"LoRA: {len(adapter.names)} modules of rank {spec.rank}, {parameters / 1e6:.2f} M "
        f"parameters, a file of {2 * parameters / 1e6:.1f} MB",
        f"checkpoints: {checkpoint / 1e9:.2f} GB each, the last {spec.keep} and the best are kept",
        f"bank: {examples} latents from {spec.data.kind}",
        f"steps: {spec.steps} of {spec.batch} pictures at {spec.resolution} pixels, objective "
        f"{spec.objective}, guidance {' to '.join(f'{w:g}' for w in spec.guidance)}; {calls}",
        f"time: {seconds:.2f} s a step as measured here{at_once}, "
        f"{seconds * spec.steps / 60:.0f} minutes in all, the bank and the samples apart",
    ]
    return "\n".join(lines)


def _measured(spec: Spec, teacher, adapter: Adapter, progress: Progress, known: bool) -> float:
    """Seconds a step; where memory runs out, progress changes as the job's would.

    known: the teacher's answers are.
    """
    while True:
        count = progress.micro_batch
        try:
            return _seconds(spec, teacher, adapter, count, known) * spec.batch / count
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler, whose traceback would keep the tensors that did not fit.
        adapter.zero_grad()
        give_back()
        use_less_memory(progress, spec, teacher.network)


def _seconds(spec: Spec, teacher, adapter: Adapter, count: int, known: bool) -> float:
    """Of `count` pictures, the second time."""
    side = spec.resolution // 8
    eps, index, cfg = draws.draw(0, 0, range(count), (teacher.channels, side, side), spec.guidance)
    about = {name: torch.stack([value] * count) for name, value in teacher.uncond.items()}
    size = spec.resolution
    about["sizes"] = torch.tensor([(size, size, 0, 0, size, size)] * count)
    cond, uncond = teacher.conditions(about)
    eps, index, cfg = (x.to(teacher.device) for x in (eps, index, cfg))
    answer = [eps] if known else []
    for _ in range(2):
        begun = time.monotonic()
        loss = loss_of(spec, teacher, adapter, eps, eps, index, cond, uncond, cfg, *answer)
        loss.backward()
        float(loss.detach())  # waits for the device
        seconds = time.monotonic() - begun
        adapter.zero_grad()
    return seconds
