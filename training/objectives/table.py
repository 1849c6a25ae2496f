"""The objectives by the names that a job's setting `objective` has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..spec import Spec
from . import lcm, phased
from .batch import Batch
from .solver import Network, Schedule

Loss = Callable[[Network, Schedule, Batch, torch.Tensor], torch.Tensor]

OBJECTIVES: dict[str, Callable[[Spec], Loss]] = {
    "lcm": lambda spec: lcm.loss,
    "phased": lambda spec: partial(phased.loss, phases=spec.phases),
}


def loss_of(spec: Spec) -> Loss:
    """The job's loss(network, schedule, batch, z_s) -> scalar."""
    return OBJECTIVES[spec.objective](spec)
