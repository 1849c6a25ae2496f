"""Pictures with their captions: in a folder as text files or a table, or in tar shards."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageFile

from . import disk
from .disk import shown

USUAL = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTIONS = (".txt", ".caption", ".json")  # the first of them that lies beside a picture is taken
TABLES = {
    "metadata.jsonl": '{"file_name": "a.png", "text": "a caption"}',
    "metadata.csv": "file_name,text",
}
COLUMNS = ("text", "caption")  # of a table, or keys of a .json file
ZIPPED = (".tar.gz", ".tgz")
NAMED = 3  # how many faulty files a message names

HIDDEN = "hidden: the name begins with a dot"
UNKNOWN = "no picture that Pillow reads, no caption and no tar"
ALONE = "no picture has its name"
SECOND = "another caption of its picture is taken"
TWICE = "another picture or caption of its sample is taken"
REPEATED = "a later line names its picture again"


@dataclass(frozen=True)
class Captioned:
    """One picture that is not opened yet.

    Attributes:
        name: for messages, relative to what the user named; valid Unicode.
        caption: never empty, valid Unicode.
        stamp: changes with the file: its size and time of change.
        file, offset, size: where its bytes lie; size None means to the file's end.
    """

    name: str
    caption: str
    stamp: tuple[int, int]
    file: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read(-1 if self.size is None else self.size)


class DataSet(list[Captioned]):
    """The captioned pictures of a folder or tar, by name.

    unused: (name, reason) of everything else that lies there.
    """

    def __init__(self, pictures: list[Captioned], unused: list[tuple[str, str]]):
        super().__init__(pictures)
        self.unused = unused


@cache
def picture_suffixes() -> tuple[str, ...]:
    """The endings of the formats that Pillow reads, the usual ones first.

    Without those that it only knows the name of: a "stub" needs another program, and of a film it
    reads the size alone.
    """
    Image.init()
    readers = {kind: reader for kind, (reader, _) in Image.OPEN.items() if kind != "MPEG"}
    stubs = {
        kind for kind, reader in readers.items()
        if isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile)
    }  # fmt: skip
    endings = {
        ending for ending, kind in Image.registered_extensions().items() if kind in readers
        and kind not in stubs
    }  # fmt: skip
    return (*USUAL, *sorted(endings - set(USUAL)))


def find(path: Path) -> DataSet:
    """Every captioned picture of a folder or tar, by name, and what else lies there.

    Folder: a caption beside each picture (`<stem>.txt`, `.caption`, or a `.json` with "text" or
    "caption"), Hugging Face's imagefolder layout with a metadata.jsonl or metadata.csv of
    "file_name" and "text" or "caption", tar shards, or all of these. Linked folders are followed.
    Tar: a WebDataset shard, whose members belong together up to the first dot of their file name.
    Raises ValueError when there is no picture, when a caption is missing, empty or not valid
    Unicode, and for a broken table or tar.
    """
    is_tar = path.is_file() and path.name.lower().endswith((".tar", *ZIPPED))
    if not is_tar and not path.is_dir():
        raise ValueError(f"There is no folder and no tar file {shown(path)}.")
    files, skipped = ([path], []) if is_tar else disk.files_under(path)
    if zipped := [file.name for file in files if file.name.lower().endswith(ZIPPED)]:
        raise ValueError(
            f"{shown(zipped[0])} is a compressed tar, out of which single pictures cannot be read. "
            "Unpack it to a plain .tar with gunzip."
        )
    unused: list[tuple[str, str]] = []
    shards = [file for file in files if file.suffix.lower() == ".tar"]
    pictures = [picture for shard in shards for picture in _tar(shard, unused)]
    if not is_tar:
        others = [file for file in files if file.suffix.lower() != ".tar"]
        pictures += _folder(path, others, skipped, unused)
    if not pictures:
        there = f" {summary(unused)}" if unused else ""
        raise ValueError(
            f"There is no picture in {shown(path)}: expected files that Pillow reads, such as "
            f"{', '.join(USUAL)}, or WebDataset .tar files.{there}"
        )
    return DataSet(pictures, unused)


def summary(unused: list[tuple[str, str]]) -> str:
    """A sentence: how many files are not used, with some of their names and why; "" for none."""
    if not unused:
        return ""
    names: dict[str, list[str]] = {}
    for name, reason in unused:
        names.setdefault(reason, []).append(name)
    parts = [f"{_some(of_reason)} ({reason})" for reason, of_reason in names.items()]
    return f"Not used: {len(unused)} of what is there: {'; '.join(parts)}."


def decoded(data: bytes, name: str) -> str:
    """A text file's contents. Raises ValueError with the line that is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{name} is not UTF-8 text (line {line}): save it as UTF-8."
        ) from None


def _folder(
    root: Path, files: list[Path], skipped: list[tuple[Path, str]], unused: list[tuple[str, str]]
) -> list[Captioned]:
    """The pictures of a folder. skipped: what its list of files leaves out, and why."""

    def name(file: Path) -> str:
        return shown(file.relative_to(root).as_posix())

    tables = [file for file in files if file.name.lower() in TABLES]
    listed: dict[Path, str] = {}
    for table in tables:
        listed |= _table(table, name(table), unused)
    texts: dict[Path, list[Path]] = {}
    for file in files:
        if file.suffix.lower() in CAPTIONS:
            texts.setdefault(file.with_suffix(""), []).append(file)
    pictures = {file for file in files if file.suffix.lower() in picture_suffixes()} | set(listed)
    found, missing, taken = [], [], set()
    for picture in sorted(pictures):
        caption = listed.get(picture, "").strip()
        beside = texts.get(picture.with_suffix(""), [])
        if not caption and beside:
            text = min(beside, key=lambda file: (CAPTIONS.index(file.suffix.lower()), file))
            taken.add(text)
            caption = _caption(text.read_bytes(), text.suffix, name(text)).strip()
        if not caption:
            missing.append(name(picture))
            continue
        stat = picture.stat()
        found.append(Captioned(name(picture), caption, (stat.st_size, stat.st_mtime_ns), picture))
    _none_missing(missing, len(pictures))
    stems = {picture.with_suffix("") for picture in pictures}
    for file in files:
        if file in taken or file in pictures or file in tables:
            continue
        is_caption = file.suffix.lower() in CAPTIONS
        beside = file.with_suffix("") in stems
        unused.append((name(file), (SECOND if beside else ALONE) if is_caption else UNKNOWN))
    unused += [(name(file), reason) for file, reason in skipped if file not in pictures]
    return found


def _table(file: Path, name: str, unused: list[tuple[str, str]]) -> dict[Path, str]:
    """Picture -> caption out of a metadata.jsonl or metadata.csv."""
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
        picture = file.parent / picture_name
        # By its name alone: in a Hugging Face download the pictures themselves are links.
        if Path(picture_name).is_absolute() or ".." in Path(picture_name).parts:
            raise ValueError(f"Line {number} of {name} leaves its folder: {picture_name!r}.")
        if not picture.is_file():
            raise ValueError(
                f"Line {number} of {name} names {picture_name!r}, which is not there."
            )
        if picture in captions:
            unused.append((f"line {lines[picture]} of {name}", REPEATED))
        caption = next(filter(str.strip, texts), "")
        captions[picture] = _valid(caption, f"Line {number} of {name}")
        lines[picture] = number
    return captions


def _json_lines(text: str) -> Iterator[tuple[int, object]]:
    """(number of the line, what it holds); a line that is no JSON as it is."""
    # Not splitlines(), which would also cut at the U+2028 that a JSON string may hold.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = line
            yield number, row


def _csv_rows(text: str) -> Iterator[tuple[int, object]]:
    """(number of its last line, column -> cell) of each row; what is no row as its error."""
    rows = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        for row in rows:
            yield rows.line_num, row if "file_name" in row else ",".join(rows.fieldnames or ())
    except csv.Error as error:
        yield rows.reader.line_num, str(error)


def _texts(entry: object) -> list[str]:
    """The captions that a row of a table, or a .json file, holds."""
    columns = [entry.get(column) for column in COLUMNS] if isinstance(entry, dict) else []
    return [text for text in columns if isinstance(text, str)]


def _caption(data: bytes, suffix: str, name: str) -> str:
    """The caption that a file holds, "" where there is none in it."""
    text = decoded(data, name)
    if suffix.lower() != ".json":
        return text
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is no JSON object.")
    if (wrong := [k for k in COLUMNS if not isinstance(entry.get(k, ""), str | None)]):
        raise ValueError(f'{name}: its "{wrong[0]}" is no text: {entry[wrong[0]]!r:.80}')
    return _valid(next(filter(str.strip, _texts(entry)), ""), name)


def _valid(text: str, where: str) -> str:
    """A text out of JSON, which may hold half of a character that no file and no encoder takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {text[error.start]!a} is half of a character and no valid Unicode. Write "
            "the text anew."
        ) from None
    return text


def _tar(path: Path, unused: list[tuple[str, str]]) -> Iterator[Captioned]:
    """The samples of a shard; only its index is read now, nothing is unpacked."""
    stat = path.stat()
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}

    def name(member: tarfile.TarInfo) -> str:
        return f"{shown(path.name)}/{shown(member.name)}"

    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                folder, _, file_name = member.name.rpartition("/")
                key, _, suffix = file_name.partition(".")
                suffix = f".{suffix.lower()}"
                if member.isdir():
                    continue
                if file_name.startswith("."):
                    unused.append((name(member), HIDDEN))
                elif not member.isfile() or suffix not in (*CAPTIONS, *picture_suffixes()):
                    unused.append((name(member), UNKNOWN))
                else:
                    parts = samples.setdefault(f"{folder}/{key}", {})
                    if suffix in parts:
                        unused.append((name(parts[suffix]), TWICE))
                    parts[suffix] = member
    except tarfile.TarError as error:
        raise ValueError(f"{shown(path.name)} is no whole tar file: {error}.") from None
    missing, pictures = [], 0
    with open(path, "rb") as file:
        for parts in samples.values():
            picture, text = (
                next((parts[suffix] for suffix in suffixes if suffix in parts), None)
                for suffixes in (picture_suffixes(), CAPTIONS)
            )
            if picture is None:
                unused += [(name(member), ALONE) for member in parts.values()]
                continue
            unused += [(name(m), TWICE) for m in parts.values() if m not in (picture, text)]
            pictures += 1
            caption = ""
            if text is not None:
                file.seek(text.offset_data)
                caption = _caption(file.read(text.size), Path(text.name).suffix, name(text))
            if not caption.strip():
                missing.append(name(picture))
                continue
            yield Captioned(
                name(picture), caption.strip(), (stat.st_size, stat.st_mtime_ns), path,
                picture.offset_data, picture.size,
            )  # fmt: skip
    _none_missing(missing, pictures)


def _none_missing(missing: list[str], pictures: int) -> None:
    if missing:
        raise ValueError(
            f"{len(missing)} of {pictures} pictures have no caption: {_some(missing)}. Put a .txt "
            "or .caption file of the same name beside each, or list it in metadata.jsonl or "
            "metadata.csv."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
