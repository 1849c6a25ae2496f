"""Memory on the device: how much is used, what to do when it runs out, blocks compiled."""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

log = logging.getLogger("lcm_lora")


class TooLittleMemory(MemoryError):
    """The device cannot hold even the smallest part of the work, so trying again is useless."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: PyTorch's or Python's own error, or one with the words of another
    allocator, such as those of MPS, the CPU, cuBLAS or cuDNN."""
    words = (
        "out of memory|allocate memory|not enough memory|ALLOC(ATION)?_FAILED|StatusAllocFailed"
        "|status_memory_error|OUT_OF_(HOST_|DEVICE_)?MEMORY|OUT_OF_RESOURCES|allocate tensor"
        "|Invalid buffer size|paging file is too small"
    )
    kinds = torch.OutOfMemoryError, MemoryError
    return isinstance(error, kinds) or re.search(words, str(error)) is not None


def in_parts(items: Sequence, size: int, make: Callable[[Sequence], list]) -> list:
    """make(part) of each part of `size` items, joined; half as many at once when memory runs out,
    down to one. Raises what make raises otherwise."""
    made: list = []
    while len(made) < len(items):
        try:
            made += make(items[len(made) : len(made) + size])
            continue
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # Outside the handler, whose traceback would keep the tensors that did not fit.
        size = math.ceil(size / 2)
        log.warning("out of memory: going on with %d at a time", size)
        give_back()
    return made


def give_back() -> None:
    """Frees what no tensor holds any more, on the device too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    if torch.xpu.is_available():
        torch.xpu.empty_cache()


def keep_freed() -> None:
    """Lets this process keep the memory it frees, for the next step wants as much again.

    glibc gives big blocks back at once, and the kernel clears each page when it comes again:
    measured with SD1.5 on two cores, a third of a step. Elsewhere nothing is changed.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD in malloc.h
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def memory(device: torch.device) -> int:
    """Bytes: the peak of the device's tensors on CUDA, what the process holds elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The UNet's residual and transformer blocks: what is recomputed or compiled as one.

    Raises ValueError if there is none, because then neither would happen.
    """
    kinds = {"ResBlock", "SpatialTransformer"}
    blocks = [
        module for module in network.modules()
        if kinds & {base.__name__ for base in type(module).__mro__}
    ]  # fmt: skip
    if not blocks:
        raise ValueError(
            f"{type(network).__name__} has no block that can be recomputed or compiled: expected "
            f"ComfyUI's {' and '.join(sorted(kinds))}. Set checkpointing to off and compile to "
            "false."
        )
    return blocks


def recompute_blocks(network: nn.Module) -> None:
    """Gradient checkpointing (arXiv 1604.06174) by block; the adapter must be on at backward.

    Raises ValueError where the network has no block that is known.
    """
    for block in _blocks(network):
        forward = block.forward

        def again(*args, _forward=forward, **kwargs):
            if not torch.is_grad_enabled():
                return _forward(*args, **kwargs)
            # Nothing in the blocks is random: the network is in eval mode, and has no dropout.
            return checkpoint(
                _forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )

        block.forward = again


def compile_blocks(network: nn.Module, **options: Any) -> None:
    """torch.compile, with its options, for each block; the first steps take longer.

    Raises ValueError where the network has no block that is known.
    """
    blocks = _blocks(network)
    # All blocks are one function to Dynamo, which gives up for good after its eighth variant; each
    # block has one with the adapter off, on, and on with gradients, for two or three batch sizes.
    config, variants = torch._dynamo.config, 16 * len(blocks)
    for limit in (
        "recompile_limit", "accumulated_recompile_limit",
        "cache_size_limit", "accumulated_cache_size_limit",  # their names before torch 2.7
    ):  # fmt: skip
        if hasattr(config, limit):
            setattr(config, limit, max(getattr(config, limit), variants))
    for block in blocks:
        block.forward = torch.compile(block.forward, **options)
