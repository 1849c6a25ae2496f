"""A small SD3 checkpoint of random weights: a network, CLIP-L and a VAE in one file."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file


def write(path: Path) -> Path:
    """280 MB, nearly all of it CLIP-L. ComfyUI's text encoder gives 4096 features, and 2048 for the
    whole text, whichever encoders a file has."""
    from comfy.taesd.taesd import TAESD
    from lcm_lora.dev.toy import text
    from lcm_lora.tests.host import tiny_flow
    from lcm_lora.tests.host.random_unet import randomise

    network = tiny_flow.sd3_network(width=4096, pooled=2048)
    state = {f"model.diffusion_model.{key}": value for key, value in network.state_dict().items()}
    before, after = "cond_stage_model.", "text_encoders.clip_l."
    state |= {key.replace(before, after): value for key, value in text.state_dict().items()}
    vae = TAESD(latent_channels=16)
    randomise(vae, 0)  # ComfyUI's layers leave their weights as the memory was
    vae.vae_scale.data.fill_(1)
    state |= {f"first_stage_model.{key}": value for key, value in vae.state_dict().items()}
    halves = {
        key: value.half().contiguous() if value.dim() else value for key, value in state.items()
    }
    save_file(halves, path)
    return path
