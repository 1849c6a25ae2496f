"""What a job will do and cost, before it starts; the times are measured on two steps."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from . import draws
from .adapter import Adapter
from .loop import loss_of
from .spec import Spec

CALLS = "3 network calls a step (teacher: 2 pictures in one, no gradient; target; student)"


def plan(spec: Spec, teacher, adapter: Adapter, examples: int) -> str:
    """The plan as text. Runs a step of random latents twice, the first to warm up."""
    parameters = sum(p.numel() for p in adapter.parameters())
    network = sum(p.numel() * p.element_size() for p in teacher.network.parameters())
    checkpoint = 12 * parameters  # the layers and AdamW's two moments, float32
    seconds = _seconds_a_step(spec, teacher, adapter)
    lines = [
        f"teacher: {Path(spec.checkpoint).name}, {teacher.family}, {teacher.schedule.prediction} "
        f"prediction, {network / 1e9:.2f} GB as {str(teacher.dtype).removeprefix('torch.')} "
        f"on {teacher.device}",
        f"LoRA: {len(adapter.names)} modules of rank {spec.rank}, {parameters / 1e6:.2f} M "
        f"parameters, a file of {2 * parameters / 1e6:.1f} MB",
        f"checkpoints: {checkpoint / 1e9:.2f} GB each, the last {spec.keep} and the best are kept",
        f"bank: {examples} latents from {spec.data.kind}",
        f"steps: {spec.steps} of {spec.batch} pictures at {spec.resolution} pixels, objective "
        f"{spec.objective}, guidance {' to '.join(f'{w:g}' for w in spec.guidance)}; {CALLS}",
        f"time: {seconds:.2f} s a step as measured here, {seconds * spec.steps / 60:.0f} minutes "
        "in all, the bank and the samples apart",
    ]
    return "\n".join(lines)


def _seconds_a_step(spec: Spec, teacher, adapter: Adapter) -> float:
    side, count = spec.resolution // 8, spec.micro_batch or spec.batch
    eps, index, cfg = draws.draw(0, 0, range(count), (teacher.channels, side, side), spec.guidance)
    about = {name: torch.stack([value] * count) for name, value in teacher.uncond.items()}
    size = spec.resolution
    about["sizes"] = torch.tensor([(size, size, 0, 0, size, size)] * count)
    cond, uncond = teacher.conditions(about)
    eps, index, cfg = (x.to(teacher.device) for x in (eps, index, cfg))
    for _ in range(2):
        begun = time.monotonic()
        loss = loss_of(spec, teacher, adapter, eps, eps, index, cond, uncond, cfg)
        loss.backward()
        float(loss.detach())  # waits for the device
        seconds = time.monotonic() - begun
        adapter.zero_grad()
    return seconds * spec.batch / count
