"""Estimates what a job will take, from earlier jobs on the device, never from guesses about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ..checkpoint_file import CheckpointFile
from ..data.sources import read_prompts
from ..objectives.table import forward_passes
from ..spec import Spec, read
from ..state.checkpoints import room
from . import metrics
from .job import Job
from .store import Store

MEASURED, ESTIMATED, UNKNOWN = "measured", "estimated", "unknown"
# Bytes of one step with one picture at full size and rank 64: python3 dev bench fullsize.
PEAKS = {"SD1.5": 4.7e9, "SDXL": 9.2e9}
EARLIER = 20  # how many of the newest jobs to read


@dataclass(frozen=True)
class Estimate:
    """What a job will take; unknown figures are None.

    Attributes:
        steps, batch, resolution: the order's settings.
        drawn: how many pictures the job draws; 0 if it uses the user's pictures.
        architecture: of the checkpoint; "" if its file does not show it.
        own_resolution: the resolution that the checkpoint is made for, or 0.
        training_seconds: without sample pictures and checkpoints.
        time: where training_seconds comes from: "measured" by a job with the same settings,
            "estimated" from a job with other settings, or "unknown".
        drawing_seconds: estimated from the speed of training; 0 if an earlier job drew the same.
        memory_bytes: of the device.
        memory: where memory_bytes comes from: "measured" by a job with the same settings,
            "estimated" for one picture at a time (the least that a job needs), or "unknown".
        disk_bytes: the job's checkpoints, the LoRA and the drawn pictures. None if unknown.
        queueing: what happens to the order: one of store.FORESEEN.
    """

    steps: int
    batch: int
    resolution: int
    drawn: int
    architecture: str
    own_resolution: int
    training_seconds: float | None
    time: str
    drawing_seconds: float | None
    memory_bytes: float | None
    memory: str
    disk_bytes: float | None
    queueing: str

    def public(self) -> dict[str, Any]:
        return asdict(self)


class Earlier(NamedTuple):
    """A job that trained such a network on the same device."""

    spec: Spec
    samples_per_second: float
    memory: float


def estimate(spec: Spec, name: str, device: str, processes: int, store: Store) -> Estimate:
    """name, device, processes: as the job's Control would have them."""
    file = _checkpoint(spec.checkpoint)
    earlier = list(_earlier(spec, file, device, store)) if file else []
    same = [job for job in earlier if _work(job.spec) == _work(spec)]
    drawn = spec.data.count if spec.data.kind == "prompts" else 0
    training, drawing, time = None, 0.0 if not drawn else None, UNKNOWN
    if file and earlier:
        basis = (same or earlier)[0]
        # Forward passes of this resolution a second.
        pace = basis.samples_per_second * forward_passes(basis.spec, file.guided_calls)
        pace *= (basis.spec.resolution / spec.resolution) ** 2
        passes = forward_passes(spec, file.guided_calls)
        training = spec.steps * spec.batch * processes * passes / pace
        time = MEASURED if same else ESTIMATED
        has_bank = any(_bank(job.spec) == _bank(spec) for job in earlier)
        drawing = 0.0 if has_bank else drawn * file.guided_calls * spec.data.draw_steps / pace
    memory, how = _memory(spec, file, same)
    return Estimate(
        spec.steps, spec.batch, spec.resolution, drawn,
        file.architecture if file else "", file.resolution if file else 0,
        training, time, drawing, memory, how, _disk(spec, file, drawn),
        store.foreseen(spec, name, device, processes),
    )  # fmt: skip


def _earlier(spec: Spec, file: CheckpointFile, device: str, store: Store) -> Iterator[Earlier]:
    """The newest jobs that can be compared with this one."""
    trained = [job for job in store.jobs() if job.step and job.device == device]
    for job in trained[:EARLIER]:
        with store.unless_deleted(job.id):
            if earlier := _measured(job, store.path(job.id), spec, file):
                yield earlier


def _measured(job: Job, path: Path, spec: Spec, file: CheckpointFile) -> Earlier | None:
    try:
        job_spec = read(path / "spec.json")
    except ValueError:  # damaged
        return None
    job_file = _checkpoint(job_spec.checkpoint)
    if job_file is None or job_file.network != file.network or _how(job_spec) != _how(spec):
        return None
    speed, memory = (metrics.COLUMNS.index(name) for name in ("samples_per_second", "memory"))
    rows = metrics.read(path)["rows"]
    # The first line has the first step, which prepares more.
    speeds = [row[speed] for row in rows[1:] or rows if row[speed]]
    if not speeds:
        return None
    return Earlier(job_spec, median(speeds), max(row[memory] or 0 for row in rows))


def _how(spec: Spec) -> tuple[Any, ...]:
    """The settings that change the speed in a way that cannot be calculated."""
    return spec.host_flags, spec.precision, spec.checkpointing, spec.compile, spec.objective


def _work(spec: Spec) -> tuple[Any, ...]:
    """The other settings that the speed and the memory of a step depend on."""
    return spec.resolution, spec.batch, spec.micro_batch, spec.rank, spec.passes


def _bank(spec: Spec) -> tuple[Any, ...]:
    """The settings that must be equal for a job to reuse another job's pictures."""
    return spec.checkpoint, spec.data, spec.resolution, spec.guidance, spec.seed, spec.loras


def _memory(
    spec: Spec, file: CheckpointFile | None, same: list[Earlier]
) -> tuple[float | None, str]:
    if peak := max((job.memory for job in same), default=0):
        return peak, MEASURED
    if file and file.architecture in PEAKS and spec.resolution == file.resolution:
        return PEAKS[file.architecture], ESTIMATED
    if file and (arithmetic := file.step_bytes(spec.rank, spec.resolution, spec.precision)):
        return arithmetic, ESTIMATED
    return None, UNKNOWN


def _disk(spec: Spec, file: CheckpointFile | None, drawn: int) -> float | None:
    if file is None:
        return None
    parameters = file.lora_parameters(spec.rank)
    needed = room(parameters, spec.keep, spec.objective) + 2 * parameters
    latent = file.latent_channels * (spec.resolution // file.shrink) ** 2
    texts = min(drawn, len(spec.data.prompts or _prompts(spec.data.path))) if drawn else 0
    kept = 4 * drawn * latent if spec.passes > 1 else 0
    return needed + 2 * (drawn * latent + texts * file.text_numbers) + kept


def _prompts(path: str) -> list[str]:
    try:
        return read_prompts(path)
    except ValueError:  # the job will say so
        return []


def _checkpoint(path: str) -> CheckpointFile | None:
    """None if the file is gone or does not show its architecture."""
    try:
        return CheckpointFile.read(Path(path))
    except (OSError, ValueError):
        return None
