"""The teacher: the frozen network that serves as teacher, target and student, with its schedule
and its text and picture encoders. host.py loads it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..lora.delta import Delta, Vector
from ..lora.formats import files
from ..samplers.transfer import sent
from .adapter import TARGETS
from .objectives.solver import Line, Process
from .offload import keep_weights_off

log = logging.getLogger("lcm_lora")

FLOW = "flow"  # in the place of a prediction type
LONGEST = 225  # tokens of a prompt: three of CLIP's windows of 75
SHRINK = 8  # pixels per latent cell, along each side, of Stable Diffusion
Tensors = dict[str, torch.Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Teacher:
    """A frozen network with its schedule and encoders. Calling a Teacher calls the network.

    Attributes:
        network: ComfyUI's UNet, frozen, on `device` in `dtype`.
        schedule: how it mixes noise; its tables are on `device`.
        architecture: "SD1.5", "SDXL", ...
        channels: of a latent.
        uncond: the unconditional text embeddings, in the form of `text` but on `device`: the
            embeddings of the empty prompt for SD1 and SD2, zeros for SDXL and its relatives.
        styles: the parts of the style LoRAs that are baked into the network, with their strengths.
        before_call: called before each call of the network; may raise to end the work.
        offloaded: whether the weights of its blocks are off the device; see `offload`.
    """

    network: nn.Module
    schedule: Process
    architecture: str
    channels: int
    device: torch.device
    dtype: torch.dtype
    uncond: Tensors
    styles: tuple[tuple[Vector, float], ...]
    _patcher: Any
    _clip: Any
    _vae: Any
    before_call: Callable[[], None] = lambda: None
    offloaded: bool = False

    def __call__(
        self, z: torch.Tensor, t: torch.Tensor, **conditions: torch.Tensor
    ) -> torch.Tensor:
        """The network's raw output in float32, for z [B, C, h, w] (VP scale) and t int64 [B]."""
        self.before_call()
        cast = {name: value.to(self.dtype) for name, value in conditions.items()}
        return self.network(z.to(self.dtype), t.float(), **cast).float()

    @property
    def prediction(self) -> str:
        """What the network predicts: "eps", "v", or "flow" for a velocity."""
        return FLOW if isinstance(self.schedule, Line) else self.schedule.prediction

    @property
    def targets(self) -> re.Pattern[str]:
        """Matches a part of the names of the layers that a LoRA changes."""
        return TARGETS

    @property
    def has_sizes(self) -> bool:
        """Whether the picture's size is an input of the network, as in SDXL and its relatives."""
        return self.network.num_classes == "sequential"

    def latent_shape(self, side: int) -> torch.Size:
        """[C, h, w] of a square picture's latent; side: in pixels."""
        return torch.Size((self.channels, side // self.shrink, side // self.shrink))

    @property
    def shrink(self) -> int:
        """Pixels per latent cell, along each side."""
        return SHRINK

    @property
    def latent_dimensions(self) -> int:
        """2 for pictures, 3 for videos."""
        return int(self._patcher.model.latent_format.latent_dimensions)

    @property
    def of_vae(self) -> tuple[int, int]:
        """(dimensions, channels) of the latents that the VAE makes."""
        return int(self._vae.latent_dim), int(self._vae.latent_channels)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the network's weights on the device."""
        return int(self._patcher.model_size())

    @property
    def guided_calls(self) -> int:
        """How many calls of the network a guided prediction of one picture takes."""
        return 2

    def use_guidance(self, scale: tuple[float, ...]) -> None:  # noqa: B027 (most have no input for it)
        """Takes the job's guidance scale, one number or a range. Raises ValueError if the network
        cannot use it."""

    @torch.no_grad()
    def text(self, caption: str) -> Tensors:
        """A caption's embeddings, float32 on the CPU: {"context": [77 n, D]}, and "pooled": [P] for
        SDXL and its relatives.

        Raises ValueError if the caption is longer than three windows of 75 tokens.
        """
        tokens = self._clip.tokenize(caption)
        windows = max(len(part) for part in tokens.values())
        if windows * 75 > LONGEST:
            raise ValueError(
                f"A caption of about {windows * 75} tokens is too long; expected at most {LONGEST}."
                f" Shorten it: {caption[:60]!r}..."
            )
        context, pooled = self._clip.encode_from_tokens(tokens, return_pooled=True)
        embeddings = {"context": context[0].float().cpu()}
        return embeddings | ({"pooled": pooled[0].float().cpu()} if self.has_sizes else {})

    def conditions(self, texts: Tensors, sizes: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Conditional and unconditional inputs of the network, on the device.

        texts: "context" [B, L, D] and, for SDXL and its relatives, "pooled" [B, P]; sizes: [B, 6]
        as in `sized`. Both inputs have the same sizes, as in the reference recipe.
        """
        context = sent(texts["context"], self.device)
        empty = self.uncond["context"]
        windows = context.shape[1] // empty.shape[0]
        cond = {"context": context}
        uncond = {"context": empty.repeat(windows, 1).expand_as(context)}
        if self.has_sizes:
            pooled, sized = sent(texts["pooled"], self.device), self.sized(sizes)
            cond["y"] = torch.cat([pooled.float(), sized], 1)
            uncond["y"] = torch.cat([self.uncond["pooled"].expand_as(pooled), sized], 1)
        return cond, uncond

    def sized(self, sizes: torch.Tensor) -> torch.Tensor:
        """The embedding [B, 1536] of sizes [B, 6], which follows the pooled text in SDXL's vector
        y. It is on the device, but computed on the CPU, so that it is the same everywhere.

        sizes: original height and width, crop top and left, target height and width (arXiv
        2307.01952, section 2.2).
        """
        flat = self._patcher.model.embedder(sizes.flatten().float().cpu())
        return sent(flat.reshape(len(sizes), -1), self.device)

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pictures [B, H, W, 3] in 0..1 -> latents [B, C, h, w] at diffusion scale, float32 on the
        CPU."""
        latents = self._vae.encode(pixels)
        return self._patcher.model.process_latent_in(latents.float()).cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, C, h, w] at diffusion scale -> pictures [B, H, W, 3] in 0..1, float32 on the
        CPU."""
        raw = self._patcher.model.process_latent_out(latents.float().cpu())
        return self._vae.decode(raw).float().cpu().clamp(0, 1)

    def free_text_encoders(self) -> None:
        """Frees the text encoders' memory. `text` cannot be called afterwards."""
        if self._clip is not None:
            self._make_way(self._clip.patcher)
            self._clip = None

    def free_vae(self) -> None:
        """Takes the VAE off the device. It returns when it is used."""
        self._make_way(self._vae.patcher)

    def _make_way(self, patcher: Any) -> None:
        """Takes a model off the device, and puts the network back if that model displaced it."""
        import comfy.model_management as management

        others = [
            loaded for loaded in management.current_loaded_models if loaded.model is not patcher
        ]
        management.free_memory(1e30, patcher.load_device, others)
        management.soft_empty_cache()
        if not self.offloaded:
            management.load_models_gpu([self._patcher], force_full_load=True)

    def offload(self) -> None:
        """Keeps the weights of the network's blocks in the computer's memory. Blocks must then be
        recomputed in backward."""
        kept = keep_weights_off(self.network, self.device)
        self.offloaded = True
        log.info("%.1f GB of weights stay in the computer's memory", kept / 1e9)

    def layers(self, vector: Vector) -> dict[str, Delta]:
        """A LoRA's deltas by the names of the network's layers. A text encoder part is left out.

        Raises ValueError if the network does not take all of it, or if it is no plain LoRA.
        """
        from ..lora.host import apply, beside

        coverage = apply(self._patcher, None, vector, 1.0, 0.0)[2]
        if coverage.left_over:
            raise ValueError(f"start_from: {coverage} Choose a LoRA for the same architecture.")
        deltas = beside(self._patcher, vector)
        if deltas is None:
            kinds = vector.opaque_kinds or "other changes than low-rank factors"
            raise ValueError(
                f"start_from: {vector.source} contains {kinds}, from which a job cannot start. "
                "Choose a plain LoRA."
            )
        return {name.removeprefix("diffusion_model."): delta for name, delta in deltas.items()}

    def unmatched(self, path: Path) -> list[str]:
        """Modules of a LoRA file, in kohya names, that ComfyUI does not map onto this network."""
        import comfy.lora

        keys = comfy.lora.model_lora_keys_unet(self._patcher.model, {})
        return sorted(files.read(path).modules() - keys.keys())
