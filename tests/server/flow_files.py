"""Small random networks and LoRAs under the names in the shipped workflows of flow models."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CLIP_WIDTH = 768
VAES = ("ae.safetensors", "qwen_image_vae.safetensors")
TEXTS = (
    "clip_l.safetensors", "t5xxl_fp8_e4m3fn_scaled.safetensors", "qwen_3_4b.safetensors",
    "qwen_2.5_vl_7b_fp8_scaled.safetensors",
)  # fmt: skip
# The class of a network, and what makes it take the text features of a CLIP-L.
NETWORKS = {
    "flux1-dev.safetensors": (
        "Flux", {"vec_in_dim": CLIP_WIDTH, "context_in_dim": CLIP_WIDTH},
    ),
    "qwen_image_fp8_e4m3fn.safetensors": ("QwenImage", {"joint_attention_dim": CLIP_WIDTH}),
    "z_image_turbo_bf16.safetensors": (
        "ZImage",  # whose modulation is 256 wide
        {"cap_feat_dim": CLIP_WIDTH, "dim": 384, "axes_dims": [32, 48, 48]},
    ),
}  # fmt: skip
# The network of a LoRA, and its dialect.
LORAS = {
    "Hyper-FLUX.1-dev-8steps-lora.safetensors": ("flux1-dev.safetensors", "diffusers"),
    "flux_dev_frostinglane_araminta_k.safetensors": ("flux1-dev.safetensors", "kohya"),
    "Qwen-Image-Lightning-4steps-V1.0.safetensors": (
        "qwen_image_fp8_e4m3fn.safetensors", "bare",
    ),
    "gummycandy_qwen.safetensors": ("qwen_image_fp8_e4m3fn.safetensors", "native"),
    "pixel_art_style_z_image_turbo.safetensors": ("z_image_turbo_bf16.safetensors", "native"),
}  # fmt: skip


def names(base: Path) -> None:
    """Empty files of the models, for pages that only open the workflows. LoRAs are not among them:
    the first one in the list is the default of every new node."""
    for folder, files in (
        ("diffusion_models", NETWORKS), ("text_encoders", TEXTS), ("vae", VAES)
    ):  # fmt: skip
        (base / "models" / folder).mkdir(parents=True, exist_ok=True)
        for name in files:
            (base / "models" / folder / name).touch()


def lay_out(base: Path) -> None:
    """The files with random weights. Needs the host on the import path, and the pack
    `small_networks` to load them. The text encoders are all a CLIP-L, the VAEs a TAESD."""
    names(base)
    models = base / "models"
    _texts(models / "text_encoders")
    _vaes(models / "vae")
    networks = {name: _network(models / "diffusion_models" / name) for name in NETWORKS}
    (models / "loras").mkdir(parents=True, exist_ok=True)
    for seed, (name, (network, dialect)) in enumerate(LORAS.items()):
        _lora(models / "loras" / name, networks[network], dialect, seed)


def _network(path: Path):
    """-> its MODEL."""
    import comfy.supported_models
    from lcm_lora.tests.host.flow_models import CONFIGS, flow_model
    from lcm_lora.tests.host.random_unet import randomise

    kind, changes = NETWORKS[path.name]
    patcher = flow_model(kind, **changes)
    randomise(patcher.model.diffusion_model, 0)
    state = patcher.model.diffusion_model.state_dict()
    config = {**getattr(comfy.supported_models, kind).unet_config, **CONFIGS[kind], **changes}
    said = {"small_network": json.dumps([kind, config])}
    save_file(
        {key: value.contiguous() for key, value in state.items()}, path,
        None if kind == "Flux" else said,
    )  # fmt: skip
    return patcher


def _lora(path: Path, patcher, dialect: str, seed: int) -> None:
    from lcm_lora.tests.host.flow_models import dialects, file_of

    tensors = file_of(patcher, dialects(patcher)[dialect], rank=4, seed=seed)
    small = {k: v if k.endswith("alpha") else (0.2 * v).contiguous() for k, v in tensors.items()}
    save_file(small, path)


def _texts(folder: Path) -> None:
    from lcm_lora.dev.toy import text

    before = "cond_stage_model.transformer."
    first, *others = (folder / name for name in TEXTS)
    save_file({key.removeprefix(before): value for key, value in text.state_dict().items()}, first)
    for path in others:
        path.unlink()
        path.hardlink_to(first)


def _vaes(folder: Path) -> None:
    """A TAESD whose pictures are about half grey, so that differences show."""
    import comfy.taesd.taesd
    from lcm_lora.tests.host.random_unet import randomise

    vae = comfy.taesd.taesd.TAESD(latent_channels=16)
    randomise(vae, 0)
    vae.vae_scale.data.fill_(1.0)
    last = vae.taesd_decoder[-1]
    with torch.no_grad():
        drawn = vae.taesd_decoder(
            torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
        )
        last.weight /= 4 * drawn.std()
        last.bias.copy_(0.5 - (drawn.mean((0, 2, 3)) - last.bias) / (4 * drawn.std()))
    for name in VAES:
        save_file({k: v.contiguous() for k, v in vae.state_dict().items()}, folder / name)
