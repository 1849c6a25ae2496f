"""The contact sheet: pictures in columns and rows, with the titles of both."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from .axes import Axis

MOST_PIXELS = 4096  # of the pictures across, and down
GROUND, EMPTY, TITLE, LABEL, NOTE = "#ffffff", "#ececec", "#111111", "#333333", "#6a6a6a"
LABEL_LINES = 3


class Sheet:
    """A sheet that grows picture by picture.

    Attributes:
        image: the sheet so far. A cell without a picture is grey.
    """

    def __init__(self, columns: Axis, rows: Axis, note: str, size: tuple[int, int]):
        """note: the text below the pictures. size: of a cell's picture."""
        counts = len(columns.points), len(rows.points)
        scale = min(1.0, *(MOST_PIXELS / (n * side) for n, side in zip(counts, size, strict=True)))
        width, height = (max(1, round(scale * side)) for side in size)
        self.tile = width, height
        text = max(13, min(40, round(width / 13)))
        self.gap, pad = max(4, width // 40), text
        self.font, self.title_font = _font(text), _font(round(1.2 * text))
        self.across = [_wrapped(p.label, i, self.font, width) for i, p in enumerate(columns.points)]
        self.down = [_wrapped(p.label, i, self.font, width) for i, p in enumerate(rows.points)]
        line, title_line = round(1.25 * text), round(1.7 * text)
        has_rows, has_columns = bool(rows.title or counts[1] > 1), bool(columns.title)
        # Around the pictures: the axis' title, then the labels.
        left = pad + (has_rows and round(max(map(self._width, self.down)) + text))
        left += title_line if has_rows and rows.title else 0
        top = pad + (title_line if has_columns else 0)
        top += line * max(label.count("\n") + 1 for label in self.across) + text // 2
        self.corner = left, top
        right = left + counts[0] * (width + self.gap) - self.gap
        bottom = top + counts[1] * (height + self.gap) - self.gap
        notes = _wrapped(note, None, self.font, right - pad, 4)
        note_height = line * (notes.count("\n") + 1) + text if notes else 0
        self.image = Image.new("RGB", (right + pad, bottom + pad + note_height), GROUND)
        self.columns = counts[0]
        self._frame(columns, rows, line)
        pen = ImageDraw.Draw(self.image)
        pen.multiline_text((pad, bottom + text), notes, NOTE, self.font, spacing=line - text)

    def put(self, cell: int, picture: Image.Image) -> None:
        """Puts a picture into a cell. Cells are counted row by row."""
        if picture.size != self.tile:
            picture = picture.resize(self.tile, Image.Resampling.LANCZOS)
        self.image.paste(picture, self._place(cell))

    def _place(self, cell: int) -> tuple[int, int]:
        row, column = divmod(cell, self.columns)
        x, y = (side + self.gap for side in self.tile)
        return self.corner[0] + column * x, self.corner[1] + row * y

    def _width(self, label: str) -> float:
        return max(self.font.getlength(line) for line in label.split("\n"))

    def _frame(self, columns: Axis, rows: Axis, line: int) -> None:
        """The titles, the labels and the empty cells."""
        pen = ImageDraw.Draw(self.image)
        (left, top), (width, height) = self.corner, self.tile
        text, spacing = self.font.size, line - self.font.size
        for cell in range(len(self.across) * len(self.down)):
            x, y = self._place(cell)
            pen.rectangle((x, y, x + width - 1, y + height - 1), fill=EMPTY)
        for number, label in enumerate(self.across):
            at = self._place(number)[0] + width / 2, top - text // 2
            pen.multiline_text(
                at, label, LABEL, self.font, anchor="md", spacing=spacing, align="center"
            )
        for number, label in enumerate(self.down):
            at = left - text // 2, self._place(number * self.columns)[1] + height / 2
            pen.multiline_text(
                at, label, LABEL, self.font, anchor="rm", spacing=spacing, align="right"
            )
        end_x, end_y = self._place(len(self.across) * len(self.down) - 1)
        title = _wrapped(columns.title, None, self.title_font, end_x + width - left, 1)
        middle = (left + end_x + width) / 2, round(0.7 * text)
        pen.text(middle, title, TITLE, self.title_font, anchor="ma")
        if rows.title:
            title = _wrapped(rows.title, None, self.title_font, end_y + height - top, 1)
            size = round(self.title_font.getlength(title)) + 2, round(1.6 * text)
            lying = Image.new("RGB", size, GROUND)
            ImageDraw.Draw(lying).text((1, 0), title, TITLE, self.title_font)
            standing = lying.rotate(90, expand=True)
            y = (top + end_y + height - standing.height) // 2
            self.image.paste(standing, (round(0.6 * text), round(y)))


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _drawable(text: str, font: ImageFont.FreeTypeFont) -> bool:
    """Whether the font has all characters. Pillow's own font has Latin letters only."""
    missing = bytes(font.getmask("\uffff"))
    return all(c.isspace() or bytes(font.getmask(c)) != missing for c in set(text))


def _wrapped(
    text: str,
    number: int | None,
    font: ImageFont.FreeTypeFont,
    width: float,
    most: int = LABEL_LINES,
) -> str:
    """The text in at most `most` lines of this width. number: of the label; it replaces a text that
    the font cannot draw."""
    if not _drawable(text, font):
        text = f"#{number + 1}" if number is not None else _latin(text, font)
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    cut = len(lines) > most
    lines = [_cut(line, font, width, cut and i == most - 1) for i, line in enumerate(lines[:most])]
    return "\n".join(lines)


def _latin(text: str, font: ImageFont.FreeTypeFont) -> str:
    return "".join(c if _drawable(c, font) else "?" for c in text)


def _cut(line: str, font: ImageFont.FreeTypeFont, width: float, more: bool) -> str:
    """The line, shortened to the width. more: whether text after it is left out."""
    if not more and font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"


def joined(pictures: Sequence[Image.Image]) -> Image.Image:
    """The pictures of one cell as one picture; several are arranged in a square."""
    if len(pictures) == 1:
        return pictures[0]
    across = round(len(pictures) ** 0.5 + 0.4999)
    width, height = pictures[0].size
    image = Image.new("RGB", (across * width, -(-len(pictures) // across) * height), GROUND)
    for number, picture in enumerate(pictures):
        image.paste(picture, (number % across * width, number // across * height))
    return image
