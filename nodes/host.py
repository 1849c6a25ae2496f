"""What several nodes need from ComfyUI: model folders, the device, progress, text on a node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.v0_0_2 import io
from comfy_execution.utils import get_executing_context

from ..lora.formats.filenames import inside, offered
from ..samplers.report import Line

interruptions: Counter[str] = Counter()
"""How often a node returned partial results after an interruption, by the node's id. The node puts
this count into its fingerprint; otherwise ComfyUI would cache the partial outputs as complete."""


def lora_names() -> list[str]:
    """The LoRA files in ComfyUI's folders, as its lists show them."""
    return offered(folder_paths.get_filename_list("loras"))


def checkpoint_names() -> list[str]:
    """The checkpoint files in ComfyUI's folders, as its lists show them."""
    return folder_paths.get_filename_list("checkpoints")


def part_names(kind: str) -> list[str]:
    """The files in a kind of folder ("diffusion_models", "text_encoders", "vae")."""
    return folder_paths.get_filename_list(kind)


def lora_path(name: str) -> Path:
    """The path of a file from `lora_names`. Raises FileNotFoundError if it is gone."""
    return Path(folder_paths.get_full_path_or_raise("loras", name))


def new_lora_path(name: str) -> Path:
    """The path of a new LoRA, in the first of ComfyUI's LoRA folders. Raises as `inside`."""
    return inside(Path(folder_paths.get_folder_paths("loras")[0]), name)


def device() -> torch.device:
    """The device for full weight changes: ComfyUI's if it is CUDA or ROCm, otherwise the CPU,
    because other devices lack float64 or decompositions."""
    comfy_device = comfy.model_management.get_torch_device()
    return comfy_device if comfy_device.type == "cuda" else torch.device("cpu")


def watched(names: Sequence[str]) -> Iterator[str]:
    """The names one by one, with a progress bar on the node; raises if the user interrupts."""
    bar = comfy.utils.ProgressBar(len(names))
    for name in names:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield name
        bar.update(1)


def weight_input(name: str, tooltip: str, default: float = 1.0) -> io.Float.Input:
    """An input for the weight or strength of a LoRA. The page shows and keeps as many decimals as
    the step has, and some few-step LoRAs are made for 0.125."""
    return io.Float.Input(name, default=default, min=-10.0, max=10.0, step=0.005, tooltip=tooltip)


def show(lines: Sequence[Line]) -> None:
    """Replaces the lines on the running node. Does nothing outside a prompt."""
    if (context := get_executing_context()) is None:
        return
    # Imported here, because it loads the web application, which only a server has.
    from server import PromptServer

    server = PromptServer.instance
    # Not `send_progress_text`: pages show it in English only, and newer ones remove it.
    message = {"node": context.node_id, "lines": [list(line) for line in lines]}
    server.send_sync("lcm_lora.text", message, server.client_id)
