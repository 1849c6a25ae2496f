"""The device's memory: how much is used, and how to need less. Also compiles blocks."""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import psutil
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .adapter import BLOCK

log = logging.getLogger("lcm_lora")
Item = TypeVar("Item")
T = TypeVar("T")


class TooLittleMemory(MemoryError):
    """The device has no room for even the smallest part of the work, so a retry is useless."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, by PyTorch's or Python's error type or by the words of another
    allocator, such as MPS, the CPU's, cuBLAS or cuDNN."""
    words = (
        "out of memory|allocate memory|not enough memory|ALLOC(ATION)?_FAILED|StatusAllocFailed"
        "|status_memory_error|OUT_OF_(HOST_|DEVICE_)?MEMORY|OUT_OF_RESOURCES|allocate tensor"
        "|Invalid buffer size|paging file is too small"
    )
    kinds = torch.OutOfMemoryError, MemoryError
    return isinstance(error, kinds) or re.search(words, str(error)) is not None


def in_parts(
    items: Sequence[Item], size: int, make: Callable[[Sequence[Item]], list[T]]
) -> list[T]:
    """make(part) of each part of `size` items, joined. When memory runs out, the parts are halved,
    down to one item. make(part) has as many results as the part has items."""
    made: list[T] = []
    while len(made) < len(items):
        try:
            made += make(items[len(made) : len(made) + size])
            continue
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # Outside the handler, because its traceback would keep the tensors that did not fit.
        size = math.ceil(size / 2)
        log.warning("out of memory: going on with %d at a time", size)
        give_back()
    return made


def give_back() -> None:
    """Gives unused memory back to the system, also on the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    if torch.xpu.is_available():
        torch.xpu.empty_cache()


def keep_freed() -> None:
    """Lets this process keep the memory that it frees, because the next step needs as much again.

    glibc returns large blocks immediately, and the kernel clears each page before it is used again.
    With SD1.5 on two cores that took a third of a step. Does nothing without glibc.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD in malloc.h
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def memory(device: torch.device) -> int:
    """Bytes: on CUDA the peak of the device's tensors, elsewhere the memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def has_own_memory(device: torch.device) -> bool:
    """Whether the device's memory is another than the computer's."""
    return device.type not in ("cpu", "mps")


def forget_peak(device: torch.device) -> None:
    """Resets the peak that `memory` reports on CUDA."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks of a UNet or a transformer, each recomputed or compiled as a whole.

    Raises ValueError if there are none, because then nothing could be recomputed or compiled.
    """
    kinds = {"ResBlock", "SpatialTransformer"}
    blocks = [
        module for name, module in network.named_modules()
        if re.fullmatch(BLOCK, name) or kinds & {base.__name__ for base in type(module).__mro__}
    ]  # fmt: skip
    if not blocks:
        raise ValueError(
            f"{type(network).__name__} has no block that can be recomputed or compiled: expected "
            f"ComfyUI's {' and '.join(sorted(kinds))}, or the blocks of a transformer. Set "
            "checkpointing to off and compile to false."
        )
    return blocks


def recompute_blocks(network: nn.Module) -> Callable[[], None]:
    """Gradient checkpointing (arXiv 1604.06174) by block. The adapter must be on at backward.
    -> a function that undoes it.

    Raises ValueError if the network has no such blocks.
    """
    blocks = blocks_of(network)
    before = [block.__dict__.get("forward") for block in blocks]
    of_transformers = {
        module for name, module in network.named_modules() if re.fullmatch(BLOCK, name)
    }
    for block in blocks:
        forward = block.forward
        once = _of_copies(forward) if block in of_transformers else forward

        def again(
            *args: Any, _forward: Callable[..., Any] = forward, _once: Callable[..., Any] = once,
            **kwargs: Any,
        ) -> Any:  # fmt: skip
            if not torch.is_grad_enabled():
                return _forward(*args, **kwargs)
            # Nothing in the blocks is random: the network is in eval mode, without dropout.
            return checkpoint(_once, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        block.forward = again

    def undo() -> None:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward

    return undo


def _of_copies(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` on copies of its inputs. Some transformers' blocks change their inputs in place;
    recomputed from the changed inputs, they would silently give wrong gradients."""

    def copied(*args: Any, **kwargs: Any) -> Any:
        args = tuple(map(_copied, args))
        return forward(*args, **{name: _copied(value) for name, value in kwargs.items()})

    return copied


def _copied(value: Any) -> Any:
    return value.clone() if torch.is_tensor(value) else value


def compile_blocks(network: nn.Module, **options: Any) -> None:
    """Compiles each block with torch.compile and these options. The first steps take longer.

    Raises ValueError if the network has no such blocks.
    """
    blocks = blocks_of(network)
    # Dynamo counts all blocks as one function and stops compiling it after the eighth variant. Each
    # block has variants with the adapter off, on, and on with gradients, for two or three batch
    # sizes.
    config, variants = torch._dynamo.config, 16 * len(blocks)
    for limit in (
        "recompile_limit", "accumulated_recompile_limit",
        "cache_size_limit", "accumulated_cache_size_limit",  # their names before torch 2.7
    ):  # fmt: skip
        if hasattr(config, limit):
            setattr(config, limit, max(getattr(config, limit), variants))
    for block in blocks:
        block.forward = torch.compile(block.forward, **options)
