"""The teacher: a checkpoint as ComfyUI loads it, in a process that is not ComfyUI's server.

The only file of the training process that imports ComfyUI. Call `enter` before anything imports
ComfyUI. Then `Teacher.load` gives the frozen network that serves as teacher, target and student,
its noise schedule, and its text and picture encoders.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..lora.delta import Delta, Vector
from ..lora.formats import files
from ..samplers.guidance_embedding import refuse_guidance_embedding
from ..samplers.transfer import sent
from . import disk
from .memory import is_out_of_memory
from .objectives.solver import Schedule
from .spec import StyleLoRA

log = logging.getLogger("lcm_lora")

_NO_DEVICE = {"--novram"}  # keeps the weights off the device, where no step could use them
_NO_BACKWARD = {"--use-sage-attention", "--use-flash-attention"}  # kernels without a backward
_ATTENTION = {
    "--use-split-cross-attention", "--use-quad-cross-attention", "--use-pytorch-cross-attention",
}  # fmt: skip
LONGEST = 225  # tokens of a prompt: three of CLIP's windows of 75
SHRINK = 8  # pixels per latent cell, along each side
Tensors = dict[str, torch.Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def enter(host: Path, flags: tuple[str, ...] = ()) -> None:
    """Puts ComfyUI on the import path with its flags set. Call before any import of ComfyUI.

    Raises ValueError if the folder holds no ComfyUI, or if the device that the job asks for does
    not exist. It does not fall back to the CPU, because a server without --cpu has a device.
    """
    if not (host / "comfy" / "sd.py").is_file():
        raise ValueError(f"There is no ComfyUI in {host}: expected a folder with comfy/sd.py.")
    if str(host) not in sys.path:
        sys.path.insert(0, str(host))
    kept = _for_training(flags)
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
    cpu = [] if has_device or other else ["--cpu"]
    before = sys.argv
    sys.argv = ["lcm-lora", "--use-pytorch-cross-attention", *cpu, *kept]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401 (reads sys.argv when imported)
    finally:
        sys.argv = before


def _for_training(flags: tuple[str, ...]) -> list[str]:
    """ComfyUI's flags without those that training cannot use, and without `--fast` and its values,
    which trade exactness for speed in sampling (sums in float16, multiplications in fp8)."""
    kept: list[str] = []
    is_fast = False
    for flag in flags:
        is_fast = flag == "--fast" or (is_fast and not flag.startswith("-"))
        if not is_fast and flag not in _NO_BACKWARD | _NO_DEVICE | _ATTENTION:
            kept.append(flag)
    return kept


def free_memory() -> int:
    """Bytes that a model can still take on the device that ComfyUI computes on."""
    import comfy.model_management as management

    return int(management.get_free_memory(management.get_torch_device()))


@dataclass
class Teacher:
    """A frozen network with its schedule and encoders. Calling it calls the network.

    Attributes:
        network: ComfyUI's UNet, frozen, on `device` in `dtype`.
        schedule: alphas_cumprod on `device`, and the prediction type.
        architecture: "SD1.5", "SDXL", ...
        channels: of a latent.
        uncond: the unconditional text embeddings, in the form of `text` but on `device`: those of
            the empty prompt for SD1 and SD2, zeros for SDXL and its relatives.
        styles: the parts of the style LoRAs that are baked into the network, with their strengths.
        before_call: is called before each call of the network, and may raise to end the work.
    """

    network: nn.Module
    schedule: Schedule
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

    @classmethod
    def load(
        cls, checkpoint: Path, precision: str = "auto", loras: tuple[StyleLoRA, ...] = (),
        embeddings: tuple[str, ...] = (),
    ) -> Teacher:  # fmt: skip
        """Loads a checkpoint and bakes the style LoRAs into it.

        Raises ValueError if the file is not a checkpoint of an architecture that can be distilled.
        """
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
        architecture, prediction = _checked(checkpoint.name, patcher, clip, vae)
        styles = []
        for lora in loras:
            patcher, style = _with_style(patcher, lora)
            styles.append((style, lora.strength))
        management.load_models_gpu([patcher], force_full_load=True)
        network = patcher.model.diffusion_model.requires_grad_(False).eval()
        sigmas = patcher.model.model_sampling.sigmas.float().to(device)
        teacher = cls(
            network, Schedule(1 / (1 + sigmas.square()), prediction), architecture,
            patcher.model.model_config.unet_config["in_channels"], device, dtype, {},
            tuple(styles), patcher, clip, vae,
        )  # fmt: skip
        empty = teacher.text("")
        if teacher.has_sizes:
            empty = {name: torch.zeros_like(tensor) for name, tensor in empty.items()}
        teacher.uncond = {name: tensor.to(device) for name, tensor in empty.items()}
        return teacher

    def __call__(
        self, z: torch.Tensor, t: torch.Tensor, **conditions: torch.Tensor
    ) -> torch.Tensor:
        """The network's raw output in float32, for z [B, C, h, w] (VP scale) and t int64 [B]."""
        self.before_call()
        cast = {name: value.to(self.dtype) for name, value in conditions.items()}
        return self.network(z.to(self.dtype), t.float(), **cast).float()

    @property
    def has_sizes(self) -> bool:
        """Whether the picture's size is an input of the network, as in SDXL and its relatives."""
        return self.network.num_classes == "sequential"

    def latent_shape(self, side: int) -> torch.Size:
        """[C, h, w] of a square picture's latent; side: in pixels."""
        return torch.Size((self.channels, side // SHRINK, side // SHRINK))

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
                f"A caption of about {windows * 75} tokens is too long, at most {LONGEST} can be "
                f"used: {caption[:60]!r}..."
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
        management.load_models_gpu([self._patcher], force_full_load=True)

    def layers(self, vector: Vector) -> dict[str, Delta]:
        """A LoRA's deltas by the names of the network's layers. A text encoder part is left out.

        Raises ValueError if the network does not take all of it, or if it is no plain LoRA.
        """
        from ..lora.host import apply, beside

        coverage = apply(self._patcher, None, vector, 1.0, 0.0)[2]
        if coverage.left_over:
            raise ValueError(f"start_from: {coverage} Start from a LoRA of the same architecture.")
        deltas = beside(self._patcher, vector)
        if deltas is None:
            kinds = vector.opaque_kinds or "other changes than low-rank factors"
            raise ValueError(
                f"start_from: {vector.source} contains {kinds}, which a training cannot go on "
                "from. Start from a plain LoRA."
            )
        return {name.removeprefix("diffusion_model."): delta for name, delta in deltas.items()}

    def unmatched(self, path: Path) -> list[str]:
        """Modules of a LoRA file, in kohya names, that ComfyUI does not map onto this network."""
        import comfy.lora

        keys = comfy.lora.model_lora_keys_unet(self._patcher.model, {})
        return sorted(files.read(path).modules() - keys.keys())


def _blames_the_file(error: Exception) -> bool:
    """Whether an error of ComfyUI's loader means that the file is not a checkpoint. Other errors
    are about the machine or about ComfyUI."""
    message, kind = str(error), type(error).__name__
    if is_out_of_memory(error) or re.search(r"os error \d+", message):
        return False
    # Raised by the readers of safetensors and .ckpt files.
    if kind in ("SafetensorError", "UnpicklingError") or isinstance(error, EOFError):
        return True
    phrases = (
        "Could not detect model type", "safetensors file is corrupt", "loading state_dict",
        "PytorchStreamReader", "weights_only=True",
    )  # fmt: skip
    return isinstance(error, RuntimeError | ValueError) and any(
        phrase in message for phrase in phrases
    )


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision != "auto":
        return DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    # Emulated bfloat16 is slower than float16.
    supported = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if supported else torch.float16


def _checked(name: str, patcher: Any, clip: Any, vae: Any) -> tuple[str, str]:
    """(architecture, prediction type). Raises ValueError saying what the checkpoint is instead."""
    import comfy.model_base as base

    from ..lora.weights.host import detect

    if (
        patcher is None
        or clip is None
        or vae is None
        or getattr(vae, "first_stage_model", 0) is None
    ):
        raise ValueError(
            f"{name} is not a full checkpoint: expected network, text encoder and VAE in one file."
        )
    model = patcher.model
    architecture = detect(patcher)
    kinds = {base.ModelType.EPS: "eps", base.ModelType.V_PREDICTION: "v"}
    if model.model_type not in kinds or architecture is None:
        raise ValueError(
            f"{name} is a {type(model.model_config).__name__} model of type "
            f"{model.model_type.name}. LCM distillation works on Stable Diffusion 1.x, 2.x, SDXL, "
            "SSD-1B, Segmind Vega and KOALA, with eps or v prediction."
        )
    channels = model.model_config.unet_config["in_channels"]
    if channels != 4:
        raise ValueError(
            f"{name} takes {channels} latent channels: it is an inpainting or editing model, which "
            "needs a picture in addition to the prompt. Distil the base model it was made from; "
            "its LCM-LoRA works on the inpainting model too."
        )
    classes = model.diffusion_model.num_classes
    if type(model).__name__ not in ("BaseModel", "SDXL") or classes not in (None, "sequential"):
        raise ValueError(
            f"{name} is a {type(model).__name__} model, which needs more inputs than a prompt. "
            "Distil the plain model of its architecture."
        )
    return architecture.name, kinds[model.model_type]


def _with_style(patcher: Any, lora: StyleLoRA) -> tuple[Any, Vector]:
    """The model patched with a style LoRA, which ComfyUI bakes in when it loads the model, and the
    part of the LoRA that fits. Raises ValueError if the LoRA cannot be added to another."""
    from ..lora.host import apply

    vector = files.read(Path(lora.path))
    if vector.opaque:
        raise ValueError(
            f"The style {vector.source} contains {vector.opaque_kinds} weights, which cannot be "
            "stored in one file with an LCM-LoRA. Choose another kind of LoRA, or a checkpoint "
            "that contains the style."
        )
    model, _, coverage = apply(patcher, None, vector, lora.strength, 0.0)
    log.info("baked into the teacher: %s", coverage)
    return model, vector.only(coverage.applied)
