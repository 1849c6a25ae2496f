"""A line chart as a picture, for the progress of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE, EDGE = (640, 360), 44
GROUND, AXIS, LINE, WORDS = "#1e1e1e", "#606060", "#4ea8de", "#d0d0d0"


def chart(points: Sequence[tuple[float, float | None]], title: str) -> Image.Image:
    """A line through the points (x, y) with a positive y, on a logarithmic scale. A single point
    becomes a dot; without points the picture shows only the title."""
    picture = Image.new("RGB", SIZE, GROUND)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    draw.text((SIZE[0] / 2, 8), title[:80], fill=WORDS, font=font, anchor="ma")
    line = [(x, math.log10(y)) for x, y in points if y is not None and y > 0]
    if not line:
        return picture
    (left, right), (low, high) = _ends([x for x, _ in line]), _ends([y for _, y in line])

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            EDGE + (x - left) / (right - left) * (SIZE[0] - 2 * EDGE),
            SIZE[1] - EDGE - (y - low) / (high - low) * (SIZE[1] - 2 * EDGE),
        )

    draw.rectangle([at(left, high), at(right, low)], outline=AXIS)
    places = [at(x, y) for x, y in line]
    draw.line(places, fill=LINE, width=2)
    if len(places) == 1:
        x, y = places[0]
        draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=LINE)
    for x, anchor in ((left, "la"), (right, "ra")):
        draw.text(
            (at(x, low)[0], SIZE[1] - EDGE + 6), f"{x:g}", fill=WORDS, font=font, anchor=anchor
        )
    for y, anchor in ((low, "rs"), (high, "rt")):
        draw.text((EDGE - 4, at(left, y)[1]), f"{10**y:.2g}", fill=WORDS, font=font, anchor=anchor)
    return picture


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest value, or values around them if they are equal."""
    least, most = min(values), max(values)
    return (least, most) if most > least else (least - 0.5, most + 0.5)
