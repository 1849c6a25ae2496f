"""A line chart as a picture, for nodes that show how a training goes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE, EDGE = (640, 360), 44
GROUND, AXIS, LINE, WORDS = "#1e1e1e", "#606060", "#4ea8de", "#d0d0d0"


def chart(points: Sequence[tuple[float, float | None]], title: str) -> Image.Image:
    """(x, y) of finite positive y as a line on a logarithmic scale; below two, the title alone."""
    picture = Image.new("RGB", SIZE, GROUND)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    draw.text((SIZE[0] / 2, 8), title[:80], fill=WORDS, font=font, anchor="ma")
    known = [(x, math.log10(y)) for x, y in points if y is not None and y > 0]
    if len(known) < 2:
        return picture
    (left, right), (low, high) = _ends(x for x, _ in known), _ends(y for _, y in known)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            EDGE + (x - left) / (right - left) * (SIZE[0] - 2 * EDGE),
            SIZE[1] - EDGE - (y - low) / (high - low) * (SIZE[1] - 2 * EDGE),
        )

    draw.rectangle([at(left, high), at(right, low)], outline=AXIS)
    draw.line([at(x, y) for x, y in known], fill=LINE, width=2)
    for x, anchor in ((left, "la"), (right, "ra")):
        draw.text(
            (at(x, low)[0], SIZE[1] - EDGE + 6), f"{x:g}", fill=WORDS, font=font, anchor=anchor
        )
    for y, anchor in ((low, "rs"), (high, "rt")):
        draw.text((EDGE - 4, at(left, y)[1]), f"{10**y:.2g}", fill=WORDS, font=font, anchor=anchor)
    return picture


def _ends(values) -> tuple[float, float]:
    """The least and the greatest, never the same."""
    known = list(values)
    least, most = min(known), max(known)
    return (least, most) if most > least else (least - 0.5, most + 0.5)
