"""Keeps the weights of a network's blocks off the device, for networks that do not fit on it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .adapter import is_layer
from .memory import blocks_of

log = logging.getLogger("lcm_lora")


def keep_weights_off(network: nn.Module, device: torch.device) -> int:
    """Moves a frozen network to `device`, but not the weights of the layers in its blocks; -> bytes
    that stay in the computer's memory.

    Each such layer gets a copy of its weights on the device whenever it is called. Without
    gradients the copy is dropped after the call. With gradients it stays until the layer's backward
    pass, so recompute the blocks in backward: then one block's weights are there at a time.

    Raises ValueError if the network has no blocks.
    """
    lent = {layer for block in blocks_of(network) for layer in block.modules() if is_layer(layer)}
    for module in network.modules():
        if module in lent:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    for layer in lent:
        _lend(layer, device)
    kept = (tensor for layer in lent for tensor in layer.parameters(recurse=False))
    return sum(tensor.nbytes for tensor in kept)


def _lend(layer: nn.Module, device: torch.device) -> None:
    homes = {name: _home(p) for name, p in layer._parameters.items() if p is not None}
    layer._parameters.update(homes)
    forward: Callable[..., Any] = layer.forward

    def with_weights(*args: Any, **kwargs: Any) -> Any:
        # Other tensors, not other data in the same ones: autograd keeps the tensors that it sees.
        for name, home in homes.items():
            lent = home.detach().to(device, non_blocking=True, copy=True)
            layer._parameters[name] = lent  # type: ignore[assignment] # a plain tensor will do
        try:
            return forward(*args, **kwargs)
        finally:
            layer._parameters.update(homes)

    layer.forward = with_weights


def _home(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter in the computer's memory, from where a GPU copies it without waiting."""
    tensor = parameter.detach().cpu()
    if torch.cuda.is_available():
        try:
            tensor = tensor.pin_memory()
        except RuntimeError:  # there is not enough memory that can be pinned
            log.debug("a weight of %d bytes is not pinned", tensor.nbytes)
    return nn.Parameter(tensor, requires_grad=False)
