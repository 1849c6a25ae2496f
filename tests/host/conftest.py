"""The real ComfyUI in this process, and the toy's files where it looks for models."""

from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def comfy(tmp_path_factory, host_folder):
    """.host: ComfyUI's folder; .base: its base directory; .loras, .checkpoints: model folders."""
    from lcm_lora.dev import in_process

    base = tmp_path_factory.mktemp("comfyui")
    in_process.enter(host_folder, base)
    models = base / "models"
    return SimpleNamespace(
        host=host_folder, base=base, loras=models / "loras", checkpoints=models / "checkpoints"
    )


@pytest.fixture(scope="session")
def toy_checkpoint(comfy) -> Path:
    """The assembled toy, kept in the checkout's own folder between runs."""
    from lcm_lora.dev.commands import LOCAL
    from lcm_lora.dev.toy import assemble

    return assemble.checkpoint(LOCAL / "models")
