"""The files of a job's folder as typed records, and who writes them:

    spec.json        Spec in training/spec.py; Outline is the part that the queue reads   server
    control.json     Control: the user's request, and the job's place in the queue        see below
    supervisor.json  Attempt: the newest process, and how it ended                        supervisor
    status.json      Status: what that process reports                                    trainer
    result.json      Result: the finished LoRA                                            trainer
    ray.json         Handover: the submission to a cluster                                follower

The server and the supervisor change control.json under the store's lock. If an older version of
this pack rewrites a record, fields that it does not know are lost.

The server also writes order.json, the order as the user gave it, only to show it again. The trainer
also writes metrics.jsonl, log.txt, samples/ and checkpoints/; see training/state/.

A write replaces the whole file in one step, so reading needs no lock. A file that is missing, torn
or not a JSON object reads as None. A field that is missing or of another type reads as its default,
as in files of older versions.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from .. import disk
from .processes import Process

R = TypeVar("R", bound="Record")
ACTIVITIES = {
    "waiting for the device": "",
    "waiting for memory": "free MB, and needed MB",
    "loading the checkpoint": "",
    "encoding captions": "captions",
    "making latents": "latents of the bank",
    "training": "",
    "drawing samples": "pictures; pictures that are drawn together count together",
    "saving": "",
    "writing the LoRA": "",
}
"""What a trainer may be doing, and the meaning of activity_done and activity_total."""


@dataclass(frozen=True)
class Record:
    """One file in a job's folder."""

    FILE: ClassVar[str]

    @classmethod
    def read(cls: type[R], job: Path) -> R | None:
        """The record; None if the file is missing, torn, empty, or cannot be read at the moment."""
        return cls._built(disk.read_json(job / cls.FILE))

    @classmethod
    def read_surely(cls: type[R], job: Path) -> R | None:
        """As `read`, but raises OSError if the disk fails. For callers that rewrite the record."""
        return cls._built(disk.read_surely(job / cls.FILE))

    def write(self, job: Path) -> None:
        disk.replace(job / self.FILE, self.to_json())

    def to_json(self) -> str:
        """Fields that are None are left out."""
        content = {name: value for name, value in asdict(self).items() if value is not None}
        return disk.json_text(json.dumps(content, indent=1, ensure_ascii=False))

    @classmethod
    def _built(cls: type[R], content: Any) -> R | None:
        if not isinstance(content, dict) or not content:
            return None
        kinds = _kinds(cls)  # type: ignore[arg-type] # a class is hashable
        values = {name: _value(kinds[name], content[name]) for name in kinds.keys() & content}
        return cls(**{name: value for name, value in values.items() if value is not None})


@dataclass(frozen=True)
class Outline(Record):
    """The settings of a job that the queue needs. The trainer checks all settings."""

    FILE = "spec.json"
    checkpoint: str = ""
    output: str = ""
    banks: str = ""
    steps: int = 0


@dataclass(frozen=True)
class Control(Record):
    """The current request to a job, and its place in the queue.

    Attributes:
        action: "pause" (save and end), "stop" (the same, enforced after a while), "finish" (write
            the LoRA as it is and end), or "" to continue.
        aside: the server for whose prompts the job pauses; None if a user paused it.
        turn: how often the job was resumed. An attempt belongs to one turn.
        order: the place in the queue; the lowest runs first.
        name: the file name of the LoRA, without its suffix. key: the hash of the settings.
        device: as the user named it: "" for the first, "0,1", or "ray:4" for a cluster.
        visible: the devices in the driver's names; None in files of older versions.
        processes: how many train the job together.
        policy: what happens while prompts run; see POLICIES.
        created: seconds since 1970.
        title: the job's name for people; "" for the file name.
    """

    FILE = "control.json"
    action: str = ""
    aside: Process | None = None
    turn: int = 0
    order: float = 0.0
    name: str = ""
    key: str = ""
    device: str = ""
    visible: str | None = None
    processes: int = 1
    policy: str = "share"
    created: float = 0.0
    title: str = ""


@dataclass(frozen=True)
class Attempt(Record):
    """The newest process of a job.

    Attributes:
        pid, identity: see Process.
        turn: Control.turn when it started. `ended` counts only in that turn.
        earlier: Status.started of the process before it. A status with this value is not the
            newest process's.
        ended: "done", "failed", "paused" or "crashed"; None until the supervisor has seen its end.
        message: why it failed or paused.
        crashes: processes in a row that crashed without a new step.
        step: the furthest step at which one of them crashed.
        not_before: when it may be started again, in seconds since 1970.
    """

    FILE = "supervisor.json"
    pid: int = 0
    identity: str | None = None
    turn: int = 0
    earlier: float | None = None
    ended: str | None = None
    message: str | None = None
    crashes: int = 0
    step: int = 0
    not_before: float | None = None

    @property
    def alive(self) -> bool:
        return Process(self.pid, self.identity).alive

    def own(self, status: Status) -> Status:
        """The status, or an empty one if the process before this one wrote it."""
        return newer(status, self.earlier)


@dataclass(frozen=True)
class Status(Record):
    """What a trainer reports.

    Attributes:
        pid, started, updated: the process, when it started and when it wrote this (seconds since
            1970).
        state: "preparing", "running", "paused", "done" or "failed"; "" before the first report.
        message: a sentence for the user.
        step, steps: the steps done, and their total. loss: the mean since the last report.
        seconds_left: an estimate.
        activity: what it does at the moment, one of ACTIVITIES; "" if unknown.
        activity_done, activity_total: the progress of the activity; 0 and 0 if unknown.
        crash: "failed", but another attempt may succeed, as after a lost device.
        disk_full: "paused" because the disk is full.
        The rest is the newest line of metrics.jsonl.
    """

    FILE = "status.json"
    pid: int = 0
    started: float | None = None
    state: str = ""
    updated: float | None = None
    message: str = ""
    step: int = 0
    steps: int = 0
    loss: float | None = None
    seconds_left: float | None = None
    crash: bool = False
    disk_full: bool = False
    gradient_norm: float | None = None
    lr: float | None = None
    samples_per_second: float | None = None
    memory: float | None = None
    activity: str = ""
    activity_done: int = 0
    activity_total: int = 0


def newer(status: Status, earlier: float | None) -> Status:
    """The status, or an empty one if the process that started at `earlier` wrote it."""
    return Status() if earlier is not None and status.started == earlier else status


@dataclass(frozen=True)
class Result(Record):
    """The finished LoRA: its path, hash, time (seconds since 1970) and metadata."""

    FILE = "result.json"
    file: str = ""
    sha256: str | None = None
    made: float | None = None
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Handover(Record):
    """A job's submission to a cluster.

    Attributes:
        submission: its name there. turn: counts submissions.
        remote: the job's folder in the shared storage.
        earlier: Status.started there before the submission.
        log: bytes of the trainer's log that were copied.
    """

    FILE = "ray.json"
    submission: str = ""
    turn: int = 0
    remote: str = ""
    earlier: float | None = None
    log: int = 0

    @classmethod
    def folder(cls, job: Path) -> Path | None:
        """The job's folder in the shared storage; None if it has not been on a cluster."""
        handover = cls.read(job)
        # Another name than the job's means that somebody edited the file.
        is_own = handover is not None and Path(handover.remote).name == job.name
        return Path(handover.remote) if handover is not None and is_own else None


def on_cluster(device: str) -> bool:
    """Whether Control.device names workers of a cluster."""
    return device.startswith("ray")


@cache
def _kinds(record: type[Record]) -> dict[str, Any]:
    """The type of each field."""
    hints = get_type_hints(record)
    return {item.name: hints[item.name] for item in fields(record)}


def _value(kind: Any, value: Any) -> Any:
    """The value as a field of this type; None if it is of another type."""
    kinds = get_args(kind) or (kind,)
    if get_origin(kind) is dict:
        return value if isinstance(value, dict) else None
    if Process in kinds and isinstance(value, dict):
        server = Process(_value(int, value.get("pid")) or 0, _value(str, value.get("identity")))
        return server if server.pid else None
    if float in kinds and type(value) in (int, float):
        return float(value) if math.isfinite(value) else None
    return value if type(value) in kinds else None
