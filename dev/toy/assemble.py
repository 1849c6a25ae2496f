"""Puts the demo model's files together from the packed weights in git, each of them once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .. import server
from ..commands import LOCAL

WEIGHTS = Path(__file__).parent / "weights"
LCM_LORA, STICKER_LORA, BLUEPRINT_LORA = (
    "demo-lcm-lora.safetensors", "demo-sticker-lora.safetensors", "demo-blueprint-lora.safetensors"
)  # fmt: skip
# What the checkpoint was fine-tuned on -> the difference to it.
FINE_TUNED = {"noto": "demo-noto-delta.safetensors", "faces": "demo-faces-delta.safetensors"}


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


def checkpoint(folder: Path = LOCAL / "models", fine_tuned: str = "") -> Path:
    """The full checkpoint in `folder` (310 MB), made there if it is not.

    fine_tuned: "", or a key of FINE_TUNED for the checkpoint that was fine-tuned from it. Needs the
    host on the import path.
    """
    parts = [
        WEIGHTS / "unet.safetensors",
        WEIGHTS / "vae.safetensors",
        Path(__file__).with_name("text.py"),
    ]
    if fine_tuned:
        parts.append(WEIGHTS / FINE_TUNED[fine_tuned])

    def write(path: Path) -> None:
        from . import networks, planes

        with torch.device("meta"):
            shapes = [
                {name: tensor.shape for name, tensor in model.state_dict().items()}
                for model in (networks.unet(), networks.vae())
            ]
        unet, vae = (
            planes.unpack(load_file(part), shape)
            for part, shape in zip(parts, shapes, strict=False)
        )
        for delta in parts[3:]:
            planes.unpack_lora(delta, path)
            add(unet, load_file(path))
        save_file(state_dict(unet, vae), path)

    name = "-".join(filter(None, ("demo-emoji", fine_tuned)))
    return made(f"{name}.safetensors", parts, folder, write)


def add(unet: dict[str, torch.Tensor], delta: dict[str, torch.Tensor]) -> None:
    """Adds the products of low-rank factors to a UNet's weights, in place.

    delta: `MODULE.lora_down.weight` and `MODULE.lora_up.weight` with the UNet's own module names.
    """
    for name, up in delta.items():
        if name.endswith(".lora_up.weight"):
            module = name.removesuffix(".lora_up.weight")
            weight = unet[f"{module}.weight"]
            down = delta[f"{module}.lora_down.weight"].float()
            product = up.float().flatten(1) @ down.flatten(1)
            unet[f"{module}.weight"] = (weight.float() + product.view(weight.shape)).half()


def lora(name: str, folder: Path = LOCAL / "models") -> Path:
    """One of the LoRAs beside it, as an ordinary file in `folder`."""
    from . import planes

    packed = WEIGHTS / name
    return made(name, [packed], folder, lambda path: planes.unpack_lora(packed, path))


def install(base: Path) -> None:
    """Puts the checkpoint and all LoRAs where a server with this base folder looks for them."""
    models = base / "models"
    server.install(checkpoint(), models / "checkpoints")
    for name in (LCM_LORA, STICKER_LORA, BLUEPRINT_LORA):
        server.install(lora(name), models / "loras")


def made(name: str, parts: list[Path], folder: Path, write: Callable[[Path], None]) -> Path:
    """The file `name`, in a folder whose name is a digest of what it is made of."""
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:8]
    path = folder / digest / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        write(scratch)
        os.replace(scratch, path)
    return path
