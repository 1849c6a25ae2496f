"""The objectives by the names that a job's setting `objective` has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from ..spec import Spec
from . import lcm, phased
from .batch import Batch
from .solver import Network, Process

Loss = Callable[[Network, Process, Batch, torch.Tensor], torch.Tensor]

# Forward passes that a picture of a step costs besides the teacher's, as docs/distillation.md
# counts them. Of the consistency losses: target, student, and its backward pass.
OTHERS = 3.15
# Of distribution matching: the way to a call of the sampler (on average), student, fake score
# twice, and two backward passes.
MATCHING = 0.67 + 1 + 2 + 2 * 1.15


class Objective(NamedTuple):
    """consistency: the loss on the teacher's solver steps. family: how its LoRAs are sampled, see
    samplers/families.py. matches: whether distribution matching follows, with that loss as anchor.
    """

    consistency: Callable[[Spec], Loss]
    family: str
    matches: bool = False


OBJECTIVES = {
    "lcm": Objective(lambda spec: lcm.loss, "lcm"),
    "phased": Objective(lambda spec: partial(phased.loss, phases=spec.phases), "phased"),
    "dmd": Objective(lambda spec: lcm.loss, "lcm", matches=True),
}


def loss_of(spec: Spec) -> Loss:
    """The job's loss(network, schedule, batch, z_s) -> scalar."""
    return OBJECTIVES[spec.objective].consistency(spec)


def solver_of(
    spec: Spec, schedule: Process
) -> tuple[tuple[int, ...], int, tuple[int, ...]]:  # fmt: skip
    """Batch's `starts`, `skip` and `edges`."""
    edges = phased.edges(schedule, spec.phases) if spec.objective == "phased" else (0,)
    return schedule.starts, schedule.skip, edges


def family_of(spec: Spec) -> str:
    """The name of the family that the job's LoRA belongs to."""
    return OBJECTIVES[spec.objective].family


def forward_passes(spec: Spec, guided: int) -> float:
    """The mean over the job's steps of what a picture costs, in forward passes. guided: those of
    the teacher's guided prediction, see Teacher.guided_calls."""
    consistency = consistency_passes(spec, guided)
    if not OBJECTIVES[spec.objective].matches:
        return consistency
    both = (consistency + guided + MATCHING) / 2  # in turn
    return both if spec.start_from else (consistency + both) / 2


def consistency_passes(spec: Spec, guided: int) -> float:
    """What a picture costs in a step of the consistency loss, in forward passes."""
    return guided / spec.passes + OTHERS
