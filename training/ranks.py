"""The processes of one job: alone, or several under `python -m torch.distributed.run`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process's place: rank of world. Collective calls do nothing when world is 1."""

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls, on_cpu: bool = False) -> Ranks:
        """Reads torchrun's environment. on_cpu: the job trains on the processor, CUDA or not.

        Tensors on CUDA go through NCCL where there is it, all others through gloo.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        on_cuda = torch.cuda.is_available() and not on_cpu
        if on_cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        nccl = on_cuda and dist.is_nccl_available()  # not in builds for Windows
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        # Long, for one process may draw a bank or samples while the others wait.
        dist.init_process_group(backend, timeout=timedelta(hours=12))
        return cls(dist.get_rank(), world)

    @property
    def first(self) -> bool:
        """Whether this process writes the job's files."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    def mean_(self, tensors: list[torch.Tensor]) -> None:
        """Replaces float32 tensors by their means over all processes, in one message."""
        if self.world == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        at = 0
        for tensor in tensors:
            tensor.copy_(flat[at : at + tensor.numel()].view_as(tensor))
            at += tensor.numel()

    def leave(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
