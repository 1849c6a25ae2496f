"""What several nodes ask of the host: its LoRA folders, and a line of text on the running node."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_execution.utils import get_executing_context

from ..lora.formats.filenames import inside, offered


def lora_names() -> list[str]:
    """LoRA files of the host's folders, as its combos spell them."""
    return offered(folder_paths.get_filename_list("loras"))


def checkpoint_names() -> list[str]:
    """Checkpoint files of the host's folders, as its combos spell them."""
    return folder_paths.get_filename_list("checkpoints")


def lora_path(name: str) -> Path:
    """Where a file of `lora_names` lies. Raises FileNotFoundError where it is gone."""
    return Path(folder_paths.get_full_path_or_raise("loras", name))


def new_lora_path(name: str) -> Path:
    """Where a new LoRA of this name goes: into the first of the host's LoRA folders."""
    return inside(Path(folder_paths.get_folder_paths("loras")[0]), name)


def show(text: str) -> None:
    """Shows a line on the node that is being executed; nothing outside a prompt."""
    if (context := get_executing_context()) is None:
        return
    # Not at module scope: it pulls in the whole web application, which only a server has.
    from server import PromptServer

    PromptServer.instance.send_progress_text(text, context.node_id)
