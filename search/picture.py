"""A search as a picture: the measured weights, and pictures at the weights that matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .find import Found

EDGE, LEFT, TITLE, PLOT, TILE = 44, 12, 26, 420, 192
GROUND, AXIS, WORDS, WAY = "#1e1e1e", "#606060", "#d0d0d0", "#4a5a66"
LOW, HIGH, DEFAULT, TAKEN = (78, 168, 222), (200, 90, 60), "#d0d0d0", "#8fd14f"


def sheet(
    found: Found, names: Sequence[str], rows: Mapping[str, Sequence[Image.Image]]
) -> Image.Image:
    """The path of the search to the left, a titled row of pictures for each set of weights to the
    right."""
    sides = [max(picture.size) for pictures in rows.values() for picture in pictures]
    tile = min([TILE, *sides])
    across = max((len(pictures) for pictures in rows.values()), default=0)
    height = max(PLOT, len(rows) * (tile + TITLE) + LEFT)
    image = Image.new("RGB", (PLOT + across * (tile + 4) + 2 * LEFT, height), GROUND)
    image.paste(path(found, names), (0, 0))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for number, (title, pictures) in enumerate(rows.items()):
        top = number * (tile + TITLE)
        pen.text((PLOT + LEFT, top + TITLE / 2), title, WORDS, font, anchor="lm")
        for column, picture in enumerate(pictures):
            small = picture.convert("RGB")
            small.thumbnail((tile, tile), Image.Resampling.LANCZOS)
            image.paste(small, (PLOT + LEFT + column * (tile + 4), top + TITLE))
    return image


def path(found: Found, names: Sequence[str]) -> Image.Image:
    """The first two weights of all measurements in their order, the lower J the bluer, with the
    region of equally good weights: [PLOT, PLOT]."""
    image = Image.new("RGB", (PLOT, PLOT), GROUND)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    region = found.region
    low, high = float(region.low[0]), float(region.high[0])

    def at(weights: np.ndarray) -> tuple[float, float]:
        x, y = (float(weights[1]) - low) / (high - low), (float(weights[0]) - low) / (high - low)
        return EDGE + x * (PLOT - 2 * EDGE), PLOT - EDGE - y * (PLOT - 2 * EDGE)

    pen.rectangle([EDGE, EDGE, PLOT - EDGE, PLOT - EDGE], outline=AXIS)
    turns = np.linspace(0, 2 * np.pi, 73)
    cut = _cut(found)
    ring = [at(np.clip(region.centre[:2] + cut @ (np.cos(t), np.sin(t)), low, high)) for t in turns]
    pen.polygon(ring, fill="#2d4030", outline=TAKEN)
    points = found.points
    pen.line([at(point.weights) for point in points], fill=WAY)
    values = np.array([point.j for point in points])
    share = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
    for part, point in zip(share**0.5, points, strict=True):
        colour = tuple(int(a + (b - a) * part) for a, b in zip(LOW, HIGH, strict=True))
        x, y = at(point.weights)
        pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
    for point, ring_colour in ((found.default, DEFAULT), (found.taken, TAKEN)):
        x, y = at(point.weights)
        pen.ellipse([x - 8, y - 8, x + 8, y + 8], outline=ring_colour, width=2)
    pen.text((PLOT / 2, PLOT - 6), names[1][-48:], WORDS, font, anchor="md")
    pen.text((EDGE, EDGE - 8), names[0][-48:], WORDS, font, anchor="ld")
    for value in (low, high):
        x, y = at(np.array([low, value]))
        pen.text((x, y + 6), f"{value:g}", WORDS, font, anchor="ma")
        x, y = at(np.array([value, low]))
        pen.text((x - 6, y), f"{value:g}", WORDS, font, anchor="rm")
    x = PLOT - EDGE
    pen.text((x, EDGE - 8), "grey: default, green: taken", WORDS, font, anchor="rd")
    return image


def _cut(found: Found) -> np.ndarray:
    """The matrix that maps a unit circle to the region's outline in the first two weights."""
    region = found.region
    bent = (region.axes * (2 * region.rise / region.lengths**2)) @ region.axes.T
    values, axes = np.linalg.eigh(bent[:2, :2])
    return axes * np.sqrt(2 * region.rise / np.maximum(values, 1e-12))
