"""Where vectors support or fight each other, block by block, as a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..lora.compare import Grams, cosine

EDGE, TITLE, SIZES, COSINES = 12, 20, 180, 180
BAR, GAP, LEAST_ROW, LEAST_WIDTH = 5, 6, 18, 560
GROUND, AXIS, WORDS, FIGHT, SUPPORT = "#1e1e1e", "#606060", "#d0d0d0", "#e0604c", "#8fd14f"
COLOURS = (
    "#4ea8de", "#e9a23b", "#c678dd", "#56b6c2", "#d17a9b", "#a3a3a3", "#b58900", "#7f9f7f",
)  # fmt: skip
LEAST_SCALE = 0.1  # the scale's smallest end; smaller cosines are noise
PLACES = ("text", "input", "middle", "output")
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def overlap(grams: Grams, names: Sequence[str]) -> Tensor:
    """A row for each block: the norm of each vector's change there, and the cosine of the angle
    between vector 1 and each other vector. Below 0 they work against each other.

    names: of the vectors. -> an image [1, H, W, 3] in 0..1.
    """
    rows = sorted(grams.by_block, key=_depth)
    row = max(LEAST_ROW, len(names) * BAR + GAP)
    top = EDGE + len(names) * TITLE + 2 * TITLE
    font = ImageFont.load_default(13)
    left = 2 * EDGE + max((int(font.getlength(block)) for _, block in rows), default=0)
    width = left + SIZES + (len(names) - 1) * (COSINES + EDGE) + EDGE
    image = Image.new("RGB", (max(width, LEAST_WIDTH), top + len(rows) * row + EDGE), GROUND)
    pen = ImageDraw.Draw(image)
    _legend(pen, font, grams, names)
    sizes = {part: gram.diagonal().clamp(min=0).sqrt() for part, gram in grams.by_block.items()}
    largest = max((float(size.max()) for size in sizes.values()), default=0.0) or 1.0
    angles = {
        part: [cosine(gram, 0, i) for i in range(1, len(names))]
        for part, gram in grams.by_block.items()
    }
    scale = max([LEAST_SCALE, *(abs(angle) for beside in angles.values() for angle in beside)])
    pen.text((left, top - 4), "size of the change", WORDS, font, anchor="ls")
    middles = [
        left + SIZES + EDGE + i * (COSINES + EDGE) + COSINES / 2 for i in range(len(names) - 1)
    ]
    for number, middle in enumerate(middles, 2):
        pen.text((middle, top - 4), f"cosine of 1 and {number}", WORDS, font, anchor="ms")
        pen.line([(middle, top), (middle, top + len(rows) * row)], AXIS)
    for number, part in enumerate(rows):
        y = top + number * row
        pen.text((left - EDGE, y + row / 2), part[1], WORDS, font, anchor="rm")
        for i, size in enumerate(sizes[part].tolist()):
            bar = y + GAP / 2 + i * BAR, y + GAP / 2 + (i + 1) * BAR - 2
            pen.rectangle(
                [left, bar[0], left + size / largest * (SIZES - EDGE), bar[1]], COLOURS[i]
            )
        for middle, angle in zip(middles, angles[part], strict=True):
            reach = angle / scale * (COSINES / 2 - 46)
            ends = sorted((middle, middle + reach))
            colour = FIGHT if angle < 0 else SUPPORT
            pen.rectangle([ends[0], y + 4, ends[1], y + row - 5], colour)
            if angle:
                beside = middle + reach + (4 if angle > 0 else -4)
                anchor = "lm" if angle > 0 else "rm"
                pen.text((beside, y + row / 2), f"{angle:+.3f}", WORDS, font, anchor=anchor)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


def _legend(pen: ImageDraw.ImageDraw, font: Font, grams: Grams, names: Sequence[str]) -> None:
    total = reduce(torch.add, grams.by_block.values()) if grams.by_block else None
    for i, name in enumerate(names):
        y = EDGE + i * TITLE
        pen.rectangle([EDGE, y + 3, EDGE + 12, y + 13], COLOURS[i])
        text = f"{i + 1}: {name[-60:]}"
        if i and total is not None:
            text += f"   cosine with 1: {cosine(total, 0, i):+.3f}"
        pen.text((EDGE + 20, y + 8), text, WORDS, font, anchor="lm")


def _depth(part: tuple[str, str]) -> tuple[int, list[str | int]]:
    """Sorts blocks as the network goes through them; transformers' by name and number."""
    place, block = part
    order = PLACES.index(place) if place in PLACES else len(PLACES)
    # "~" sorts last, because down- and upsamplers end their level.
    words = re.split(r"(\d+)", block.replace("samplers", "~"))
    return order, [int(word) if word.isdigit() else word for word in words]
