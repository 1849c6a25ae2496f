"""Captioned pictures as training examples: oriented, flattened, scaled into a bucket and cropped.

Example `number` is always the same: what is random in it depends on (seed, number).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ...samplers.noise import picture_seed
from .bank import Sizes, Unreadable
from .captioned import Captioned, find

log = logging.getLogger("lcm_lora")
PNG = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


@dataclass(frozen=True)
class Example:
    """A picture as the VAE takes it.

    Attributes:
        pixels: [H, W, 3] float32 in 0..1, of its bucket's size.
        caption: its text.
        sizes: SDXL's size conditioning, as in Teacher.sized.
    """

    pixels: torch.Tensor
    caption: str
    sizes: Sizes


def buckets(resolution: int, multiple: int = 64) -> list[tuple[int, int]]:
    """The sizes (height, width) that pictures are cropped to, the square first.

    The sides are multiples of `multiple` pixels, the area is as near to resolution^2 as they allow
    and never above, and the ratio of the sides is at most 2.
    """
    side = resolution // multiple * multiple
    sizes = [(side, side)]
    for short in range(multiple, side, multiple):
        long = resolution**2 // short // multiple * multiple
        if long <= 2 * short:
            sizes += [(short, long), (long, short)]
    return sizes


class Pictures:
    """Examples from a folder or tar shards, `crops` of each picture.

    resolution: side in pixels of the square whose area the buckets have. flip: whether half of the
    examples are mirrored. multiple: see `buckets`. Raises ValueError as captioned.find does.
    """

    def __init__(
        self, path: Path, resolution: int, crops: int = 1, flip: bool = True, seed: int = 0,
        multiple: int = 64,
    ):  # fmt: skip
        self.data = find(path)
        self.buckets = buckets(resolution, multiple)
        self.choices = {
            "resolution": resolution, "crops": crops, "flip": flip, "seed": seed,
            "multiple": multiple,
        }  # fmt: skip
        self.crops, self.flip, self.seed = crops, flip, seed

    def __len__(self) -> int:
        return len(self.data) * self.crops

    def captions(self) -> list[str]:
        """The caption of each example."""
        return [self.data[number // self.crops].caption for number in range(len(self))]

    def settings(self) -> dict[str, Any]:
        """Everything that the examples depend on, for the bank's key."""
        files = json.dumps([[file.name, file.caption, file.stamp] for file in self.data])
        return {"pictures": hashlib.sha256(files.encode()).hexdigest(), **self.choices}

    def example(self, number: int) -> Example:
        """Raises Unreadable if the file is not a complete picture."""
        source = self.data[number // self.crops]
        image = _opened(source)
        height, width = _nearest(image.height, image.width, self.buckets)
        original = image.height, image.width
        scale = max(height / image.height, width / image.width)
        large = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        top, left, mirrored = self._choice(number, large[1] - height, large[0] - width)
        if mirrored:  # first, so that `left` counts in what the network sees
            image = ImageOps.mirror(image)
        # Only the crop is scaled: a long thin strip that covers a bucket would take gigabytes.
        across, down = image.width / large[0], image.height / large[1]
        box = (left * across, top * down, (left + width) * across, (top + height) * down)
        box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
        image = image.resize((width, height), Image.Resampling.LANCZOS, box)
        pixels = torch.from_numpy(np.asarray(image, np.float32) / 255.0)
        return Example(pixels, source.caption, (*original, top, left, height, width))

    def _choice(self, number: int, down: int, right: int) -> tuple[int, int, bool]:
        """(top, left, mirrored) within `down` and `right` pixels to spare. One crop is centred."""
        generator = torch.Generator().manual_seed(picture_seed(self.seed, number, 0))
        y, x, coin = torch.rand(3, generator=generator).tolist()
        if self.crops == 1:
            y = x = 0.5
        return math.floor(y * (down + 1)), math.floor(x * (right + 1)), self.flip and coin < 0.5


def _opened(source: Captioned) -> Image.Image:
    """The picture as RGB, upright, with white where it was transparent.

    Raises Unreadable if the file is missing, not permitted or not a complete picture, and OSError
    if the disk fails, which says nothing about the picture.
    """
    try:
        data = source.read()
    except (FileNotFoundError, PermissionError) as error:
        raise Unreadable(f"{source.name}: {error.strerror}") from None
    try:
        try:
            return _decoded(data, source.name)
        except ValueError:
            # Pillow refuses a PNG for long texts beside its pixels, such as a workflow.
            if (bare := _without_texts(data)) == data:
                raise
            return _decoded(bare, source.name)
    except UnidentifiedImageError:
        raise Unreadable(f"{source.name}: Pillow cannot read this as a picture.") from None
    except MemoryError:
        raise
    # Pillow raises many kinds of error for a broken file, SyntaxError among them.
    except Exception as error:
        raise Unreadable(f"{source.name}: {error}") from error


def _decoded(data: bytes, name: str) -> Image.Image:
    """A picture's bytes -> RGB, upright, on white. Raises what Pillow raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data))
        # The further frames of a camera's MPO are previews, those of a PSD its layers.
        if getattr(image, "is_animated", False) and image.format not in ("MPO", "PSD"):
            log.warning("only the first frame of %s is used", name)
        return _rgb(image)


def _without_texts(data: bytes) -> bytes:
    """A PNG without the chunks that hold texts and colour profiles. Other data stays the same."""
    if not data.startswith(PNG):
        return data
    kept, at = [PNG], len(PNG)
    while at < len(data):
        # The length of the chunk's content, its kind, the content, and a checksum.
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in PNG_TEXTS:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _rgb(image: Image.Image) -> Image.Image:
    """An opened picture -> RGB, upright, on white. Raises what Pillow raises."""
    tile = repr(
        getattr(image, "tile", "")
    )  # read before the pixels are loaded, because Pillow loads 8 bits
    deep = ";16" in tile
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits.")
    clear = image.info.get("transparency")  # the one transparent colour of a PNG
    if image.mode.startswith("I"):  # 16-bit greys, which convert() would clip
        grey = np.asarray(image, np.float32)
        image = Image.fromarray((grey / 257.0).round().clip(0, 255).astype(np.uint8))
        if isinstance(clear, int):
            image = image.convert("RGBA")
            image.putalpha(Image.fromarray(np.where(grey == clear, 0, 255).astype(np.uint8)))
    elif deep and isinstance(clear, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    elif image.mode == "L" and isinstance(clear, int):  # 2 and 4-bit greys are scaled to 8
        image.info["transparency"] = clear * (85 if ";2" in tile else 17 if ";4" in tile else 1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _nearest(height: int, width: int, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The size whose ratio of sides is nearest, by its logarithm."""
    ratio = math.log(height / width)
    return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))
