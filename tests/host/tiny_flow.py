"""Small flow models of ComfyUI's own classes with random weights: SD3, Flux, Wan, Cosmos."""

from __future__ import annotations

import torch
from lcm_lora.tests.host.random_unet import randomise

WIDTH = 64  # of the text's features, for all of them
POOLED = 32

NETWORKS = {
    "SD3": {
        "patch_size": 2, "in_channels": 16, "depth": 2, "input_size": None,
        "adm_in_channels": POOLED, "pos_embed_max_size": 16, "num_patches": 256,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": WIDTH, "out_features": 128},
        },
    },
    "Flux": {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": POOLED,
        "context_in_dim": WIDTH, "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1,
        "depth_single_blocks": 2, "axes_dim": [8, 12, 12], "theta": 10000, "patch_size": 2,
        "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
    },
    "WAN21_T2V": {
        "image_model": "wan2.1", "model_type": "t2v", "dim": 128, "ffn_dim": 128, "num_heads": 1,
        "num_layers": 2, "text_dim": WIDTH, "patch_size": (1, 2, 2), "freq_dim": 32,
        "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
        "in_dim": 16, "out_dim": 16, "text_len": 77,
    },
    "CosmosT2IPredict2": {
        "image_model": "cosmos_predict2", "max_img_h": 16, "max_img_w": 16, "max_frames": 4,
        "in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1,
        "model_channels": 128, "num_blocks": 1, "num_heads": 1, "concat_padding_mask": True,
        "crossattn_emb_channels": WIDTH, "pos_emb_cls": "rope3d", "pos_emb_learnable": False,
        "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30, "use_adaln_lora": True,
        "adaln_lora_dim": 16, "rope_h_extrapolation_ratio": 1.0,
        "rope_w_extrapolation_ratio": 1.0, "rope_t_extrapolation_ratio": 1.0,
        "rope_enable_fps_modulation": False,
    },
}  # fmt: skip
SOUND = {  # of LTXAV, which draws a video with its sound
    "image_model": "ltxav", "num_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2,
    "cross_attention_dim": 64, "audio_attention_head_dim": 32, "audio_num_attention_heads": 1,
    "audio_cross_attention_dim": 32, "caption_channels": 64,
}  # fmt: skip
IMAGES = ("SD3", "Flux")  # the others draw videos of one frame or more


def _model(name: str, seed: int, **changes):
    import comfy.supported_models

    settings = NETWORKS[name] | changes | {"dtype": torch.float32}
    config = getattr(comfy.supported_models, name)(settings)
    config.manual_cast_dtype = None
    model = config.get_model({})
    randomise(model.diffusion_model, seed)
    if name == "SD3":  # the only one with a buffer that the host leaves empty
        model.diffusion_model.pos_embed.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def sd3_network(width: int, pooled: int) -> torch.nn.Module:
    """A random SD3 network for a text of other widths than WIDTH and POOLED."""
    text = {"in_features": width, "out_features": 128}
    embedder = {"target": "torch.nn.Linear", "params": text}
    changes = {"context_embedder_config": embedder, "adm_in_channels": pooled}
    return _model("SD3", 0, **changes).diffusion_model


def build(name: str, seed: int = 0):
    """A ModelPatcher around a random network of the host's class `name`."""
    import comfy.model_patcher

    model = _model(name, seed)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def conditioning(seed: int, **more) -> list:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, 77, WIDTH, generator=generator)
    return [[text, {"pooled_output": torch.randn(1, POOLED, generator=generator), **more}]]


def shape(name: str, batch: int = 1, frames: int = 1) -> tuple[int, ...]:
    return (batch, 16, 8, 8) if name in IMAGES else (batch, 16, frames, 8, 8)


def empty(name: str, batch: int = 1, frames: int = 1) -> dict:
    return {"samples": torch.zeros(shape(name, batch, frames))}


def picture(name: str, batch: int = 1, frames: int = 1) -> dict:
    generator = torch.Generator().manual_seed(3)
    return {"samples": torch.randn(shape(name, batch, frames), generator=generator)}


def ours(
    model, latent: dict, steps=4, seed=11, cfg=1.0, denoise=1.0, positive=None, **advanced
) -> torch.Tensor:
    """LCMKSampler, as the graph calls it."""
    from lcm_lora.nodes.sampling import LCMKSampler

    output = LCMKSampler.execute(
        model, seed, steps, cfg, positive or conditioning(1), conditioning(2), latent, denoise,
        **advanced,
    )  # fmt: skip
    return output.result[0]["samples"]


def host_ksampler(
    model, latent: dict, sampler="euler", scheduler="simple", steps=4, denoise=1.0, cfg=1.0
) -> torch.Tensor:
    import nodes

    return nodes.KSampler().sample(
        model, 11, steps, cfg, sampler, scheduler, conditioning(1), conditioning(2), latent,
        denoise,
    )[0]["samples"]  # fmt: skip
