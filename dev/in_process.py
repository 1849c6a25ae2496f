"""Loads ComfyUI into this process, for tests and benchmarks that call its functions directly."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDERS = ("models/checkpoints", "models/loras", "input", "output", "custom_nodes", "user", "temp")


_entered: Path | None = None


def enter(host: Path, base: Path) -> Path:
    """Puts ComfyUI on the import path with its flags set. Call this before any import of ComfyUI.

    host: the folder of ComfyUI. base: the folder for models and outputs, made here. -> the base of
    the first call in this process, because ComfyUI reads its flags only once.
    """
    global _entered
    if _entered is not None:
        return _entered
    _entered = base
    for folder in FOLDERS:
        (base / folder).mkdir(parents=True, exist_ok=True)
    if str(host) not in sys.path:
        sys.path.insert(0, str(host))
    before = sys.argv
    sys.argv = ["comfyui", "--base-directory", str(base), *device_flags()]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401 (reads sys.argv now)

    sys.argv = before
    return base


def device_flags() -> list[str]:
    """The flags for this machine: ComfyUI needs one if there is no GPU."""
    import torch

    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    return [] if accelerated else ["--cpu"]
