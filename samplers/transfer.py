"""Tensors on their way from the CPU to a device."""

from __future__ import annotations

import torch


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`. From the CPU to CUDA it goes through pinned memory, because any other
    copy waits until the device has finished its earlier work."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
