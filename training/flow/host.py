"""What ComfyUI's transformers need around them before gradients can flow through them.

Their code and weights stay as they are. gradient_check.py measures whether this was enough.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from ..adapter import BLOCK

# Rotary positions after a norm, in one kernel without a backward; Anima calls it also in training.
_KERNEL = "rms_rope_split_half"
_EXACT = "float8_e4m3fn", "float8_e5m2"  # ComfyUI's formats of scaled fp8


def make_differentiable(network: nn.Module) -> None:
    """Prepares a network, and this process, in which ComfyUI then computes as in its own training.

    - ComfyUI's flag for training keeps most transformers from kernels that have no backward.
    - The remaining kernel gets a backward.
    - Blocks of Flux's kind add to their inputs in place, which a norm still needs for its backward.
      So each norm gets a copy.
    """
    import comfy.model_management

    comfy.model_management.in_training = True
    _add_backward()
    for name, block in network.named_modules():
        if re.fullmatch(BLOCK, name) and name.startswith(("double_blocks", "single_blocks")):
            for layer in block.modules():
                if isinstance(layer, nn.LayerNorm):
                    layer.register_forward_pre_hook(_copy)


def require_exact_weights(name: str, patcher: Any) -> None:
    """Lets ComfyUI multiply with the unpacked weights of scaled fp8, not with its inputs rounded to
    fp8 too. Call it before the network is loaded onto the device.

    Raises ValueError if weights are packed in another format, whose products round the inputs.
    """
    layers = patcher.model.diffusion_model.modules()
    formats = {str(kind) for layer in layers if (kind := getattr(layer, "quant_format", None))}
    if others := sorted(formats - set(_EXACT)):
        raise ValueError(
            f"{name} has weights packed as {' and '.join(others)}, through which there are no "
            "right gradients. Choose the bf16 or the fp8 file of the model."
        )
    if formats:
        patcher.force_cast_weights = True


def _copy(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    if not torch.is_grad_enabled():
        return inputs
    return inputs[0].clone(), *inputs[1:]


def _add_backward() -> None:
    """Lets autograd differentiate the kernel by way of the same function in plain PyTorch.

    Does nothing where there is no such kernel; if it was needed, the check will see.
    """
    import comfy.quant_ops

    try:
        plain = getattr(comfy.quant_ops.ck.backends.eager.rope, _KERNEL)
    except AttributeError:
        return
    kernel = f"comfy_kitchen::{_KERNEL}"
    torch.library.register_autograd(kernel, _backward_of(plain), setup_context=_remember)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, freqs, q_scale, k_scale, *numbers = inputs
    ctx.save_for_backward(q, k, freqs, q_scale, k_scale)
    ctx.numbers = numbers


def _backward_of(plain: Any) -> Any:
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        q, k, *rest = ctx.saved_tensors
        with torch.enable_grad():
            q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
            outputs = plain(q, k, *rest, *ctx.numbers)
            found = torch.autograd.grad(outputs, (q, k), gradients)
        return *found, *[None] * (len(rest) + len(ctx.numbers))

    return backward
