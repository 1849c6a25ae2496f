"""Fashion-MNIST as colour photos and captions, and the style that the toy style LoRA learns.

The data set is Debian's package dataset-fashion-mnist (Zalando Research, MIT licence).
"""

from __future__ import annotations

import gzip
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

SIZE = 64  # pixels a side; the VAE makes 8 x 8 latents of them
NAMES = (
    "a t-shirt", "a pair of trousers", "a pullover", "a dress", "a coat",
    "a sandal", "a shirt", "a sneaker", "a bag", "an ankle boot",
)  # fmt: skip
DYES = torch.tensor(
    [
        [0.85, 0.12, 0.15], [0.95, 0.55, 0.10], [0.93, 0.83, 0.20], [0.15, 0.60, 0.25],
        [0.10, 0.55, 0.65], [0.15, 0.25, 0.75], [0.50, 0.18, 0.62], [0.22, 0.20, 0.22],
    ]
)  # fmt: skip
HUES = 6  # kinds the judge sorts backdrops into; drawn from the whole circle
TEMPLATES = ("a photo of {}", "a picture of {}", "{}")

_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
_INSTALLED = Path("/usr/share/datasets/fashion-mnist")


def folder(cache: Path) -> Path:
    """The data set's folder: $FASHION_MNIST, the installed package, or a copy fetched with apt.

    Raises RuntimeError with what to do when none of the three can be had.
    """
    named = os.environ.get("FASHION_MNIST")
    if named:
        return _whole(Path(named), "FASHION_MNIST names this folder")
    if _INSTALLED.is_dir():
        return _whole(_INSTALLED, "the Debian package dataset-fashion-mnist is installed there")
    ours = cache / "fashion-mnist"
    if not ours.is_dir():
        if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
            raise RuntimeError(
                "The toy is trained on Fashion-MNIST, and this machine has no apt-get to fetch "
                "Debian's package dataset-fashion-mnist. Put the four .gz files of the data set "
                "into a folder and set FASHION_MNIST to it."
            )
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            subprocess.run(
                ["apt-get", "download", "dataset-fashion-mnist"], cwd=scratch, check=True
            )
            package = next(Path(scratch).glob("*.deb"))
            subprocess.run(["dpkg-deb", "-x", str(package), scratch], check=True)
            shutil.move(Path(scratch) / _INSTALLED.relative_to("/"), ours)
    return _whole(ours, "it was fetched there")


def _whole(path: Path, why: str) -> Path:
    missing = [name for pair in _FILES.values() for name in pair if not (path / name).is_file()]
    if missing:
        raise RuntimeError(f"Fashion-MNIST in {path} ({why}) lacks {', '.join(missing)}.")
    return path


def load(path: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures uint8 [N, 28, 28] and labels int64 [N] of "train" or "test"."""
    images, labels = _FILES[split]
    with gzip.open(path / images) as stream:
        pixels = np.frombuffer(stream.read(), np.uint8, offset=16).reshape(-1, 28, 28).copy()
    with gzip.open(path / labels) as stream:
        classes = np.frombuffer(stream.read(), np.uint8, offset=8).astype(np.int64)
    return torch.from_numpy(pixels), torch.from_numpy(classes)


def greys(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 28, 28] -> [N, 1, 64, 64] in 0..1: two pixels of margin, twice the size."""
    x = F.pad(pixels.float().div(255.0)[:, None], (2, 2, 2, 2))
    return F.interpolate(x, size=SIZE, mode="bicubic", align_corners=False).clamp(0, 1)


def dyed(
    grey: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Garments [N, 1, 64, 64] -> RGB photos [N, 3, 64, 64], dyes [N], hues of the backdrop [N].

    Each garment gets one of the dyes and a backdrop of any hue and brightness, darker to the
    bottom. No caption names either: a sampler has to make up its mind about them, and one that
    takes few steps without having learnt to leaves them half decided, which is plain to see.
    """
    count = len(grey)
    dye = torch.randint(len(DYES), (count,), generator=generator)
    colour = DYES[dye] + 0.05 * torch.randn(count, 3, generator=generator)
    hue = torch.rand(count, 1, generator=generator)
    tint = 0.5 + 0.5 * torch.cos(2 * math.pi * (hue - torch.arange(3) / 3))
    light = 0.55 + 0.4 * torch.rand(count, 1, generator=generator)
    depth = 0.45 * torch.rand(count, 1, generator=generator).sqrt()
    backdrop = (light * (1 - depth * tint))[:, :, None, None]
    backdrop = backdrop * torch.linspace(1.0, 0.8, SIZE).view(1, 1, SIZE, 1)
    cloth = colour.clamp(0, 1)[:, :, None, None] * (0.35 + 0.65 * grey)
    cloth = cloth + 0.25 * (grey - 0.75).clamp(min=0)
    inside = (5 * grey).clamp(0, 1)
    photos = (backdrop * (1 - inside) + cloth * inside).clamp(0, 1)
    return photos, dye, (hue[:, 0] * HUES).long()


def blueprint(grey: torch.Tensor) -> torch.Tensor:
    """The style: white contour lines on blue paper. [N, 1, H, W] in 0..1 -> [N, 3, H, W]."""
    grey = F.avg_pool2d(grey, 3, 1, 1)
    dx = F.pad(grey[..., :, 2:] - grey[..., :, :-2], (1, 1, 0, 0))
    dy = F.pad(grey[..., 2:, :] - grey[..., :-2, :], (0, 0, 1, 1))
    line = (4.0 * (dx.square() + dy.square()).sqrt() - 0.25).clamp(0, 1)
    paper = torch.tensor([0.08, 0.22, 0.55]).view(1, 3, 1, 1)
    shade = 0.12 * grey
    return ((paper + shade) * (1 - line) + line).clamp(0, 1)


def captions() -> list[str]:
    """Every caption, class after class: caption i belongs to class i // len(TEMPLATES)."""
    return [template.format(name) for name in NAMES for template in TEMPLATES]
