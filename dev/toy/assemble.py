"""Puts the full toy checkpoint together from what git holds, once, into a folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = Path(__file__).parent / "weights"
LCM_LORA = WEIGHTS / "toy-lcm-lora.safetensors"
STYLE_LORA = WEIGHTS / "toy-blueprint-lora.safetensors"


def state_dict(
    unet: dict[str, torch.Tensor], vae: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """State dicts of a UNet and a TAESD -> a checkpoint as the host's loader reads it."""
    from . import networks, text

    state = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}
    state |= {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
    state["first_stage_model.vae_scale"] = torch.tensor(networks.VAE_SCALE)
    state["first_stage_model.vae_shift"] = torch.tensor(0.0)
    return state | text.state_dict()


def checkpoint(folder: Path) -> Path:
    """The full checkpoint in `folder` (290 MB), made there if it is not.

    Its name carries a digest of what it is made of, so that new weights make a new file.
    Needs the host on the import path.
    """
    parts = [
        WEIGHTS / "unet.safetensors",
        WEIGHTS / "vae.safetensors",
        Path(__file__).with_name("text.py"),
    ]
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:8]
    path = folder / f"toy-fashion-{digest}.safetensors"
    if path.exists():
        return path
    from . import networks, pack

    with torch.device("meta"):
        shapes = [
            {name: tensor.shape for name, tensor in model.state_dict().items()}
            for model in (networks.unet(), networks.vae())
        ]
    unet, vae = (
        pack.unpack(load_file(part), shape) for part, shape in zip(parts, shapes, strict=False)
    )
    folder.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(state_dict(unet, vae), scratch)
    os.replace(scratch, path)
    return path
