"""The demo model's networks, made of the host's own classes, so that the host loads their files."""

from __future__ import annotations

import math

import comfy.ops
import torch
from comfy.cldm.cldm import ControlNet
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.taesd.taesd import TAESD
from torch import nn

VAE_SCALE = 0.18215  # SD1.5's latent scale; the TAESD class multiplies by it before decoding
# Two levels of 320 channels: residual blocks at the full size of the latents, attention at half.
SHAPE = {
    "image_size": 32, "in_channels": 4, "model_channels": 320, "num_res_blocks": [1, 1],
    "channel_mult": [1, 1], "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": -2, "use_spatial_transformer": True, "context_dim": 768,
    "legacy": False, "num_heads": 8, "num_head_channels": -1, "dtype": torch.float32,
    "operations": comfy.ops.disable_weight_init,
}  # fmt: skip


def unet() -> UNetModel:
    """A small UNet that the host takes for SD1.5, without a middle (29.6 M)."""
    return UNetModel(**SHAPE, out_channels=4)


def control_net() -> ControlNet:
    """A ControlNet for that UNet."""
    return ControlNet(**SHAPE, hint_channels=3)


def vae() -> TAESD:
    """The host's tiny VAE, 64 channels throughout (2.4 M)."""
    return TAESD(latent_channels=4)


def initialise(model: nn.Module, seed: int, zero: tuple[str, ...] = ()) -> None:
    """PyTorch's usual initialisation, seeded: the host's modules skip theirs. `zero`: suffixes."""
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        with torch.no_grad():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                weight.fill_(1.0)
                bias.zero_()
            elif isinstance(module, nn.Linear | nn.Conv2d):
                if name.endswith(zero):
                    weight.zero_()
                else:
                    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
                if bias is not None:
                    bias.zero_()
