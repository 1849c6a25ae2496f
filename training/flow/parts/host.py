"""A flow model from the files of its parts: diffusion model, text encoders and VAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ... import disk
from ...data.bank import together
from ...memory import is_out_of_memory
from ...teacher import Teacher
from ..kinds import FLOW_MODELS


def load_parts(
    network: Path, text_encoders: Sequence[Path], vae: Path, dtype: torch.dtype,
    embeddings: Sequence[str],
) -> tuple[Any, Any, Any]:  # fmt: skip
    """ComfyUI's (model, text encoder, VAE). Raises ValueError for a file that is no such part."""
    import comfy.sd
    import comfy.utils

    for path in (*text_encoders, vae):
        if not path.is_file():
            raise ValueError(f"There is no file {disk.shown(path)}.")
    patcher = _part(
        [network], "a diffusion model",
        lambda: comfy.sd.load_diffusion_model(
            str(network), model_options={"dtype": dtype}, disable_dynamic=True
        ),
    )  # fmt: skip
    kind = type(patcher.model).__name__
    if kind not in FLOW_MODELS:
        raise ValueError(
            f"{network.name} is a {type(patcher.model.model_config).__name__} model, which cannot "
            "be distilled from several files. Choose a diffusion model of SD3, Lumina2, Z-Image, "
            "Qwen-Image, Flux, Chroma, Flux2, Anima or Wan, or use a checkpoint."
        )
    clip = _part(
        text_encoders, f"a text encoder for {kind}",
        lambda: comfy.sd.load_clip(
            list(map(str, text_encoders)), list(embeddings) or None,
            getattr(comfy.sd.CLIPType, FLOW_MODELS[kind]), disable_dynamic=True,
        ),
    )  # fmt: skip

    def load_vae() -> Any:
        weights, metadata = comfy.utils.load_torch_file(str(vae), return_metadata=True)
        made = comfy.sd.VAE(sd=weights, metadata=metadata)
        made.throw_exception_if_invalid()
        return made

    return patcher, clip, _part([vae], "a VAE", load_vae)


def _part(files: Sequence[Path], what: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip() or type(error).__name__
        raise ValueError(
            f"{_names(files)} is not {what} that ComfyUI can load: {reason}"
        ) from error


def require_fitting_parts(teacher: Teacher, text_encoders: Sequence[Path], vae: Path) -> None:
    """Raises ValueError if the text encoders or the VAE are those of another model."""
    of_model = teacher.latent_dimensions, teacher.channels
    of_vae = teacher.of_vae
    if of_vae != of_model:
        raise ValueError(
            f"{vae.name} is the VAE of another model: its latents have {of_vae[0]} dimensions and "
            f"{of_vae[1]} channels, and those of {teacher.architecture} have {of_model[0]} and "
            f"{of_model[1]}. Choose the VAE of this model."
        )
    z = torch.zeros(1, *teacher.latent_shape(128), device=teacher.device)
    t = torch.tensor([teacher.schedule.T - 1], device=teacher.device)
    texts = together([{name: x.cpu() for name, x in teacher.uncond.items()}])
    try:
        with torch.no_grad():
            teacher(z, t, **teacher.conditions(texts, torch.zeros(1, 6))[0])
    except (RuntimeError, TypeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{_names(text_encoders)}: not the text encoders of {teacher.architecture}, or one is "
            f"missing. Choose all text encoders of this model. ComfyUI says: {error}"
        ) from error


def _names(files: Sequence[Path]) -> str:
    return ", ".join(path.name for path in files)
