"""The teacher: a checkpoint as ComfyUI loads it, in a process that is not ComfyUI's server.

The only file of training/ that knows the host. `enter` comes before anything of the host is
imported; after it, `Teacher.load` gives the frozen network that serves as teacher, target and
student, its schedule, and its text and picture encoders.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..lora.delta import Vector
from ..lora.formats import files
from ..samplers.guidance import refuse_guidance_embedding
from . import disk
from .memory import is_out_of_memory
from .objectives.solver import Schedule
from .spec import StyleLoRA

log = logging.getLogger("lcm_lora")

# The host registers these attention kernels without a backward.
_NO_DEVICE = {"--novram"}  # it leaves the weights where no step can be trained on them
_NO_BACKWARD = {"--use-sage-attention", "--use-flash-attention"}
_ATTENTION = {
    "--use-split-cross-attention", "--use-quad-cross-attention", "--use-pytorch-cross-attention",
}  # fmt: skip
LONGEST = 225  # tokens of a prompt: three of CLIP's windows of 75
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def enter(host: Path, flags: tuple[str, ...] = ()) -> None:
    """Puts the host on the import path with its flags set. Call before any import of the host.

    Raises ValueError when the folder holds no ComfyUI, or the device that the job asks for is not
    there: a ComfyUI without --cpu has one, so that nobody means the processor.
    """
    if not (host / "comfy" / "sd.py").is_file():
        raise ValueError(f"There is no ComfyUI in {host}: expected a folder with comfy/sd.py.")
    if str(host) not in sys.path:
        sys.path.insert(0, str(host))
    kept = [flag for flag in flags if flag not in _NO_BACKWARD | _NO_DEVICE | _ATTENTION]
    kinds = torch.cuda, torch.backends.mps, torch.xpu
    has_device = any(kind.is_available() for kind in kinds)
    other = any(flag == "--cpu" or flag.startswith("--directml") for flag in kept)
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    lacking = not has_device or (
        torch.cuda.is_available() and torch.cuda.device_count() < len((chosen or "").split(","))
    )
    if chosen and lacking and not other:
        raise ValueError(
            f"There is no device {chosen}, or PyTorch does not see it. Set `device` to the "
            "number of a device that exists, 0 for the first, or leave it empty."
        )
    cpu = [] if has_device or "--cpu" in kept else ["--cpu"]
    before = sys.argv
    sys.argv = ["lcm-lora", "--use-pytorch-cross-attention", *cpu, *kept]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401 (reads sys.argv now)
    finally:
        sys.argv = before


def free_memory() -> int:
    """Bytes that a model may still take on the device the host computes on."""
    import comfy.model_management as management

    return int(management.get_free_memory(management.get_torch_device()))


@dataclass
class Teacher:
    """A frozen network and what belongs to it. Called as training/ calls a network.

    Attributes:
        network: the host's UNet, frozen, on `device` in `dtype`.
        schedule: alphas_cumprod on `device`, and the prediction type.
        family: "SD1.5", "SDXL", ... channels: of a latent.
        uncond: the unconditional input, as `text` gives it but on `device`: encode("") for SD1 and
            2, zeros for the SDXL kinds.
        styles: the LoRAs baked into the network, as far as it took them, and their strengths.
    """

    network: nn.Module
    schedule: Schedule
    family: str
    channels: int
    device: torch.device
    dtype: torch.dtype
    uncond: dict[str, torch.Tensor]
    styles: tuple[tuple[Vector, float], ...]
    _patcher: Any
    _clip: Any
    _vae: Any

    @classmethod
    def load(
        cls, checkpoint: Path, precision: str = "auto", loras: tuple[StyleLoRA, ...] = (),
        embeddings: tuple[str, ...] = (),
    ) -> Teacher:  # fmt: skip
        """Raises ValueError when the file is no checkpoint of a family that can be distilled."""
        import comfy.model_management as management
        import comfy.sd

        if not checkpoint.is_file():
            raise ValueError(f"There is no checkpoint {disk.shown(checkpoint)}.")
        refuse_guidance_embedding(checkpoint)
        device = management.get_torch_device()
        dtype = _dtype(precision, device)
        if dtype == torch.float32:  # otherwise cuDNN's convolutions round their inputs to TF32
            torch.backends.cudnn.allow_tf32 = False
        try:
            patcher, clip, vae = comfy.sd.load_checkpoint_guess_config(
                str(checkpoint), embedding_directory=list(embeddings) or None,
                model_options={"dtype": dtype}, disable_dynamic=True,
            )[:3]  # fmt: skip
        except Exception as error:
            if not _blames_the_file(error):
                log.error("ComfyUI failed to load %s.", disk.shown(checkpoint.name))
                raise
            raise ValueError(
                f"{disk.shown(checkpoint.name)} is not a checkpoint that ComfyUI can load: {error}"
            ) from error
        family, prediction = _checked(checkpoint.name, patcher, clip, vae)
        styles = []
        for lora in loras:
            patcher, style = _with_style(patcher, lora)
            styles.append((style, lora.strength))
        management.load_models_gpu([patcher], force_full_load=True)
        network = patcher.model.diffusion_model.requires_grad_(False).eval()
        sigmas = patcher.model.model_sampling.sigmas.float().to(device)
        teacher = cls(
            network, Schedule(1 / (1 + sigmas.square()), prediction), family,
            patcher.model.model_config.unet_config["in_channels"], device, dtype, {},
            tuple(styles), patcher, clip, vae,
        )  # fmt: skip
        empty = teacher.text("")
        if teacher.has_sizes:
            empty = {name: torch.zeros_like(tensor) for name, tensor in empty.items()}
        teacher.uncond = {name: tensor.to(device) for name, tensor in empty.items()}
        return teacher

    def __call__(self, z: torch.Tensor, t: torch.Tensor, **conditions: torch.Tensor):
        """Raw output, float32, for z [B, C, h, w] (VP scale) and t int64 [B]."""
        cast = {name: value.to(self.dtype) for name, value in conditions.items()}
        return self.network(z.to(self.dtype), t.float(), **cast).float()

    @property
    def has_sizes(self) -> bool:
        """Whether the network is told the picture's size, as the SDXL kinds are."""
        return self.network.num_classes == "sequential"

    @torch.no_grad()
    def text(self, caption: str) -> dict[str, torch.Tensor]:
        """{"context": [77 n, D]} and, for the SDXL kinds, {"pooled": [P]}; float32 on the CPU.

        Raises ValueError when the caption is longer than three windows of 75 tokens.
        """
        tokens = self._clip.tokenize(caption)
        windows = max(len(part) for part in tokens.values())
        if windows * 75 > LONGEST:
            raise ValueError(
                f"A caption of about {windows * 75} tokens is too long, at most {LONGEST} can be "
                f"used: {caption[:60]!r}..."
            )
        context, pooled = self._clip.encode_from_tokens(tokens, return_pooled=True)
        found = {"context": context[0].float().cpu()}
        return found | ({"pooled": pooled[0].float().cpu()} if self.has_sizes else {})

    def conditions(
        self, batch: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """A bank's texts and sizes -> conditional and unconditional inputs, on the device.

        Both have the same sizes, as in the reference recipe.
        """
        context = batch["context"].to(self.device)
        empty = self.uncond["context"]
        windows = context.shape[1] // empty.shape[0]
        cond = {"context": context}
        uncond = {"context": empty.repeat(windows, 1).expand_as(context)}
        if self.has_sizes:
            pooled = batch["pooled"].to(self.device)
            none = self.uncond["pooled"].expand_as(pooled)
            cond["y"] = self.sized(pooled, batch["sizes"])
            uncond["y"] = self.sized(none, batch["sizes"])
        return cond, uncond

    def sized(self, pooled: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """The vector y of the SDXL kinds: pooled text [B, P], sizes [B, 6] -> [B, P + 1536].

        sizes: original height and width, crop top and left, target height and width.
        """
        flat = self._patcher.model.embedder(sizes.flatten().float().cpu())
        return torch.cat([pooled.float(), flat.reshape(len(sizes), -1).to(pooled.device)], 1)

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, H, W, 3] in 0..1 -> latents at diffusion scale [B, C, h, w], float32 on the CPU."""
        latents = self._vae.encode(pixels)
        return self._patcher.model.process_latent_in(latents.float()).cpu()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents at diffusion scale [B, C, h, w] -> [B, H, W, 3] in 0..1, float32 on the CPU."""
        raw = self._patcher.model.process_latent_out(latents.float().cpu())
        return self._vae.decode(raw).float().cpu().clamp(0, 1)

    def free_text_encoders(self) -> None:
        """Gives the text encoders' memory back, for good."""
        if self._clip is not None:
            self._make_way(self._clip.patcher)
            self._clip = None

    def free_vae(self) -> None:
        """Takes the VAE off the device; it comes back by itself when it is used."""
        self._make_way(self._vae.patcher)

    def _make_way(self, patcher: Any) -> None:
        """Takes another model off the device, and brings back what it may have pushed out."""
        import comfy.model_management as management

        others = [each for each in management.current_loaded_models if each.model is not patcher]
        management.free_memory(1e30, patcher.load_device, others)
        management.soft_empty_cache()
        management.load_models_gpu([self._patcher], force_full_load=True)

    def untaken(self, path: Path) -> list[str]:
        """Modules of a LoRA file in kohya names that the host does not map onto this network."""
        import comfy.lora

        keys = comfy.lora.model_lora_keys_unet(self._patcher.model, {})
        return sorted(files.read(path).modules() - keys.keys())


def _blames_the_file(error: Exception) -> bool:
    """Whether ComfyUI's loader says that a file is no checkpoint. All else that it raises is about
    the machine, or about ComfyUI itself, and says nothing of the file."""
    words, kind = str(error), type(error).__name__
    if is_out_of_memory(error) or re.search(r"os error \d+", words):
        return False
    # The reader of safetensors files, and those of the .ckpt kind.
    if kind in ("SafetensorError", "UnpicklingError") or isinstance(error, EOFError):
        return True
    said = (
        "Could not detect model type", "safetensors file is corrupt", "loading state_dict",
        "PytorchStreamReader", "weights_only=True",
    )  # fmt: skip
    return isinstance(error, RuntimeError | ValueError) and any(word in words for word in said)


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision != "auto":
        return DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    # Emulated it is slower than float16, which such devices multiply fast.
    supported = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if supported else torch.float16


def _checked(name: str, patcher: Any, clip: Any, vae: Any) -> tuple[str, str]:
    """(family, prediction type), or a ValueError with what this checkpoint is instead."""
    import comfy.model_base as base

    from ..lora.weights.host import detect

    if (
        patcher is None
        or clip is None
        or vae is None
        or getattr(vae, "first_stage_model", 0) is None
    ):
        raise ValueError(
            f"{name} is no full checkpoint: expected network, text encoder and VAE in one file."
        )
    model = patcher.model
    family = detect(patcher)
    kinds = {base.ModelType.EPS: "eps", base.ModelType.V_PREDICTION: "v"}
    if model.model_type not in kinds or family is None:
        raise ValueError(
            f"{name} is a {type(model.model_config).__name__} model of type "
            f"{model.model_type.name}. LCM distillation works on Stable Diffusion 1.x, 2.x, SDXL, "
            "SSD-1B, Segmind Vega and KOALA, with eps or v prediction."
        )
    channels = model.model_config.unet_config["in_channels"]
    if channels != 4:
        raise ValueError(
            f"{name} takes {channels} latent channels: it is an inpainting or editing model, which "
            "wants a picture beside the prompt. Distil the base model it was made from; its "
            "LCM-LoRA works on the inpainting model too."
        )
    classes = model.diffusion_model.num_classes
    if type(model).__name__ not in ("BaseModel", "SDXL") or classes not in (None, "sequential"):
        raise ValueError(
            f"{name} is a {type(model).__name__} model, which wants more than a prompt. Distil the "
            "plain model of its family."
        )
    return family.name, kinds[model.model_type]


def _with_style(patcher: Any, lora: StyleLoRA) -> tuple[Any, Vector]:
    """The model with a LoRA's weights added, which the host bakes in as it loads the model, and
    what of the LoRA it took. Raises ValueError for a LoRA that is no sum."""
    from ..lora.host import apply

    vector = files.read(Path(lora.path))
    if vector.opaque:
        raise ValueError(
            f"The style {vector.source} holds {vector.opaque_kinds} weights, which no file can "
            "hold together with an LCM-LoRA. Choose a LoRA of another kind, or a checkpoint that "
            "has the style in it."
        )
    model, _, coverage = apply(patcher, None, vector, lora.strength, 0.0)
    log.info("baked into the teacher: %s", coverage)
    return model, vector.only(coverage.applied)
