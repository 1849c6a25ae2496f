"""Pictures with their captions: in a folder as text files or metadata.jsonl, or in tar shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ZIPPED = (".tar.gz", ".tgz")
NAMED = 3  # how many faulty files a message names


@dataclass(frozen=True)
class Captioned:
    """One picture that is not opened yet.

    Attributes:
        name: for messages, relative to what the user named.
        caption: never empty.
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


def _is_shown(file: Path) -> bool:
    """Not one of the `._name` files that macOS puts beside each file, nor in a hidden folder."""
    return not any(part.startswith(".") for part in file.parts)


def find(path: Path) -> list[Captioned]:
    """Every captioned picture of a folder or tar, by name.

    Folder: Hugging Face's imagefolder layout, with `<stem>.txt` beside each picture or a
    metadata.jsonl of {"file_name", "text"}, tar shards, or both. Tar: a WebDataset shard,
    whose members belong together up to the first dot of their file name, with a .txt, or a .json
    with "caption" or "text". Raises ValueError when there is no picture, when a caption is missing,
    empty or not UTF-8, and for a broken metadata.jsonl or tar.
    """
    one = path.is_file() and path.name.lower().endswith((".tar", *ZIPPED))
    if not one and not path.is_dir():
        raise ValueError(f"There is no folder and no tar file {path}.")
    inside = path.rglob("*") if not one else ()
    shown = (file for file in inside if _is_shown(file.relative_to(path)) and file.is_file())
    files = [path] if one else sorted(shown)
    if zipped := [file.name for file in files if file.name.lower().endswith(ZIPPED)]:
        raise ValueError(
            f"{zipped[0]} is a compressed tar, out of which single pictures cannot be read. Unpack "
            "it to a plain .tar with gunzip."
        )
    shards = [file for file in files if file.suffix.lower() == ".tar"]
    found = [each for shard in shards for each in _tar(shard)]
    found += _folder(path, files)
    if not found:
        raise ValueError(
            f"There is no picture in {path}: expected {', '.join(SUFFIXES)} files, or WebDataset "
            ".tar files."
        )
    return found


def _folder(root: Path, files: list[Path]) -> list[Captioned]:
    pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
    told: dict[Path, str] = {}
    for file in files:
        if file.name == "metadata.jsonl":
            told |= _metadata(file)
    found, missing = [], []
    for picture in pictures:
        text = picture.with_suffix(".txt")
        caption = told.get(picture) or (
            _decoded(text.read_bytes(), text.name) if text.is_file() else ""
        )
        if not caption.strip():
            missing.append(picture.name)
            continue
        stat = picture.stat()
        stamp = stat.st_size, stat.st_mtime_ns
        name = picture.relative_to(root).as_posix()
        found.append(Captioned(name, caption.strip(), stamp, picture))
    _none_missing(missing, len(pictures))
    return found


def _metadata(file: Path) -> dict[Path, str]:
    """Picture -> caption out of a metadata.jsonl."""
    told = {}
    # Not splitlines(), which would also cut at the U+2028 that a JSON string may hold.
    for number, line in enumerate(_decoded(file.read_bytes(), file.name).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
            if not isinstance(name, str) or not isinstance(text, str) or "\0" in name:
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f'Line {number} of {file.name} is not of the form {{"file_name": "a.png", "text": '
                f'"a caption"}}: {line[:80]}'
            ) from None
        picture = file.parent / name
        # By its name alone: in a Hugging Face download the pictures themselves are links.
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"Line {number} of {file.name} leaves its folder: {name!r}.")
        if not picture.is_file():
            raise ValueError(f"Line {number} of {file.name} names {name!r}, which is not there.")
        told[picture] = text
    return told


def _tar(path: Path) -> Iterator[Captioned]:
    """The samples of a shard; only its index is read now, nothing is unpacked."""
    stat = path.stat()
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if member.isfile():
                    folder, _, name = member.name.rpartition("/")
                    key, _, suffix = name.partition(".")
                    samples.setdefault(f"{folder}/{key}", {})[f".{suffix.lower()}"] = member
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path.name} is no whole tar file: {error}.") from None
    missing, pictures = [], 0
    with open(path, "rb") as file:
        for parts in samples.values():
            picture = next((parts[suffix] for suffix in SUFFIXES if suffix in parts), None)
            if picture is None:
                continue
            pictures += 1
            caption = _tar_caption(file, parts, path.name).strip()
            if not caption:
                missing.append(f"{path.name}/{picture.name}")
                continue
            yield Captioned(
                f"{path.name}/{picture.name}", caption, (stat.st_size, stat.st_mtime_ns), path,
                picture.offset_data, picture.size,
            )  # fmt: skip
    _none_missing(missing, pictures)


def _tar_caption(file: io.BufferedReader, parts: dict[str, tarfile.TarInfo], shard: str) -> str:
    for suffix in (".txt", ".json"):
        if (member := parts.get(suffix)) is None:
            continue
        file.seek(member.offset_data)
        text = _decoded(file.read(member.size), f"{shard}/{member.name}")
        if suffix == ".txt":
            return text
        try:
            told = json.loads(text)
            caption = told.get("caption") or told.get("text") or ""
        except (ValueError, AttributeError):
            raise ValueError(f"{shard}/{member.name} is no JSON object.") from None
        if not isinstance(caption, str):
            raise ValueError(f'{shard}/{member.name}: its "caption" is no text: {caption!r:.80}')
        return caption
    return ""


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text (byte {error.start}): save the captions as UTF-8."
        ) from None


def _none_missing(missing: list[str], pictures: int) -> None:
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise ValueError(
            f"{len(missing)} of {pictures} pictures have no caption: {', '.join(missing[:NAMED])}"
            f"{more}. Put a .txt file of the same name beside each, or list it in metadata.jsonl."
        )
