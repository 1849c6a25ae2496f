"""The finished LoRA: written, read back, checked against ComfyUI, and moved into place."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from ..lora.atomic import patiently
from ..lora.delta import Vector
from ..lora.formats import files
from . import disk
from .export import family_metadata
from .jobs.records import Result
from .spec import Spec
from .teacher import Teacher

VERSION = "1"
STYLES = "lcm_lora.style_loras"  # in its metadata: [[name, strength], ...] of the baked-in styles
MADE = "result.safetensors"  # in the job's folder, until it is moved into place


def metadata(
    spec: Spec, teacher: Teacher, steps: int, base_hash: str, bank: str
) -> dict[str, str]:  # fmt: skip
    """How the LoRA was made. files.write adds what follows from its tensors (base model, rank)."""
    styles = [[disk.shown(Path(lora.path).name), lora.strength] for lora in spec.loras]
    start = (
        {"lcm_lora.start_from": disk.shown(Path(spec.start_from).name)} if spec.start_from else {}
    )
    return {
        "ss_sd_model_name": disk.shown(Path(spec.checkpoint).name),
        "ss_new_sd_model_hash": base_hash,
        "ss_max_train_steps": str(steps),
        "ss_output_name": disk.shown(Path(spec.output).stem),
        "lcm_lora.version": VERSION,
        **family_metadata(spec),
        "lcm_lora.base_family": teacher.architecture,
        "lcm_lora.prediction": teacher.prediction,
        "lcm_lora.guidance": " to ".join(f"{w:g}" for w in spec.guidance),
        "lcm_lora.resolution": str(spec.resolution),
        "lcm_lora.batch": str(spec.batch),
        "lcm_lora.bank": bank,
        STYLES: json.dumps(styles),
        **start,
    }


def write(
    job: Path, output: Path, vector: Vector, unmatched: Callable[[Path], list[str]]
) -> None:  # fmt: skip
    """Writes the LoRA to the job's folder, checks it, and moves it to `output`.

    unmatched(file): the modules that ComfyUI does not map onto the network. Raises ValueError if
    there are any; `output` is then unchanged.
    """
    made = job / MADE
    files.write(made, vector, "fp16", overwrite=True)
    if names := unmatched(made):
        raise ValueError(
            f"ComfyUI does not accept {len(names)} of the {len(vector.modules())} modules of the "
            f"result, which is a fault of this pack: {', '.join(names[:5])}. The file is {made}."
        )
    written = files.read(made)
    if different := written.modules() ^ vector.modules():
        raise ValueError(
            f"The file {made} does not hold the trained modules, which is a fault of this pack. "
            f"Different: {', '.join(sorted(different)[:5])}."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with disk.whole_file(output) as new:
        shutil.copyfile(made, new)
    Result(str(output), disk.sha256(output), time.time(), dict(written.metadata)).write(job)
    patiently(made.unlink)


def finished(job: Path, output: Path) -> bool:
    """Whether this job has written its result and the file is still the same."""
    result = Result.read_surely(job)
    return result is not None and output.is_file() and disk.sha256(output) == result.sha256


def interrupted(job: Path, output: Path) -> bool:
    """Whether this job was stopped after it had moved its result into place."""
    made = job / MADE
    return made.exists() and output.is_file() and disk.sha256(made) == disk.sha256(output)


def file_hash(path: Path, cache: Path) -> str:
    """A file's sha256, kept in `cache`/hashes.json until its size or modification time changes."""
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    hashes = disk.read_json(cache / "hashes.json") or {}
    if hashes.get(str(path), [None])[0] != stamp:
        hashes[str(path)] = [stamp, disk.sha256(path)]
        disk.replace(cache / "hashes.json", json.dumps(hashes, indent=1))
    return hashes[str(path)][1]
