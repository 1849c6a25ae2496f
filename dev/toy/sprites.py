"""The emoji that the demo model learns to draw, as pictures with alpha: four hands, and faces.

| collection | npm package | made by, licence |
|---|---|---|
| 3d, faces | @lobehub/fluent-emoji-3d | Microsoft's Fluent Emoji, MIT |
| sticker | @iconify-json/fluent-emoji-flat | Microsoft's Fluent Emoji, MIT |
| blueprint | @iconify-json/fluent-emoji-high-contrast | Microsoft's Fluent Emoji, MIT |
| noto | @iconify-json/noto | Google's Noto Emoji, Apache-2.0 |

They are fetched when the model is trained; git holds only what was learnt from them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from .. import environment
from ..npm import fetched
from . import world

SIDE = 256  # pixels a side of a sprite
FLUENT_3D = (
    "@lobehub/fluent-emoji-3d@1.1.0",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
PACKAGES = {
    "3d": FLUENT_3D,
    "faces": FLUENT_3D,
    "sticker": (
        "@iconify-json/fluent-emoji-flat@1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "blueprint": (
        "@iconify-json/fluent-emoji-high-contrast@1.2.6",
        "0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0",
    ),
    "noto": (
        "@iconify-json/noto@1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
}


def load(collection: str, cache: Path) -> torch.Tensor:
    """Sprites of every kind in a collection: uint8 [kinds, 4, SIDE, SIDE], fetched once to `cache`.

    Raises RuntimeError when the package cannot be had, is not the one expected, or lacks an emoji.
    """
    package, digest = PACKAGES[collection]
    kinds = world.kinds_of(collection)
    kind_digest = hashlib.sha256(" ".join(kinds).encode()).hexdigest()[:8]
    path = cache / "emoji" / f"{collection}-{digest[:8]}-{kind_digest}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        archive = fetched(package, digest, path.parent)
        read = _webp if PACKAGES[collection] == FLUENT_3D else _svg
        pictures = read(archive, kinds)
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"sprites": torch.stack(pictures)}, scratch)
        os.replace(scratch, path)
    return load_file(path)["sprites"]


def _webp(archive: Path, kinds: Iterable[str]) -> list[torch.Tensor]:
    with tarfile.open(archive) as tar:
        names = set(tar.getnames())
        pictures = []
        for code in kinds:
            spellings = (f"package/assets/{code}{more}.webp" for more in ("", "-fe0f"))
            name = next((name for name in spellings if name in names), None)
            if name is None:
                raise RuntimeError(f"{archive.name} has no picture of {code}.")
            pictures.append(_pixels(tar.extractfile(name).read()))
    return pictures


def _svg(archive: Path, kinds: Iterable[str]) -> list[torch.Tensor]:
    with tarfile.open(archive) as tar:
        icons, names = (
            json.load(tar.extractfile(f"package/{file}.json")) for file in ("icons", "chars")
        )
    with tempfile.TemporaryDirectory() as scratch:
        for code in kinds:
            name = names.get(code) or names.get(f"{code}-fe0f")
            if name not in icons["icons"]:
                raise RuntimeError(f"{archive.name} has no picture of {code}.")
            icon = icons["icons"][name]
            width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
            body = icon["body"].replace("currentColor", "#000")
            (Path(scratch) / f"{code}.svg").write_text(
                '<svg xmlns="http://www.w3.org/2000/svg" '
                'xmlns:xlink="http://www.w3.org/1999/xlink" '
                f'viewBox="0 0 {width} {height}" width="{SIDE}" height="{SIDE}">{body}</svg>',
                encoding="utf-8",
            )
        programs = environment.tool("resvg-py==0.5.0")
        python = programs / ("python.exe" if os.name == "nt" else "python")
        script = Path(__file__).with_name("raster.py")
        subprocess.run([str(python), str(script), scratch], check=True)
        return [_pixels((Path(scratch) / f"{code}.png").read_bytes()) for code in kinds]


def _pixels(data: bytes) -> torch.Tensor:
    with Image.open(io.BytesIO(data)) as picture:
        picture = picture.convert("RGBA").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
