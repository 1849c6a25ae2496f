"""Finds pictures with their captions, in a folder or in tar shards."""

from __future__ import annotations

import tarfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageFile

from .. import disk
from ..disk import HIDDEN, shown
from . import captions

USUAL = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ZIPPED = (".tar.gz", ".tgz")
NAMED = 3  # the most faulty files that a message names
LONGEST = 50  # characters of an example in a message

UNKNOWN = "neither a picture that Pillow reads nor a caption nor a tar"
ALONE = "no picture has the same name"
SECOND = "another caption of its picture is used"
TWICE = "another picture or caption of its sample is used"


@dataclass(frozen=True)
class Captioned:
    """A picture that is not opened yet.

    Attributes:
        name: for messages, relative to the user's folder or tar; valid Unicode.
        caption: not empty, valid Unicode.
        stamp: the file's size and modification time in ns.
        file, offset, size: the file and the bytes in it; size None means to the end of the file.
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
    """The captioned pictures of a folder or tar, sorted by name.

    unused: (name, reason) of everything else in it.
    """

    def __init__(self, pictures: list[Captioned], unused: list[tuple[str, str]]):
        super().__init__(pictures)
        self.unused = unused


@cache
def picture_suffixes() -> tuple[str, ...]:
    """The file name suffixes of the formats that Pillow reads, the usual ones first.

    Leaves out formats that Pillow only recognises: a "stub" needs another program, and Pillow reads
    only the size of a film.
    """
    Image.init()
    readers = {kind: reader for kind, (reader, _) in Image.OPEN.items() if kind != "MPEG"}
    stubs = {
        kind for kind, reader in readers.items()
        if isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile)
    }  # fmt: skip
    readable = readers.keys() - stubs
    suffixes = {s for s, kind in Image.registered_extensions().items() if kind in readable}
    return (*USUAL, *sorted(suffixes - set(USUAL)))


def find(path: Path) -> DataSet:
    """Every captioned picture of a folder or tar, and what else is in it.

    A folder may hold a caption beside each picture (`<stem>.txt`, `.caption`, or a `.json` with
    "text" or "caption"), Hugging Face's imagefolder layout with a metadata.jsonl or metadata.csv of
    "file_name" and "text" or "caption", tar shards, or all of these. Links to folders are followed.
    A tar is a WebDataset shard: members whose names agree up to the first dot belong together.
    Raises ValueError if there is no picture, if a caption is missing, empty or not valid Unicode,
    or if a table or tar is broken.
    """
    is_tar = path.is_file() and path.name.lower().endswith((".tar", *ZIPPED))
    if not is_tar and not path.is_dir():
        raise ValueError(
            f"There is no folder and no tar file {shown(path)}: expected a folder of pictures with "
            "captions, or a WebDataset tar."
        )
    files, skipped = ([path], []) if is_tar else disk.files_under(path)
    if zipped := [file.name for file in files if file.name.lower().endswith(ZIPPED)]:
        raise ValueError(
            f"{shown(zipped[0])} is a compressed tar, from which single pictures cannot be read. "
            "Unpack it to a plain .tar with gunzip."
        )
    unused: list[tuple[str, str]] = []
    shards = [file for file in files if file.suffix.lower() == ".tar"]
    pictures = [picture for shard in shards for picture in _tar(shard, unused)]
    if not is_tar:
        others = [file for file in files if file.suffix.lower() != ".tar"]
        pictures += _folder(path, others, skipped, unused)
    if not pictures:
        raise ValueError(
            f"There is no picture in {shown(path)}: expected files that Pillow reads, such as "
            f"{', '.join(USUAL)}, or WebDataset .tar files. {summary(unused)}".rstrip()
        )
    return DataSet(pictures, unused)


def summary(unused: list[tuple[str, str]]) -> str:
    """A sentence that says how many files are not used and why, with an example of each reason; ""
    if all are used."""
    if not unused:
        return ""
    names: dict[str, list[str]] = {}
    for name, reason in unused:
        # A prompt may be long; the log has all in full.
        names.setdefault(reason, []).append(name if len(name) <= LONGEST else f"{name[:LONGEST]}…")
    parts = [f"{_some(which, 1)} ({reason})" for reason, which in names.items()]
    return f"Not used ({len(unused)}): {'; '.join(parts)}."


def _folder(
    root: Path, files: list[Path], skipped: list[tuple[Path, str]], unused: list[tuple[str, str]]
) -> list[Captioned]:
    """The captioned pictures of a folder. skipped: (file, reason) of each entry not in `files`."""

    def name(file: Path) -> str:
        return shown(file.relative_to(root).as_posix())

    tables = [file for file in files if file.name.lower() in captions.TABLES]
    listed: dict[Path, str] = {}
    for table in tables:
        listed |= captions.table(table, name(table), unused)
    texts: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix.lower() in captions.SUFFIXES:
            texts.setdefault(_stem(file), []).append(file)
    pictures = {file for file in files if file.suffix.lower() in picture_suffixes()} | set(listed)
    captioned, missing, taken = [], [], set()
    for picture in sorted(pictures):
        caption = listed.get(picture, "").strip()
        beside = texts.get(_stem(picture), [])
        for text in sorted(beside, key=lambda file: captions.SUFFIXES.index(file.suffix.lower())):
            if not caption:
                taken.add(text)
                caption = captions.caption(text.read_bytes(), text.suffix, name(text)).strip()
        if not caption:
            missing.append(name(picture))
            continue
        stat = picture.stat()
        stamp = stat.st_size, stat.st_mtime_ns
        captioned.append(Captioned(name(picture), caption, stamp, picture))
    _require_captions(missing, len(pictures))
    stems = set(map(_stem, pictures))
    for file in files:
        if file in taken or file in pictures or file in tables:
            continue
        is_caption = file.suffix.lower() in captions.SUFFIXES
        reason = SECOND if _stem(file) in stems else ALONE
        unused.append((name(file), reason if is_caption else UNKNOWN))
    unused += [(name(file), reason) for file, reason in skipped if file not in pictures]
    return captioned


def _stem(file: Path) -> str:
    """What a picture and its caption share. macOS spells é as two characters, others as one."""
    return unicodedata.normalize("NFC", str(file.with_suffix("")))


def _tar(path: Path, unused: list[tuple[str, str]]) -> Iterator[Captioned]:
    """The samples of a shard. Only its index and captions are read, and nothing is unpacked."""
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
                elif not member.isfile() or suffix not in (*captions.SUFFIXES, *picture_suffixes()):
                    unused.append((name(member), UNKNOWN))
                else:
                    parts = samples.setdefault(f"{folder}/{key}", {})
                    if suffix in parts:
                        unused.append((name(parts[suffix]), TWICE))
                    parts[suffix] = member
    except tarfile.TarError as error:
        raise ValueError(
            f"{shown(path.name)} is not a complete tar file: {error}. Copy or download it again."
        ) from None
    missing, pictures = [], 0
    with open(path, "rb") as file:
        for parts in samples.values():
            picture = next(filter(None, map(parts.get, picture_suffixes())), None)
            if picture is None:
                unused += [(name(member), ALONE) for member in parts.values()]
                continue
            pictures += 1
            caption, taken = "", [picture]
            for suffix in captions.SUFFIXES:
                if not caption and (text := parts.get(suffix)):
                    taken.append(text)
                    file.seek(text.offset_data)
                    caption = captions.caption(file.read(text.size), suffix, name(text)).strip()
            unused += [(name(part), TWICE) for part in parts.values() if part not in taken]
            if not caption:
                missing.append(name(picture))
                continue
            yield Captioned(
                name(picture), caption, (stat.st_size, stat.st_mtime_ns), path,
                picture.offset_data, picture.size,
            )  # fmt: skip
    _require_captions(missing, pictures)


def _require_captions(missing: list[str], pictures: int) -> None:
    if missing:
        raise ValueError(
            f"{len(missing)} of {pictures} pictures have no caption: {_some(missing)}. Put a .txt "
            "or .caption file of the same name beside each, or list it in metadata.jsonl or "
            "metadata.csv."
        )


def _some(names: list[str], count: int = NAMED) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
