"""A sheet of sample pictures as a PNG file that names the prompts of its rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .. import disk

PROMPTS = "prompts"  # the text chunk of the PNG file


def write(path: Path, sheet: Image.Image, prompts: Sequence[str]) -> None:
    """Writes the picture completely or not at all."""
    info = PngInfo()
    info.add_text(PROMPTS, json.dumps(list(prompts)))  # in ASCII, as the chunk requires
    with disk.whole_file(path) as new:
        sheet.save(new, "PNG", pnginfo=info)


def prompts(path: Path) -> list[str]:
    """The prompts of a sheet's rows; empty for a sheet of an older version, or a damaged file."""
    try:
        with Image.open(path) as sheet:
            named = json.loads(sheet.info.get(PROMPTS, "[]"))
    except (OSError, ValueError, SyntaxError):  # Pillow raises the last for a broken PNG
        return []
    is_list = isinstance(named, list) and all(isinstance(prompt, str) for prompt in named)
    return named if is_list else []
