"""Networks of the real shapes with random weights, as ComfyUI builds them."""

from __future__ import annotations

import torch
from torch import nn

SD = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
    "use_spatial_transformer": True, "legacy": False,
}  # fmt: skip
SDXL = SD | {
    "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "context_dim": 2048,
    "use_linear_in_transformer": True, "num_head_channels": 64, "num_classes": "sequential",
    "adm_in_channels": 2816,
}  # fmt: skip
ARCHITECTURES = {
    "SD1.5": SD | {
        "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "context_dim": 768,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "num_heads": 8,
        "num_head_channels": -1,
    },
    "SSD-1B": SDXL | {
        "transformer_depth": [0, 0, 2, 2, 4, 4], "transformer_depth_middle": -1,
        "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4],
    },
    "SDXL": SDXL | {
        "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    },
}  # fmt: skip

TRANSFORMERS = {
    "Flux": {
        "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096,
        "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19,
        "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2,
        "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
    },
    "Qwen-Image": {"num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24},
}  # fmt: skip

_CROSS, _PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def blocks(*kinds: tuple[str, str]) -> dict:
    """diffusers' two lists of block types, given the way down."""
    down, up = zip(*kinds, strict=True)
    return {"down_block_types": down, "up_block_types": up[::-1]}


_DIFFUSERS_SDXL = blocks(_PLAIN, _CROSS, _CROSS) | {
    "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
DIFFUSERS = {
    "SD1.5": blocks(_CROSS, _CROSS, _CROSS, _PLAIN) | {"cross_attention_dim": 768},
    "SSD-1B": _DIFFUSERS_SDXL | {
        "transformer_layers_per_block": (0, (2, 2), (4, 4)),
        "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
        "mid_block_type": "UNetMidBlock2D",
    },
    "SDXL": _DIFFUSERS_SDXL | {"transformer_layers_per_block": (1, 2, 10)},
}  # fmt: skip
"""The same networks as diffusers describes them."""

SMALL = SD | {
    "model_channels": 64, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "context_dim": 32,
    "transformer_depth": [1, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 0, 0], "num_heads": 4, "num_head_channels": -1,
}  # fmt: skip
SMALL_DIFFUSERS = blocks(_CROSS, _PLAIN) | {
    "block_out_channels": (64, 128), "layers_per_block": 1, "cross_attention_dim": 32,
    "attention_head_dim": 4,
}  # fmt: skip
SMALL_SDXL = SDXL | {
    "model_channels": 64, "num_res_blocks": [1, 1], "channel_mult": [1, 2],
    "transformer_depth": [0, 1], "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 1, 1], "num_head_channels": 32,
}  # fmt: skip
SMALL_SDXL_DIFFUSERS = _DIFFUSERS_SDXL | blocks(_PLAIN, _CROSS) | {
    "block_out_channels": (64, 128), "layers_per_block": 1, "attention_head_dim": (2, 4),
    "transformer_layers_per_block": 1,
}  # fmt: skip
RECIPE = {
    "target_modules": [
        "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
        "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv",
        "time_emb_proj",
    ],
}  # fmt: skip
"""What the released recipe passes to peft.LoraConfig."""


def host_unet(
    config: dict, device: str | torch.device, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The host's network with weights that are nowhere zero."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    with torch.device(device):
        unet = UNetModel(
            **config, dtype=dtype, operations=comfy.ops.disable_weight_init, device=device
        )
    if device != "meta":
        fill(unet)
    return unet


def host_transformer(name: str) -> nn.Module:
    """The host's network of a name in TRANSFORMERS, without numbers."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    kind = {"Flux": Flux, "Qwen-Image": QwenImageTransformer2DModel}[name]
    operations, meta = comfy.ops.disable_weight_init, torch.device("meta")
    return kind(**TRANSFORMERS[name], dtype=torch.float32, device=meta, operations=operations)


@torch.no_grad()
def fill(network: nn.Module) -> None:
    """Random weights that are nowhere zero, drawn on the device where they are."""
    generator = None
    for name, p in network.named_parameters():
        generator = generator or torch.Generator(p.device).manual_seed(0)
        if p.dim() > 1:
            p.normal_(std=p[0].numel() ** -0.5, generator=generator)
        else:
            p.normal_(float(name.endswith("weight")), 0.1, generator=generator)
