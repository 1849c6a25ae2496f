"""The processes of one job: one alone, or several under `python -m torch.distributed.run`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `world`. With a world of 1, nothing here communicates."""

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls, on_cpu: bool = False) -> Ranks:
        """Reads torchrun's environment. on_cpu: whether the job trains on the CPU despite CUDA.

        Tensors on CUDA are exchanged with NCCL if it is available, all others with gloo. Raises
        ValueError if there are fewer GPUs than processes, because two cannot share one.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls()
        on_cuda = torch.cuda.is_available() and not on_cpu
        if on_cuda:
            number, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if number >= count:
                raise ValueError(
                    f"Process {number + 1} of this machine has no GPU of its own: PyTorch sees "
                    f"{count}. Start at most {count}, with --nproc-per-node {count}."
                )
            torch.cuda.set_device(number)
        nccl = on_cuda and dist.is_nccl_available()  # builds for Windows do not have it
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        # Long, because one process may draw a bank or samples while the others wait.
        dist.init_process_group(backend, timeout=timedelta(hours=12))
        return cls(dist.get_rank(), world)

    @property
    def first(self) -> bool:
        """Whether this process writes the job's files."""
        return self.rank == 0

    def wait(self) -> None:
        """Waits until every process calls this."""
        if self.world > 1:
            dist.barrier()

    def mean_(self, tensors: list[torch.Tensor]) -> None:
        """Replaces float32 tensors with their means over all processes, in one message."""
        if self.world == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        means = flat.split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view_as(tensor))

    def from_first(self, value: float, device: torch.device) -> float:
        """The first process's value."""
        if self.world == 1:
            return value
        shared = torch.tensor(value, device=device)
        dist.broadcast(shared, 0)
        return float(shared)

    def highest(self, value: int, device: torch.device) -> int:
        """The largest value of any process."""
        if self.world == 1:
            return value
        shared = torch.tensor(float(value), device=device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return int(shared)

    def leave(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()
