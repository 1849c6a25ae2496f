"""Recognises files that are not plain LoRAs by the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

# Files with the factors of a LoRA that need more inputs than a model.
_ADAPTERS = (
    (r"lora_controlnet$", "a Control-LoRA; load it with a Load ControlNet Model node"),
    (r"lllite_", "a ControlNet-LLLite; it needs a node pack for those"),
    (r".*\bmotion_modules\.", "an AnimateDiff motion module; it needs a node pack for AnimateDiff"),
    (
        r"\d+\.(to_(q|k|v|out)_lora|to_[kv]_ip)\.|ip_adapter\.|image_proj\.",
        "an IP-Adapter or its LoRA; it needs a node pack for IP-Adapter",
    ),
)
_FLUX = (
    (
        r"(single|double)_blocks\.\d+\.processor\.",
        "a LoRA for FLUX in the layout of XLabs; load it with ComfyUI's own Load LoRA node",
    ),
    (
        r"(single_blocks\.\d+|double_blocks\.\d+\.\w+)\.norm\.key_norm\.scale$",
        "a control LoRA for FLUX, which sets whole weights too; load it with ComfyUI's own Load "
        "LoRA node",
    ),
)
# Whole models. The first that fits counts.
_MODELS = (
    (
        r"(control_model|controlnet\w*|input_hint_block|control_add_embedding|zero_convs)\.",
        "a ControlNet; load it with a Load ControlNet Model node",
    ),
    (
        r"(adapter\.)?body\.\d+\.(in_conv|resnets|resblocks|block[12])\b",
        "a T2I-Adapter; load it with a Load ControlNet Model node",
    ),
    (
        r"(model\.diffusion_model|cond_stage_model|conditioner|first_stage_model)\.",
        "a whole checkpoint; load it with a checkpoint loader",
    ),
    (r"redux_|style_embedding$", "a style model; load it with a Load Style Model node"),
    (r"position_net\.", "a GLIGEN model; load it with a GLIGENLoader node"),
    (r"(vision_model|visual)\.", "a CLIP vision model; load it with a Load CLIP Vision node"),
    (
        r"(transformer\.)?(text_model|resblocks|token_embedding)\.|shared\.weight$"
        r"|encoder\.(block\.\d+\.layer|layers\.\d+\.self_attn)\.|model\.(layers|embed_tokens)\.",
        "a text encoder; load it with a Load CLIP node",
    ),
    (
        r"(vae\.)?(encoder|decoder)\.|taesd_|(post_)?quant_conv\.|\d+\.(conv\.\d+\.)?(weight|bias)$",
        "a VAE; load it with a VAE loader",
    ),
    (
        r"(unet\.|diffusion_model\.)?"
        r"(down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks)\.",
        "a whole UNet; load it with a diffusion model loader",
    ),
    (
        r"(diffusion_model|joint_blocks|double_blocks|single_blocks|transformer_blocks"
        r"|single_transformer_blocks|double_stream_blocks|noise_refiner)\."
        r"|blocks\.\d+\.(self_attn|cross_attn|attn|ffn)\.",
        "a whole diffusion model; load it with a diffusion model loader",
    ),
    (
        r"(params(_ema)?|model\.\d+|conv_first|body\.\d+|layers\.\d+\.residual_group|upsample"
        r"|conv_before_upsample|RRDB_trunk)\.",
        "an upscaler; load it with a Load Upscale Model node",
    ),
)
_EMBEDDING = re.compile(r"bundle_emb\.|emb_params$|string_to_param|clip_[lgh]$|t5(xxl)?$|<.*>$")


def not_a_plain_lora(keys: Iterable[str]) -> str | None:
    """What a file is, and where to load it, if it has the factors of a LoRA but is no LoRA for a
    model alone. None for other files."""
    return _first((*_ADAPTERS, *_FLUX), keys)


def what_it_looks_like(tensors: Mapping[str, Tensor]) -> str:
    """What a file without a LoRA seems to be, and where to load it, as a clause."""
    if not tensors:
        return "it has no tensors at all"
    if all(map(_EMBEDDING.match, tensors)):
        return (
            "it looks like an embedding (textual inversion); put it into the embeddings folder and "
            "name it in the prompt"
        )
    if kind := _first((*_ADAPTERS, *_MODELS), tensors):
        return f"it looks like {kind}"
    return f"its {len(tensors)} keys are unknown, such as {', '.join(list(tensors)[:3])}"


def left_out_because(key: str) -> str:
    """Why a key of a LoRA file is not part of the LoRA, in a few words."""
    if key.startswith("bundle_emb."):
        return "an embedding bundled with the LoRA; embeddings are loaded from their own folder"
    if key.endswith(".alpha"):
        return "an alpha without factors"
    if key.endswith((".weight", ".bias")):
        return "a whole weight, not a change of one"
    return "unknown key"


def _first(kinds: Iterable[tuple[str, str]], keys: Iterable[str]) -> str | None:
    kinds = list(kinds)
    any_kind = re.compile("|".join(f"(?:{pattern})" for pattern, _ in kinds))
    names = list(filter(any_kind.match, keys))  # empty for a plain LoRA
    for pattern, kind in kinds:
        if any(re.match(pattern, name) for name in names):
            return kind
    return None
