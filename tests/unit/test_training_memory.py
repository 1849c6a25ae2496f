"""What happens when memory runs out, and how a full disk is reported."""

import errno

import pytest
import torch
from lcm_lora.training.disk import disk_is_full
from lcm_lora.training.memory import (
    compile_blocks,
    in_parts,
    is_out_of_memory,
    recompute_blocks,
)


@pytest.mark.parametrize(
    ("error", "so"),
    [
        (torch.OutOfMemoryError("CUDA"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("HIPBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("Native API failed: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY"), True),
        (RuntimeError("Could not allocate tensor with 9 bytes. There is not enough GPU"), True),
        (RuntimeError("Invalid buffer size: 9.00 GB"), True),
        (RuntimeError("The paging file is too small for this operation (os error 1455)"), True),
        (MemoryError(), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_running_out_of_memory_is_known_by_its_words(error, so):
    assert is_out_of_memory(error) == so


@pytest.mark.parametrize("change", [recompute_blocks, compile_blocks])
def test_a_network_without_known_blocks_is_an_error_and_no_silence(change):
    class ResidualBlock(torch.nn.Module):
        """A later ComfyUI might call it like this."""

    network = torch.nn.Sequential(torch.nn.Linear(3, 3), ResidualBlock())
    with pytest.raises(ValueError, match="Sequential has no block .* ComfyUI's ResBlock"):
        change(network)


def test_parts_become_smaller_until_they_fit():
    asked = []

    def make(part):
        asked.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError("too many")
        return [2 * number for number in part]

    assert in_parts(range(10), 8, make) == list(range(0, 20, 2))
    assert asked == [8, 4, 2, 2, 2, 2, 2]


def test_one_that_does_not_fit_and_other_errors_are_raised():
    def full(part):
        raise torch.OutOfMemoryError("nothing fits")

    def wrong(part):
        raise RuntimeError("a fault")

    with pytest.raises(torch.OutOfMemoryError):
        in_parts(range(4), 4, full)
    with pytest.raises(RuntimeError, match="a fault"):
        in_parts(range(4), 4, wrong)


@pytest.mark.parametrize(
    ("error", "so"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(getattr(errno, "EDQUOT", errno.ENOSPC), "x"), True),
        (OSError("a.safetensors could not be written: Disk quota exceeded (os error 122)"), True),
        (OSError("a.safetensors could not be written: I/O error (os error 28)"), True),
        (OSError("a.safetensors could not be written: I/O error (os error 112)"), True),
        (OSError("a.safetensors could not be written: I/O error (os error 2)"), False),
        (OSError(errno.EACCES, "No"), False),
    ],
)
def test_a_full_disk_is_known_by_its_number_or_its_words(error, so):
    assert disk_is_full(error) == so
