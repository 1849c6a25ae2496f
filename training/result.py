"""The finished LoRA: written, read back, checked against the host, and moved into place whole."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from ..lora.acceleration import FAMILY
from ..lora.delta import Vector
from ..lora.formats import files
from ..lora.whole import patiently
from . import disk
from .spec import Spec

VERSION = "1"
MADE = "result.safetensors"  # in the job's folder, until it has been moved into place


def about(spec: Spec, teacher, steps: int, base_hash: str, bank: str) -> dict[str, str]:
    """The file's metadata, strings only."""
    styles = [[disk.shown(Path(lora.path).name), lora.strength] for lora in spec.loras]
    types = {"SD1.5": "sd_v1", "SD2": "sd_v2"}
    return {
        "ss_base_model_version": types.get(teacher.family, "sdxl_base_v1-0"),
        "ss_sd_model_name": disk.shown(Path(spec.checkpoint).name),
        "ss_new_sd_model_hash": base_hash,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(spec.rank),
        "ss_network_alpha": f"{spec.lora_alpha:g}",
        "ss_max_train_steps": str(steps),
        "ss_output_name": disk.shown(Path(spec.output).stem),
        "lcm_lora.version": VERSION,
        FAMILY: spec.objective,
        "lcm_lora.base_family": teacher.family,
        "lcm_lora.prediction": teacher.schedule.prediction,
        "lcm_lora.guidance": " to ".join(f"{w:g}" for w in spec.guidance),
        "lcm_lora.resolution": str(spec.resolution),
        "lcm_lora.batch": str(spec.batch),
        "lcm_lora.bank": bank,
        "lcm_lora.style_loras": json.dumps(styles),
    }


def write(
    job: Path, output: Path, vector: Vector, untaken: Callable[[Path], list[str]]
) -> None:  # fmt: skip
    """Raises ValueError when the host does not map every module of the file; output is then as it
    was. untaken(file) names the modules that it does not map."""
    made = job / MADE
    files.write(made, vector, "fp16", overwrite=True)
    if left := untaken(made):
        raise ValueError(
            f"ComfyUI does not take {len(left)} of the {len(vector.modules())} modules of the "
            f"result, which is a fault of this pack: {', '.join(left[:5])}. It is in {made}."
        )
    if apart := files.read(made).modules() ^ vector.modules():
        raise ValueError(f"The result's modules are not those of the training: {sorted(apart)[:5]}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with disk.whole_file(output) as new:
        shutil.copyfile(made, new)
    told = {"file": str(output), "sha256": disk.sha256(output), "made": time.time()}
    told["metadata"] = dict(vector.metadata)
    disk.replace(job / "result.json", json.dumps(told, indent=1))
    patiently(made.unlink)


def finished(job: Path, output: Path) -> bool:
    """Whether this job has written its result and it is still there."""
    told = disk.read_surely(job / "result.json")
    return told is not None and output.is_file() and disk.sha256(output) == told["sha256"]


def interrupted(job: Path, output: Path) -> bool:
    """Whether this job was stopped after it had moved its result into place."""
    made = job / MADE
    return made.exists() and output.is_file() and disk.sha256(made) == disk.sha256(output)


def file_hash(path: Path, cache: Path) -> str:
    """A checkpoint's sha256, remembered in `cache` by its size and time of change."""
    stat = path.stat()
    known_file = cache / "hashes.json"
    known = disk.read_json(known_file) or {}
    stamp = [stat.st_size, stat.st_mtime_ns]
    if known.get(str(path), [None])[0] != stamp:
        known[str(path)] = [stamp, disk.sha256(path)]
        disk.replace(known_file, json.dumps(known, indent=1))
    return known[str(path)][1]
