"""Phased consistency distillation (PCM, arXiv 2405.18407, section 3).

The solver's grid is divided into segments. The student at t predicts where the teacher's ODE is at
the lower edge of t's segment, not at 0. So a deterministic run (eta 0) from edge to edge follows
the teacher's path, while LCM leaps to the end and must add fresh noise after each step.
"""

from __future__ import annotations

import torch

from ...samplers.families import FAMILIES, ORIGIN_STEPS
from .batch import Batch, edge_below
from .lcm import pseudo_huber
from .solver import Network, Process


def loss(
    network: Network, schedule: Process, batch: Batch, z_s: torch.Tensor, phases: int = 4
) -> torch.Tensor:
    """The phased consistency loss, a scalar: f(z_t, t) should equal f(z_s, s).

    f is one DDIM step to the edge below t. At the edge itself, where s may lie, it is the identity.
    z_s and the adapter: as in lcm.loss.
    """
    t, s = batch.t, batch.s
    edge = edge_below(t, edges(schedule, phases))
    z_t = schedule.noised(batch.z0, batch.eps, t)
    with torch.no_grad():
        target = schedule.noised(*schedule.predict(network, z_s, s, batch.cond), edge)
    student = schedule.noised(*schedule.predict(network, z_t, t, batch.cond), edge)
    return pseudo_huber(student, target)


def edges(schedule: Process, phases: int) -> tuple[int, ...]:
    """The lower edges of the segments, ascending: 0, 259, 499, 759 for 4 phases of SD.

    They are the timesteps of our sampler in a run of `phases` steps, so that each of its steps
    crosses one segment. (The paper's code has 0, 239, 499, 739, where a step from 759 would have
    learned to go only to 739.) The lowest edge is timestep 0 and not the clean latent: f is the
    identity there, which ties the student to the data, and a sigma of 0.03 remains.
    Raises ValueError if phases is not in 1..50.
    """
    if not 1 <= phases <= ORIGIN_STEPS:
        raise ValueError(f"phases must be 1 to {ORIGIN_STEPS}, found {phases}.")
    return 0, *schedule.run(FAMILIES["phased"], phases)[:0:-1]
