"""Latent consistency distillation (LCM, arXiv 2310.04378, algorithm 1; LCM-LoRA, 2311.05556)."""

from __future__ import annotations

import torch

from .batch import Batch
from .solver import Network, Process


def loss(network: Network, schedule: Process, batch: Batch, z_s: torch.Tensor) -> torch.Tensor:
    """The consistency loss (equation 9), a scalar: f(z_t, t) should equal f(z_s, s).

    Process.comparable says in which unit. f leaps from any timestep to the clean latent. z_s: where
    the teacher's solver step leads from z_t, see solver.teacher_step. The target comes from the
    student itself: a LoRA needs no moving average (2311.05556). Call it and its backward with the
    adapter on, because checkpointing runs the forward pass again in backward.
    """
    t, s = batch.t, batch.s
    z_t = schedule.noised(batch.z0, batch.eps, t)
    with torch.no_grad():
        x0, _ = schedule.predict(network, z_s, s, batch.cond)
        target = schedule.consistency(z_s, x0, s)
    x0, _ = schedule.predict(network, z_t, t, batch.cond)
    student = schedule.consistency(z_t, x0, t)
    return pseudo_huber(schedule.comparable(student, t), schedule.comparable(target, t))


def pseudo_huber(prediction: torch.Tensor, target: torch.Tensor, c: float = 0.001) -> torch.Tensor:
    """mean(sqrt((prediction - target)^2 + c^2) - c), in the precision of the schedule's table."""
    difference = prediction - target
    return ((difference.square() + c * c).sqrt() - c).mean()
