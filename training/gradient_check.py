"""Measures whether ComfyUI's network gives right gradients, before a job relies on them.

Some of ComfyUI's networks change activations in place, or call kernels without a backward. Most of
them raise an error, but a few silently give wrong gradients, above all when blocks are recomputed.
So the gradient along a random direction is compared with a finite difference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .adapter import Adapter
from .data.bank import square_sizes, together
from .memory import recompute_blocks
from .teacher import SHRINK, Teacher

log = logging.getLogger("lcm_lora")
SIDE = 16  # of the latents, in cells
SMALL = 0.1  # size of the up factors: the function is then nearly linear, and a step may be large
DIRECTIONS = 3


@dataclass(frozen=True)
class Limits:
    """step: of the finite difference, relative to the factors. worst: the largest relative error of
    a right gradient. Half precision rounds small differences away, so its step is larger."""

    step: float
    worst: float


LIMITS = {
    torch.float32: Limits(2.0**-8, 0.005),
    torch.bfloat16: Limits(2.0**-5, 0.05),
    torch.float16: Limits(2.0**-5, 0.05),
}


def require_right_gradients(teacher: Teacher, adapter: Adapter) -> None:
    """Raises ValueError if the network has no gradients, or wrong ones: as it is, or with blocks
    recomputed in backward. Changes neither the network nor the adapter.

    If it is offloaded, only with blocks recomputed: otherwise all weights would be on the device.
    """
    ways = "", " with blocks recomputed in backward"
    for how in ways[1:] if teacher.offloaded else ways:
        undo = recompute_blocks(teacher.network) if how else lambda: None
        try:
            error = gradient_error(teacher, adapter)
        except (RuntimeError, NotImplementedError) as reason:
            raise ValueError(
                f"ComfyUI's {teacher.architecture} network cannot be trained here{how}: {reason}. "
                "Try another precision, or another version of ComfyUI."
            ) from reason
        finally:
            undo()
        log.info("gradients of %s%s: relative error %.1e", teacher.architecture, how, error)
        if not error <= LIMITS[teacher.dtype].worst:
            raise ValueError(
                f"ComfyUI's {teacher.architecture} network gives wrong gradients here{how}: they "
                f"differ by {error:.1%} from finite differences. A LoRA trained with them would be "
                "useless, so the job does not start. Try precision fp32, or another version of "
                "ComfyUI."
            )


def gradient_error(teacher: Teacher, adapter: Adapter) -> float:
    """The largest relative error of directional derivatives, against central differences.

    The function is a random linear one of x0 at two timesteps, of the adapter's factors, which are
    random here and as before afterwards.
    """
    before = {name: tensor.clone() for name, tensor in adapter.state().items()}
    draw = torch.Generator().manual_seed(0)

    def random(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=draw).to(like)

    parameters, starts = [], []
    for name, parameter in adapter.named_parameters():
        size = SMALL if name.endswith("up") else 1.0
        parameters.append(parameter)
        starts.append(random(parameter) * size / parameter[0].numel() ** 0.5)
    step = LIMITS[teacher.dtype].step
    value = _value(teacher, random)
    try:
        _set(parameters, starts)
        value().backward()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        errors = []
        for _ in range(DIRECTIONS):
            # Partly along the gradient, because most random directions hardly change the value.
            ways = [
                random(p) * g.norm() + g * p.numel() ** 0.5
                for p, g in zip(parameters, gradients, strict=True)
            ]
            size = torch.stack(torch._foreach_norm(ways)).norm() / sum(
                start.square().sum() for start in starts
            ).sqrt()  # fmt: skip
            ways = [way / size for way in ways]
            slope = sum(float((g * w).sum()) for g, w in zip(gradients, ways, strict=True))
            sides = []
            for sign in (1, -1):
                _set(parameters, [s + sign * step * w for s, w in zip(starts, ways, strict=True)])
                with torch.no_grad():
                    sides.append(float(value()))
            measured = (sides[0] - sides[1]) / (2 * step)
            errors.append(abs(measured - slope) / max(abs(measured), abs(slope), 1e-12))
        return max(errors)
    finally:
        adapter.restore(before)
        adapter.zero_grad()


def _set(parameters: list[torch.nn.Parameter], values: list[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _value(
    teacher: Teacher, random: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[], torch.Tensor]:
    """A function without arguments whose result, a number, depends on the adapter's factors."""
    last = teacher.schedule.T - 1
    t = torch.tensor([last, last // 2], device=teacher.device)
    z = random(torch.empty(2, teacher.channels, SIDE, SIDE, device=teacher.device))
    weights = random(z) / z[0].numel() ** 0.5
    texts = together([{name: x.cpu() for name, x in teacher.uncond.items()}] * 2)
    texts = {
        name: text + 0.1 * random(text) if text.is_floating_point() else text
        for name, text in texts.items()
    }
    cond, _ = teacher.conditions(texts, torch.tensor([square_sizes(SHRINK * SIDE)] * 2))
    return lambda: (teacher.schedule.predict(teacher, z, t, cond)[0] * weights).sum()
