"""Reads captions from text files, .json files and tables of many pictures."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUFFIXES = (".txt", ".caption", ".json")  # in the order of preference
TABLES = {
    "metadata.jsonl": '{"file_name": "a.png", "text": "a caption"}',
    "metadata.csv": "file_name,text",
}
COLUMNS = ("text", "caption")  # a table's columns, or the keys of a .json file
REPEATED = "a later line names its picture again"


def decoded(data: bytes, name: str) -> str:
    """The text of a file's bytes. Raises ValueError naming the line that is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name} is not UTF-8 text (line {line}): save it as UTF-8.") from None


def caption(data: bytes, suffix: str, name: str) -> str:
    """The caption in a file's bytes, "" if there is none. Raises ValueError if it is not text."""
    text = decoded(data, name)
    if suffix.lower() != ".json":
        return text
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise ValueError(
            f'{name} is not a JSON object; expected one such as {{"text": "a caption"}}.'
        )
    for column in COLUMNS:
        if not isinstance(entry.get(column), str | None):
            raise ValueError(f'{name}: its "{column}" must be text, found {entry[column]!r:.80}')
    return _valid(next(filter(str.strip, _texts(entry)), ""), name)


def table(file: Path, name: str, unused: list[tuple[str, str]]) -> dict[Path, str]:
    """Picture -> caption, from a metadata.jsonl or metadata.csv.

    unused: gets the lines that a later line replaces. Raises ValueError for a broken table.
    """
    captions: dict[Path, str] = {}
    lines: dict[Path, int] = {}
    form = TABLES[file.name.lower()]
    rows = _json_lines if file.suffix.lower() == ".jsonl" else _csv_rows
    for number, row in rows(decoded(file.read_bytes(), name)):
        picture_name = row.get("file_name") if isinstance(row, dict) else None
        texts = _texts(row)
        if not isinstance(picture_name, str) or not texts or "\0" in picture_name:
            raise ValueError(
                f"Line {number} of {name} is not of the form {form}, with text or caption: "
                f"{str(row)[:80]!r}"
            )
        picture_name = _spelled(file.parent, picture_name)
        picture = file.parent / picture_name
        # Only the name is checked, because in a Hugging Face download the pictures are links.
        if Path(picture_name).is_absolute() or ".." in Path(picture_name).parts:
            raise ValueError(
                f"Line {number} of {name} names {picture_name!r}, which leaves its folder; "
                "expected a file in the same folder or below."
            )
        if not picture.is_file():
            raise ValueError(
                f"Line {number} of {name} names {picture_name!r}, which does not exist. Add the "
                "file, or remove the line."
            )
        if picture in captions:
            unused.append((f"line {lines[picture]} of {name}", REPEATED))
        caption = next(filter(str.strip, texts), "")
        captions[picture] = _valid(caption, f"Line {number} of {name}")
        lines[picture] = number
    return captions


def _spelled(folder: Path, name: str) -> str:
    """A picture's name as its folder has it. Tables that were made on Windows have backslashes, and
    macOS spells é as two characters."""
    slashed = name.replace("\\", "/")
    forms = [name, slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD"))]
    return next((form for form in forms if (folder / form).is_file()), slashed)


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    """(line number, its value) of each line. The value of a line that is not JSON is its text."""
    # splitlines() would also split at the U+2028 that a JSON string may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = line
            yield number, row


def _csv_rows(text: str) -> Iterator[tuple[int, Any]]:
    """Yields each row's last line number and its cells by column; for a broken row, the error."""
    rows = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        for row in rows:
            yield rows.line_num, row if "file_name" in row else ",".join(rows.fieldnames or ())
    except csv.Error as error:
        yield rows.reader.line_num, str(error)


def _texts(entry: Any) -> list[str]:
    """The captions in a row of a table or in a .json file."""
    columns = [entry.get(column) for column in COLUMNS] if isinstance(entry, dict) else []
    return [text for text in columns if isinstance(text, str)]


def _valid(text: str, where: str) -> str:
    """The text. Raises ValueError if it cannot be encoded: JSON can hold half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} contains half of a character ({text[error.start]!a}), which is not valid "
            "Unicode. Type the text again."
        ) from None
    return text
