"""The jobs on disk: a folder each. What is shown is worked out from the files, whoever crashed.

    <jobs>/<uuid>/spec.json        what to do, written once           (server)
                  control.json     what is asked, and the job's place (server)
                  supervisor.json  the process, and how it ended      (supervisor)
                  status.json, metrics.jsonl, samples/, checkpoints/, result.json  (trainer)
                  log.txt          what the trainer prints

A file has one writer and is replaced at once, so that no lock is needed to read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...lora.whole import patiently
from .. import disk
from ..spec import Spec
from . import ray_job
from .processes import alive

CHANGED = ".changed"
SETTLED = 5.0  # seconds without a change; some file systems keep times in whole seconds
LONGEST = 20.0  # seconds to wait for another process's change
POLICIES = ("yield", "exclusive", "share")
ACTIVE = ("preparing", "running", "stopping")
_ID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_WATCHED = ("spec.json", "control.json", "supervisor.json", "status.json")


class NoJob(KeyError):
    """No job has this id, or it was deleted."""

    def __str__(self) -> str:
        return f"There is no job {self.args[0]}."


class Busy(TimeoutError):
    """Another process keeps the jobs locked."""

    def __init__(self) -> None:
        super().__init__("Another process is changing the jobs. Try again in a moment.")


@dataclass(frozen=True)
class Job:
    """What the files of one job say.

    Attributes:
        state: queued, preparing, running, stopping, paused, done, failed, or lost: it was running
            when its process vanished, and the supervisor has not taken it up again yet.
        order: its place in the queue, ascending. key: of its settings.
        created, changed: seconds since 1970. device: as the user chose it, "" for the first, or
            "ray" or "ray:4" for so many workers of a cluster.
        policy: beside the graph: "yield" steps aside while prompts run, "exclusive" has the server
            unload its models, "share" does nothing.
        aside: who asked it to step aside, {} for nobody.
        visible: the devices it trains on as the driver calls them, "" where there is no choice.
    """

    id: str
    name: str
    state: str
    message: str
    step: int
    steps: int
    loss: float | None
    seconds_left: float | None
    created: float
    changed: float
    checkpoint: str
    device: str
    policy: str
    aside: dict[str, Any]
    lora_name: str | None
    order: float
    key: str
    error: str | None
    visible: str

    @property
    def remote(self) -> bool:
        """Whether it trains on a cluster, and takes nothing of this machine."""
        return self.device.startswith("ray")

    @property
    def waits(self) -> bool:
        """Whether it goes on by itself once its time has come, so that somebody must be at work."""
        return self.state in ("queued", "lost") or (self.state == "paused" and bool(self.aside))

    @property
    def forsaken(self) -> bool:
        """Whether it stands aside for a server that is no more."""
        by = self.aside
        return self.state == "paused" and bool(by) and not alive(by.get("pid"), by.get("identity"))

    def told(self) -> dict[str, Any]:
        """For a page: all but the inner workings. aside: whether it comes back by itself."""
        told = {k: v for k, v in vars(self).items() if k not in ("order", "key", "visible")}
        return told | {"aside": bool(self.aside) and self.state in ("paused", "stopping")}


class Store:
    """The folder of all jobs of one user."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._seen: dict[str, tuple[tuple, Job]] = {}
        self._listed: list[Job] = []
        self._is_at_rest = False
        self._stamp: tuple = ()
        self._moved_at = 0.0

    def path(self, job: str) -> Path:
        """The folder of a job. Raises ValueError if it is not an id, NoJob if it is unknown."""
        if not isinstance(job, str) or not is_id(job):
            raise ValueError(f"A job's id is a UUID, found {job!r}.")
        path = self.folder / job
        if not path.is_dir():
            raise NoJob(job)
        return path

    def create(
        self, spec: Spec, name: str, device: str = "", processes: int = 1, policy: str = "share",
        visible: str = "",
    ) -> tuple[str, bool]:  # fmt: skip
        """Queues a job; -> (its id, whether it is new).

        name: the LoRA's, as loaders show it without its ending. device, visible: see Job.

        Where there is a job with the same settings it is returned instead, and tried again if it
        had failed; but not one whose LoRA is gone. Raises ValueError where the LoRA is there, or
        another job is to make it, and the spec does not allow to overwrite it.
        """
        text = spec.to_json()
        key = hashlib.sha256(f"{device}\n{processes}\n{text}".encode()).hexdigest()
        with self._changing():
            jobs = self.jobs()
            for job in jobs:
                if job.key == key and (job.state != "done" or Path(spec.output).is_file()):
                    if job.state == "failed":
                        self._ask(self.path(job.id), "")
                    return job.id, False
            if not spec.overwrite:
                self._free(spec, name, jobs)
            identifier = str(uuid.uuid4())
            control = {
                "action": "", "turn": 0, "order": max((job.order for job in jobs), default=0) + 1,
                "name": name, "key": key, "device": device, "processes": processes,
                "policy": policy, "created": time.time(), "visible": visible,
            }  # fmt: skip
            with disk.whole_folder(self.folder / identifier) as new:
                (new / "spec.json").write_text(text, encoding="utf-8")
                (new / "control.json").write_text(json.dumps(control), encoding="utf-8")
            return identifier, True

    def _free(self, spec: Spec, name: str, jobs: list[Job]) -> None:
        if Path(spec.output).exists():
            raise ValueError(f"{name} exists already: choose another name, or allow overwrite.")
        for job in jobs:
            if job.name == name and job.state not in ("done", "failed"):
                raise ValueError(
                    f"A job that makes {name} with other settings is {job.state}: delete it, "
                    "choose another name, or allow overwrite."
                )

    def jobs(self) -> list[Job]:
        """Every job: active ones, then the queue in its order, then the others, newest first.

        Where all have ended or are paused for good and nobody has changed one for a while, this
        costs two calls of the file system, however many are kept.
        """
        # Another one when a job comes, goes or is asked something, or a supervisor starts or ends.
        stamp = _stamps(self.folder, (".", CHANGED))
        if stamp != self._stamp:
            self._stamp, self._moved_at = stamp, time.monotonic()
        elif self._is_at_rest and time.monotonic() - self._moved_at > SETTLED:
            return list(self._listed)
        seen = {}
        for path in self._folders():
            with suppress(NoJob):  # it was deleted meanwhile
                seen[path.name] = self._read(path)
        self._seen = seen  # at once, for other threads look too
        jobs = [job for _, job in seen.values()]
        waiting = ("queued", "lost")
        rank = {**dict.fromkeys(ACTIVE, 0), **dict.fromkeys(waiting, 1)}
        jobs.sort(
            key=lambda job: (
                rank.get(job.state, 2), job.order if job.state in waiting else -job.created
            )
        )
        self._is_at_rest = not any(job.waits or job.state in ACTIVE for job in jobs)
        self._listed = jobs
        return list(jobs)

    def job(self, identifier: str) -> Job:
        """Raises as `path` does."""
        return self._read(self.path(identifier))[1]

    def ask(
        self, identifier: str, action: str, aside: dict[str, Any] | None = None,
        only: Callable[[Job], bool] = lambda _: True,
    ) -> bool:  # fmt: skip
        """Tells a job what is wanted of it; -> whether it was told. Raises as `path` does.

        action: "pause" (save and end), "stop" (the same, by force after a while), "finish" (write
        the LoRA as it is and end), or "" to go on. aside: who asks it to pause for a while only.
        only: says no, or raises, where the job is no longer what the caller took it for; nobody
        else asks in between.
        """
        path = self.path(identifier)
        with self._changing():
            if not only(read(path)):
                return False
            self._ask(path, action, aside)
            return True

    def move(self, identifier: str, before: str | None) -> None:
        """Puts a queued job before another one, or to the end. Raises as `path` does, and
        ValueError when one of them is not waiting."""
        with self._changing():
            queue = [job for job in self.jobs() if job.state == "queued"]
            known = [job.id for job in queue]
            for each in (identifier, before):
                if each is not None and self.path(each) and each not in known:
                    raise ValueError(f"The job {each} is not waiting in the queue.")
            others = [job for job in queue if job.id != identifier]
            at = next((i for i, job in enumerate(others) if job.id == before), len(others))
            low = others[at - 1].order if at > 0 else -math.inf
            high = others[at].order if at < len(others) else math.inf
            order = (
                (low + high) / 2 if math.isfinite(low + high)
                else high - 1 if math.isfinite(high) else low + 1 if math.isfinite(low) else 0
            )  # fmt: skip
            if not low < order < high:  # halved so often that no number is left between
                for job in reversed(others[at:]):  # a crash in between leaves them in order
                    self._place(job.id, job.order + 1)
                order = low + 0.5
            self._place(identifier, order)

    def delete(self, identifier: str) -> None:
        """Removes a job that is not active; its LoRA stays. Raises as `path` does, and ValueError
        while it is active."""
        path = self.path(identifier)
        with self._changing():
            if self.job(identifier).state in ACTIVE:
                raise ValueError("The job is running: stop it first, then delete it.")
            there = ray_job.remote(path)
            # Renamed first, so that a crash in between leaves no half of a job.
            gone = self.folder / f"{disk.TEMPORARY}{identifier}"
            patiently(path.rename, gone)
        if there:
            shutil.rmtree(there, ignore_errors=True)
        shutil.rmtree(gone, ignore_errors=True)

    def clean(self, keep: int, room: float) -> None:
        """Removes what a crash left half removed, mends what it tore, and removes the oldest ended
        jobs: beyond `keep`, and beyond `room` bytes in all. The LoRAs they made stay."""
        with self._changing():  # so that it is not what another process is just writing
            disk.clear_torn(self.folder)
            for path in self._folders():
                if (path / "control.json").exists() and not _whole(path / "control.json"):
                    self._write_control(path, {})
        ended = [job for job in self.jobs() if job.state in ("done", "failed")]
        taken = 0
        for number, job in enumerate(ended):
            with self.unless_deleted(job.id):
                files = self.path(job.id).rglob("*")
                taken += sum(file.stat().st_size for file in files if file.is_file())
                if number >= keep or taken > room:
                    self.delete(job.id)

    def _folders(self) -> Iterator[Path]:
        if not self.folder.is_dir():
            return  # made with the first job
        with os.scandir(self.folder) as entries:  # with thousands of jobs, faster than pathlib
            for entry in entries:
                if is_id(entry.name) and entry.is_dir():
                    yield Path(entry.path)

    @contextmanager
    def unless_deleted(self, identifier: str) -> Iterator[None]:
        """Passes over a job that is deleted while one is at work on it."""
        try:
            yield
        except NoJob:
            pass
        except FileNotFoundError:
            if (self.folder / identifier).exists():
                raise

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Inside, no other process changes the jobs. Raises Busy where one does for 20 s."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".changing.lock", timeout=LONGEST)
        try:
            lock.acquire()
        except Timeout:
            raise Busy from None
        try:
            yield
        finally:
            # For those who only look: what is within a job's folder changes no time outside it.
            with suppress(OSError):  # a full disk; what was changed is there all the same
                (self.folder / CHANGED).write_text(str(time.time_ns()))
            lock.release()

    def _ask(self, path: Path, action: str, aside: dict[str, Any] | None = None) -> None:
        control = self._control(path)
        control["turn"] = control.get("turn", 0) + (action == "")
        self._write_control(path, control | {"action": action, "aside": aside or {}})

    def _place(self, identifier: str, order: float) -> None:
        path = self.path(identifier)
        self._write_control(path, self._control(path) | {"order": order})

    def _control(self, path: Path) -> dict:
        """control.json to be changed: where it is there and cannot be read, that is an OSError and
        not an empty one, which would then be written."""
        control = disk.read_surely(path / "control.json")
        return control if isinstance(control, dict) else {}

    def _write_control(self, path: Path, control: dict) -> None:
        disk.replace(path / "control.json", json.dumps(control))

    def _read(self, path: Path) -> tuple[tuple, Job]:
        """A job, and the stamps of the files it was read from."""
        stamp = _stamps(path)
        known = self._seen.get(path.name)
        if known is None or known[0] != stamp or known[1].state in ACTIVE:
            return stamp, read(path)
        return known


def read(path: Path) -> Job:
    """One job out of its folder; a file that is torn or missing is a state, not an exception.

    Raises NoJob where the whole folder is gone.
    """
    spec, control = disk.read_object(path / "spec.json"), disk.read_object(path / "control.json")
    supervisor, status = (
        disk.read_object(path / "supervisor.json"),
        disk.read_object(path / "status.json"),
    )
    state, message = state_of(spec, control, supervisor, status)
    # Where control.json is torn, the file's own name is the best there is.
    name = str(control.get("name") or Path(str(spec.get("output", path.name))).stem)
    checkpoint = Path(str(spec.get("checkpoint", "")))
    aside = control.get("aside")
    changed = max(time for time, _ in _stamps(path)) / 1e9
    if not path.is_dir():  # asked last, for it may be deleted while its files are read
        raise NoJob(path.name)
    return Job(
        id=path.name, name=name, state=state, message=message,
        step=_number(status.get("step"), 0), steps=_number(spec.get("steps"), 0),
        loss=_number(status.get("loss"), None),
        seconds_left=_number(status.get("seconds_left"), None) if state == "running" else None,
        created=_number(control.get("created"), 0.0), changed=changed,
        checkpoint=checkpoint.name, device=str(control.get("device", "")),
        policy=str(control.get("policy", "share")), aside=aside if isinstance(aside, dict) else {},
        lora_name=f"{name}.safetensors" if state == "done" else None,
        order=_number(control.get("order"), 0.0), key=str(control.get("key", "")),
        error=message if state == "failed" else None,
        visible=str(control.get("visible", control.get("device", ""))),
    )  # fmt: skip


def state_of(spec: dict, control: dict, supervisor: dict, status: dict) -> tuple[str, str]:
    """(state, message) out of the four files' contents, {} for one that is not there."""
    message = str(status.get("message", ""))
    said = status.get("state")
    if not spec:
        return "failed", "The job's description spec.json is damaged or gone."
    if alive(supervisor.get("pid"), supervisor.get("identity")):
        if control.get("action"):
            return "stopping", message
        started = status.get("started")
        if not said or (started is not None and started == supervisor.get("earlier")):
            return "preparing", ""  # it has said nothing yet
        return (said if said in ("preparing", "running") else "stopping"), message
    if said == "done":
        return "done", message
    # How this turn ended; "go on" makes it the next turn, which nothing has ended yet.
    ended = supervisor.get("ended") if supervisor.get("turn") == control.get("turn", 0) else None
    why = str(supervisor.get("message") or message)
    if ended == "failed":
        return "failed", why
    if control.get("action"):
        return "paused", "it steps aside while the graph draws" if control.get("aside") else message
    if ended == "paused":
        return "paused", why
    if supervisor.get("pid") and "ended" not in supervisor:
        return "lost", "Its process has ended without a word."
    return "queued", ""


def _number(value: object, otherwise: Any) -> Any:
    fine = isinstance(value, int | float) and math.isfinite(value)
    return value if fine else otherwise


def _stamps(path: Path, names: tuple[str, ...] = _WATCHED) -> tuple[tuple[int, int], ...]:
    """Time of change in ns and size of each watched file; zeros for one that is not there."""
    found = []
    for name in names:
        try:
            stat = os.stat(f"{path}{os.sep}{name}")
            found.append((stat.st_mtime_ns, stat.st_size))
        except OSError:
            found.append((0, 0))
    return tuple(found)


def is_id(name: str) -> bool:
    return _ID.fullmatch(name) is not None


def _whole(file: Path) -> bool:
    return isinstance(disk.read_json(file), dict)
