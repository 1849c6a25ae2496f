"""ComfyUI in a training process: enters it, and loads a checkpoint as a teacher.

Call `enter` before anything imports ComfyUI. `load_teacher` explains why a checkpoint cannot be a
teacher. teacher.py and flow/teacher.py call ComfyUI too, but only through the model loaded here.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from ..lora.delta import Vector
from ..lora.formats import files
from ..samplers.guidance_embedding import refuse_guidance_embedding
from . import disk
from .checkpoint_file import is_fp8
from .flow.host import make_differentiable, require_exact_weights
from .flow.kinds import FLOW_MODELS
from .flow.parts.host import load_parts, require_fitting_parts
from .flow.teacher import FlowTeacher
from .memory import has_own_memory, is_out_of_memory
from .objectives.solver import TIMES, Line, Process, Schedule
from .spec import StyleLoRA
from .teacher import DTYPES, FLOW, Teacher

log = logging.getLogger("lcm_lora")

ROOM = 1 << 29  # bytes that a step needs at least, besides the weights

_NO_DEVICE = {"--novram"}  # keeps the weights off the device, where no step could use them
_NO_BACKWARD = {"--use-sage-attention", "--use-flash-attention"}  # kernels without a backward
_ATTENTION = {
    "--use-split-cross-attention", "--use-quad-cross-attention", "--use-pytorch-cross-attention",
}  # fmt: skip


def enter(host: Path, flags: tuple[str, ...] = ()) -> None:
    """Puts ComfyUI on the import path with its flags set. Call before any import of ComfyUI.

    Raises ValueError if the folder holds no ComfyUI, or if the job's device does not exist. Does
    not fall back to the CPU, because a server without --cpu has a device.
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


def load_teacher(
    checkpoint: Path, precision: str = "auto", loras: tuple[StyleLoRA, ...] = (),
    embeddings: tuple[str, ...] = (), text_encoders: tuple[Path, ...] = (),
    vae_file: Path | None = None, offload: str = "off",
) -> Teacher:  # fmt: skip
    """Loads a checkpoint, or a flow model from the files of its parts, and bakes the style LoRAs
    into it. offload: as in Spec.

    Raises ValueError if the file is not a checkpoint of an architecture that can be distilled, or
    if the parts do not belong together.
    """
    import comfy.model_management as management

    if not checkpoint.is_file():
        raise ValueError(
            f"There is no checkpoint {disk.shown(checkpoint)}: put it back, or start a new job "
            "with another one."
        )
    refuse_guidance_embedding(checkpoint)
    device = management.get_torch_device()
    dtype = _dtype(precision, device)
    if dtype == torch.float32:  # otherwise cuDNN's convolutions round their inputs to TF32
        torch.backends.cudnn.allow_tf32 = False
    stored = torch.float8_e4m3fn if precision == "auto" and is_fp8(checkpoint) else dtype
    if vae_file is not None:
        patcher, clip, vae = load_parts(checkpoint, text_encoders, vae_file, stored, embeddings)
    else:
        patcher, clip, vae = _loaded(checkpoint, stored, embeddings)
    architecture, prediction = _checked(checkpoint.name, patcher, clip, vae)
    styles = []
    for lora in loras:
        patcher, style = _with_style(patcher, lora)
        styles.append((style, lora.strength))
    if prediction == FLOW:
        if precision != "auto":  # ComfyUI might choose another dtype to compute in
            patcher.model.manual_cast_dtype = dtype
        dtype = patcher.model.get_dtype_inference()
        require_exact_weights(checkpoint.name, patcher)
    is_offloaded = _must_offload(offload, patcher, device)
    if is_offloaded:
        patcher.load_device = torch.device("cpu")
    management.load_models_gpu([patcher], force_full_load=True)
    network = patcher.model.diffusion_model.requires_grad_(False).eval()
    if prediction == FLOW:
        make_differentiable(network)
    kind: type[Teacher] = FlowTeacher if prediction == FLOW else Teacher
    teacher = kind(
        network, process_of(patcher, prediction, device), architecture,
        patcher.model.latent_format.latent_channels, device, dtype, {},
        tuple(styles), patcher, clip, vae,
    )  # fmt: skip
    if is_offloaded:
        patcher.model.device = device  # where its inputs are
        teacher.offload()
    empty = teacher.text("")
    if teacher.has_sizes:
        empty = {name: torch.zeros_like(tensor) for name, tensor in empty.items()}
    teacher.uncond = {name: tensor.to(device) for name, tensor in empty.items()}
    if not is_offloaded:  # a text encoder may have displaced it
        management.load_models_gpu([patcher], force_full_load=True)
    if vae_file is not None:
        require_fitting_parts(teacher, text_encoders, vae_file)
    return teacher


def _must_offload(offload: str, patcher: Any, device: torch.device) -> bool:
    if offload != "auto":
        return offload == "on"
    return has_own_memory(device) and patcher.model_size() + ROOM > free_memory()


def _loaded(checkpoint: Path, dtype: torch.dtype, embeddings: tuple[str, ...]) -> Any:
    """ComfyUI's (model, text encoder, VAE) of a checkpoint."""
    import comfy.sd

    try:
        return comfy.sd.load_checkpoint_guess_config(
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


def process_of(patcher: Any, prediction: str, device: torch.device) -> Process:
    """How a model mixes noise."""
    from ..samplers.process.host import shifted

    sampling = patcher.model.model_sampling
    if prediction == FLOW:
        line = [shifted(sampling, (i + 1) / TIMES) for i in range(TIMES)]
        return Line(torch.tensor(line, device=device))
    sigmas = sampling.sigmas.float().to(device)
    return Schedule(1 / (1 + sigmas.square()), prediction)


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
    """(architecture, prediction type). Raises ValueError if the checkpoint cannot be distilled; the
    message says what the checkpoint is."""
    import comfy.model_base as base

    from ..lora.weights.host import detect

    if (
        patcher is None
        or clip is None
        or vae is None
        or getattr(vae, "first_stage_model", 0) is None
    ):
        raise ValueError(
            f"{name} is not a full checkpoint: expected network, text encoder and VAE in one file. "
            "If it is a flow model in several files, name them in Distillation Teacher."
        )
    model = patcher.model
    architecture = detect(patcher)
    if type(model).__name__ in FLOW_MODELS and architecture is not None:
        _require_prompt_only(name, patcher)
        return architecture.name, FLOW
    kinds = {base.ModelType.EPS: "eps", base.ModelType.V_PREDICTION: "v"}
    if model.model_type not in kinds or architecture is None:
        raise ValueError(
            f"{name} is a {type(model.model_config).__name__} model of type "
            f"{model.model_type.name}. LCM distillation works on Stable Diffusion 1.x, 2.x, SDXL, "
            "SSD-1B, Segmind Vega and KOALA, with eps or v prediction, and on the flow models SD3, "
            "Lumina2, Z-Image, Qwen-Image, Flux, Chroma, Flux2, Anima and Wan."
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


def _require_prompt_only(name: str, patcher: Any) -> None:
    """Raises ValueError for a flow model that takes a picture besides the prompt."""
    format_ = patcher.model.latent_format
    frames = (1,) * (format_.latent_dimensions - 2)
    noise = torch.zeros(1, format_.latent_channels, *frames, 16, 16)
    if patcher.model.concat_cond(noise=noise, device=torch.device("cpu")) is not None:
        raise ValueError(
            f"{name} is an inpainting, editing or image-to-video model, which needs a picture in "
            "addition to the prompt. Distil the text-to-image model that it was made from."
        )


def _with_style(patcher: Any, lora: StyleLoRA) -> tuple[Any, Vector]:
    """The model patched with a style LoRA, which ComfyUI merges when it loads the model, and the
    part of the LoRA that fits. Raises ValueError if the LoRA cannot be added to other LoRAs."""
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
