"""ComfyUI inside this process, for tests and benchmarks that call its functions themselves."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDERS = ("models/checkpoints", "models/loras", "input", "output", "custom_nodes", "user", "temp")


def enter(host: Path, base: Path) -> None:
    """Puts the host on the import path with its flags set; nothing of it is imported yet.

    host: folder of ComfyUI. base: where it looks for models and writes outputs, made here.
    Call it before anything of the host is imported: the host reads its flags on import.
    """
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


def device_flags() -> list[str]:
    """The host needs a flag when there is no GPU."""
    import torch

    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    return [] if accelerated else ["--cpu"]
