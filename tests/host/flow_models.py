"""Small networks of the host's own classes, made as its loaders make them, and LoRAs for them in
each dialect that its key map has."""

from __future__ import annotations

import re

import pytest
import torch

_FLUX = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 64, "context_in_dim": 64,
    "hidden_size": 128, "mlp_ratio": 4.0, "num_heads": 1, "depth": 2, "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True,
    "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
_HUNYUAN = {key: value for key, value in _FLUX.items() if key != "txt_ids_dims"} | {
    "meanflow": False, "byt5": False, "use_cond_type_embedding": False, "vision_in_dim": None,
    "meanflow_sum": False, "patch_size": [1, 2, 2], "theta": 256,
}  # fmt: skip
_NEXT_DIT = {
    "patch_size": 2, "in_channels": 16, "dim": 96, "cap_feat_dim": 64, "n_layers": 2,
    "qk_norm": True, "n_heads": 3, "n_kv_heads": 3, "axes_dims": [8, 12, 12],
    "axes_lens": [16, 16, 16], "rope_theta": 256.0, "ffn_dim_multiplier": 8 / 3,
}  # fmt: skip
_COSMOS = {
    "max_img_h": 16, "max_img_w": 16, "max_frames": 4, "in_channels": 16, "out_channels": 16,
    "patch_spatial": 2, "patch_temporal": 1, "model_channels": 128, "num_blocks": 2,
    "num_heads": 1, "concat_padding_mask": True, "crossattn_emb_channels": 1024,
    "pos_emb_cls": "rope3d",
}  # fmt: skip
CONFIGS = {
    "SD3": {
        "in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 64,
        "context_embedder_config": {
            "target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128},
        },
        "pos_embed_max_size": 8, "num_patches": 64, "qk_norm": "rms", "context_size": 64,
        "x_block_self_attn_layers": [0],
    },
    "AuraFlow": {
        "dim": 128, "n_layers": 3, "n_double_layers": 1, "n_heads": 1, "global_conddim": 128,
        "cond_seq_dim": 64, "max_seq": 64,
    },
    "PixArtSigma": {
        "hidden_size": 64, "depth": 2, "num_heads": 1, "caption_channels": 64, "patch_size": 2,
        "in_channels": 4, "micro_condition": False,
    },
    "HunyuanDiT": {
        "hidden_size": 64, "depth": 2, "num_heads": 1, "text_states_dim": 64,
        "text_states_dim_t5": 64,
    },
    "Flux": _FLUX,
    "FluxSchnell": _FLUX | {"guidance_embed": False},
    "Flux2": _FLUX | {
        "image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1,
        "vec_in_dim": None, "axes_dim": [32] * 4, "mlp_ratio": 3.0, "theta": 2000,
        "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False,
        "txt_ids_dims": [3], "default_ref_method": "index", "ref_index_scale": 10.0,
    },
    "LongCatImage": _FLUX | {"guidance_embed": False, "vec_in_dim": None, "txt_ids_dims": [1, 2]},
    "Chroma": {k: v for k, v in _FLUX.items() if k != "guidance_embed"} | {
        "in_channels": 64, "out_channels": 64, "vec_in_dim": None, "in_dim": 64, "out_dim": 128,
        "hidden_dim": 64, "n_layers": 2,
    },
    "HunyuanVideo": _HUNYUAN,
    "HunyuanImage21": _HUNYUAN | {
        "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "vec_in_dim": None,
        "axes_dim": [64, 64], "guidance_embed": False,
    },
    "Lumina2": _NEXT_DIT | {"n_kv_heads": 1},
    "ZImage": _NEXT_DIT | {
        "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
    },
    "QwenImage": {
        "in_channels": 64, "num_layers": 2, "attention_head_dim": 128, "num_attention_heads": 1,
        "joint_attention_dim": 64,
    },
    "HiDream": {
        "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32,
        "num_attention_heads": 2, "caption_channels": [64, 64], "text_emb_dim": 64,
        "patch_size": 2, "in_channels": 16, "out_channels": 16, "llama_layers": [0, 1, 2, 3],
        "axes_dims_rope": [32, 32], "max_resolution": [16, 16],
    },
    "WAN21_T2V": {
        "dim": 128, "out_dim": 16, "num_heads": 1, "ffn_dim": 256, "num_layers": 2,
        "patch_size": (1, 2, 2), "freq_dim": 64, "window_size": (-1, -1), "qk_norm": True,
        "cross_attn_norm": True, "eps": 1e-6, "in_dim": 16, "model_type": "t2v", "text_dim": 64,
    },
    "Krea2": {
        "features": 256, "tdim": 64, "txtdim": 64, "heads": 2, "kvheads": 1, "layers": 2,
        "txtlayers": 2, "txtheads": 1, "txtkvheads": 1,
    },
    "CosmosT2IPredict2": _COSMOS,
    "Anima": _COSMOS,
    "Omnigen2": {
        "hidden_size": 96, "num_layers": 2, "num_attention_heads": 3, "num_kv_heads": 1,
        "text_feat_dim": 64, "patch_size": 2, "in_channels": 16, "axes_dim_rope": [8, 12, 12],
        "axes_lens": [16] * 3,
    },
    "LTXV": {"num_layers": 2, "attention_head_dim": 4, "cross_attention_dim": 128},
    "Kandinsky5Image": {
        "model_dim": 128, "num_visual_blocks": 2, "ff_dim": 256, "time_dim": 64,
        "axes_dims": (8, 12, 12),
    },
}  # fmt: skip
WITHOUT_NUMBERS = (
    "ErnieImage", "Boogu", "MageFlow", "JoyImage", "Ideogram4", "Lens", "HiDreamO1", "ACEStep"
)  # fmt: skip
"""Classes whose widths are pinned: only their shapes, on the meta device."""
NAMES = {
    "FluxSchnell": "Flux", "PixArtSigma": "PixArt", "HunyuanImage21": "HunyuanImage",
    "ZImage": "Z-Image", "QwenImage": "Qwen-Image", "WAN21_T2V": "Wan", "LTXV": "LTX-Video",
    "CosmosT2IPredict2": "Cosmos-Predict2", "Kandinsky5Image": "Kandinsky5",
    "ErnieImage": "Ernie-Image",
}  # fmt: skip


def flow_model(kind: str, device: str = "cpu", **changes):
    """A ModelPatcher of a class of comfy.supported_models. Skips by name if the host lacks it."""
    import comfy.model_patcher
    import comfy.supported_models

    about = getattr(comfy.supported_models, kind, None)
    if about is None:
        pytest.skip(f"this ComfyUI has no {kind}")
    config = {**about.unet_config, **CONFIGS.get(kind, {}), **changes, "dtype": torch.float32}
    about = about(config)
    about.manual_cast_dtype = None
    model = about.get_model({}, "", device=torch.device(device))
    if adapter := getattr(model.diffusion_model, "llm_adapter", None):  # has one size: a large one
        adapter.embed = type(adapter.embed)(64, adapter.embed.embedding_dim, device=device)
        del adapter.blocks[1:]
    if device != "meta":
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def key_map(patcher) -> dict:
    """The host's own map of names, of two-dimensional weights that the model has."""
    import comfy.lora

    there = patcher.model.state_dict()
    names = {
        name: target
        for name, target in comfy.lora.model_lora_keys_unet(patcher.model, {}).items()
        if (key := weight_of(target)).endswith(".weight") and key in there and there[key].dim() > 1
    }
    # Some tables of the host name rows that models with fewer key heads do not have.
    wrong = {
        weight_of(target)
        for target in names.values()
        if not isinstance(target, str)
        and target[1]
        and sum(target[1][1:]) > there[target[0]].shape[0]
    }
    return {
        name: target
        for name, target in names.items()
        if isinstance(target, str) or target[0] not in wrong
    }


def weight_of(target) -> str:
    return target if isinstance(target, str) else target[0]


_DIALECTS = {
    "kohya": r"lora_unet_",
    "OneTrainer": r"lora_transformer_",
    "SimpleTuner": r"lycoris_",
    "diffusers": r"transformer\.",
    "native": r"diffusion_model\.",
    "PEFT": r"(unet\.)?base_model\.model\.",
    "bare": r"(?=[a-z])",
}


def dialects(patcher) -> dict[str, dict]:
    """The host's names with their targets, by dialect."""
    found: dict[str, dict] = {}
    for name, target in key_map(patcher).items():
        dialect = next(d for d, prefix in _DIALECTS.items() if re.match(prefix, name))
        found.setdefault(dialect, {})[name] = target
    return found


def shape_of(weights, target) -> tuple[int, ...]:
    """The shape of a weight, or of a part of it."""
    shape = tuple(weights[weight_of(target)].shape)
    return shape if isinstance(target, str) or not target[1] else (target[1][2], *shape[1:])


def file_of(patcher, names: dict, rank: int = 2, seed: int = 1, device: str = "cpu") -> dict:
    """A LoRA with all these names. Where two name the same target, as the host's aliases do, only
    the first is in it, because a file has one spelling."""
    generator, tensors, seen = torch.Generator().manual_seed(seed), {}, set()
    weights = patcher.model.state_dict()
    for name, target in names.items():
        if target in seen:
            continue
        seen.add(target)
        out, columns, *kernel = shape_of(weights, target)
        if device == "meta":
            up = torch.empty(out, rank, *[1] * len(kernel), device="meta")
            down = torch.empty(rank, columns, *kernel, device="meta")
        else:
            up = torch.randn(out, rank, *[1] * len(kernel), generator=generator)
            down = torch.randn(rank, columns, *kernel, generator=generator)
        tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"] = up, down
        tensors[f"{name}.alpha"] = torch.tensor(1.5)
    return tensors


def by_host(patcher, *files: dict, weights=None):
    """The model with files patched by the host's own loader."""
    import comfy.lora

    patched = patcher.clone()
    names = comfy.lora.model_lora_keys_unet(patcher.model, {})
    for file, weight in zip(files, weights or [1.0] * len(files), strict=True):
        patched.add_patches(comfy.lora.load_lora(dict(file), names, log_missing=False), weight)
    return patched
