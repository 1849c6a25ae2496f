"""Prepares ComfyUI's transformers so that gradients can flow through them.

Their code and weights stay as they are. gradient_check.py measures whether this is enough.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from ..adapter import BLOCK

# Applies a norm and rotary positions in one kernel without a backward. Anima calls it in training.
_KERNEL = "rms_rope_split_half"
_EXACT = "float8_e4m3fn", "float8_e5m2"  # ComfyUI's formats of scaled fp8


def make_differentiable(network: nn.Module) -> None:
    """Prepares a network, and this process, in which ComfyUI then computes as in its own training.

    - With ComfyUI's flag for training, most transformers avoid kernels that have no backward.
    - The remaining kernel gets a backward.
    - Blocks of Flux's kind change their inputs in place, but a norm needs its input for its
      backward. So each norm gets a copy.
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
    """Makes ComfyUI multiply with the unpacked weights of scaled fp8, instead of rounding the
    inputs to fp8 too. Call it before the network is loaded onto the device.

    Raises ValueError if weights are packed in another format, whose products round the inputs.
    """
    layers = patcher.model.diffusion_model.modules()
    formats = {str(kind) for layer in layers if (kind := getattr(layer, "quant_format", None))}
    if others := sorted(formats - set(_EXACT)):
        raise ValueError(
            f"{name} has weights packed as {' and '.join(others)}, which give no right gradients. "
            "Choose the bf16 or the fp8 file of the model."
        )
    if formats:
        patcher.force_cast_weights = True


def _copy(_layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    if not torch.is_grad_enabled():
        return inputs
    return inputs[0].clone(), *inputs[1:]


def _add_backward() -> None:
    """Gives the kernel a backward, computed with the same function in plain PyTorch.

    Does nothing if there is no such kernel. If it was needed, gradient_check.py will notice.
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
            of_q, of_k = torch.autograd.grad(outputs, (q, k), gradients)
        return of_q, of_k, *[None] * (len(rest) + len(ctx.numbers))

    return backward
