"""Full LCMs whose network has an input for the guidance scale, which ComfyUI's networks lack."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

LONGEST_HEADER = 100_000_000  # bytes, the limit of safetensors; a broken file may claim more


def refuse_guidance_embedding(file: Path) -> None:
    """Raises ValueError if the header of a safetensors file lists `time_embedding.cond_proj` (LCM,
    arXiv 2310.04378, section 4.2). Any other file passes, and a missing one."""
    if file.suffix != ".safetensors" or not file.is_file():
        return
    if _lists_it(file, file.stat().st_mtime_ns):
        raise ValueError(
            f"{file.name} is a full LCM with a guidance embedding (time_embedding.cond_proj). "
            "ComfyUI has no input for the guidance and drops this weight, so the model would draw "
            "at an undefined guidance. Use the checkpoint it was made from, and an LCM-LoRA."
        )


@lru_cache(maxsize=64)  # a run calls this several times, and the header may have a megabyte
def _lists_it(file: Path, _changed: int) -> bool:
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return b'cond_proj.weight"' in opened.read(min(length, LONGEST_HEADER))
