"""The folder of all jobs. Any process can create, list, order and delete jobs here."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from ...lora.atomic import patiently
from .. import disk
from ..spec import Spec
from ..spec import read as read_spec
from .job import WAITING, Job, NoJob, Stamps, read, stamps_of
from .processes import Process
from .records import Control, Handover, Outline, Result, Status
from .states import ACTIVE

CHANGED = ".changed"
ORDER = "order.json"
WORKFLOW = "workflow.json"
SETTLED = 5.0  # seconds without a change; some file systems keep times in whole seconds
LONGEST = 20.0  # seconds to wait for another process's change
# What happens to an order: it makes a new job; finds the job with the same settings; replaces a
# LoRA; is refused because the LoRA exists, or because another job will make it.
FORESEEN = ("new", "same", "replaces", "taken", "promised")
_ID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Busy(TimeoutError):
    """Another process keeps the jobs locked."""

    def __init__(self) -> None:
        super().__init__("Another process is changing the jobs. Try again in a moment.")


class Store:
    """The folder of all jobs of one user."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._seen: dict[str, tuple[Stamps, Job]] = {}
        self._listed: list[Job] = []
        self._is_at_rest = False
        self._stamps: Stamps = ()
        self._moved_at = 0.0

    def path(self, identifier: str) -> Path:
        """The folder of a job. Raises ValueError if it is not an id, NoJob if it is unknown."""
        if not isinstance(identifier, str) or not _is_id(identifier):
            raise ValueError(f"A job's id is a UUID, found {identifier!r}.")
        path = self.folder / identifier
        if not path.is_dir():
            raise NoJob(identifier)
        return path

    def checkpoints(self, identifier: str) -> Path:
        """The folder of a job's checkpoints, which may lie in a cluster's storage."""
        path = self.path(identifier)
        return (Handover.folder(path) or path) / "checkpoints"

    def create(
        self,
        spec: Spec,
        name: str,
        device: str = "",
        processes: int = 1,
        policy: str = "share",
        visible: str = "",
        order: str = "",
        workflow: str = "",
    ) -> tuple[str, bool]:
        """Queues a job; -> (its id, whether it is new).

        If a job with the same settings exists, returns its id instead, and queues it again if it
        had failed. A finished job whose LoRA is gone does not count. Raises ValueError if the LoRA
        exists, or another job will make it, and the spec does not allow overwriting.

        Args:
            name: the LoRA's name, as loaders show it without its suffix.
            order, workflow: the user's order and its graph, as JSON, only to show them again.
            device, processes, policy, visible: see Control.
        """
        text = spec.to_json()
        key = _key(device, processes, text)
        with self._changing():
            jobs = self.jobs()
            if job := _same(key, spec, jobs):
                if job.state == "failed":
                    self._ask(self.path(job.id), "")
                return job.id, False
            if not spec.overwrite:
                self._require_free(spec, name, jobs)
            identifier = str(uuid.uuid4())
            control = Control(
                order=max((job.order for job in jobs), default=0.0) + 1,
                name=name,
                key=key,
                device=device,
                visible=visible,
                processes=processes,
                policy=policy,
                created=time.time(),
            )
            with disk.whole_folder(self.folder / identifier) as new:
                (new / Outline.FILE).write_text(text, encoding="utf-8")
                for file, text_of_user in ((ORDER, order), (WORKFLOW, workflow)):
                    if text_of_user:
                        (new / file).write_text(text_of_user, encoding="utf-8")
                (new / Control.FILE).write_text(control.to_json(), encoding="utf-8")
            return identifier, True

    def foreseen(self, spec: Spec, name: str, device: str = "", processes: int = 1) -> str:
        """What `create` would do now, as one of FORESEEN."""
        jobs = self.jobs()
        if _same(_key(device, processes, spec.to_json()), spec, jobs):
            return "same"
        if Path(spec.output).exists():
            return "replaces" if spec.overwrite else "taken"
        is_promised = self._unfinished(name, jobs) and not spec.overwrite
        return "promised" if is_promised else "new"

    def _require_free(self, spec: Spec, name: str, jobs: list[Job]) -> None:
        if Path(spec.output).exists():
            raise ValueError(f"{name} exists already: choose another name, or switch overwrite on.")
        if job := self._unfinished(name, jobs):
            raise ValueError(
                f"A job that makes {name} with other settings is {job.state}: delete that job, "
                "choose another name, or switch overwrite on."
            )

    def _unfinished(self, name: str, jobs: list[Job]) -> Job | None:
        """A job that still has to make the LoRA of this name."""
        made = (job for job in jobs if job.name == name and job.state not in ("done", "failed"))
        return next(made, None)

    def jobs(self) -> list[Job]:
        """Every job: active ones, then the queue in its order, then the others, newest first.

        If all jobs have ended or are paused by a user, and none has changed for a while, this takes
        only two calls of the file system.
        """
        # These stamps change when a job is created, deleted or gets a request, and when a
        # supervisor starts or ends.
        stamps = stamps_of(self.folder, (".", CHANGED))
        if stamps != self._stamps:
            self._stamps, self._moved_at = stamps, time.monotonic()
        elif self._is_at_rest and time.monotonic() - self._moved_at > SETTLED:
            return list(self._listed)
        seen = {}
        for path in self._folders():
            with suppress(NoJob):  # it was deleted in between
                seen[path.name] = self._read(path)
        self._seen = seen  # in one assignment, since other threads read it
        jobs = [job for _, job in seen.values()]
        rank = {**dict.fromkeys(ACTIVE, 0), **dict.fromkeys(WAITING, 1)}
        jobs.sort(
            key=lambda job: (
                rank.get(job.state, 2),
                job.order if job.state in WAITING else -job.created,
            )
        )
        self._is_at_rest = not any(job.waits or job.state in ACTIVE for job in jobs)
        self._listed = jobs
        return list(jobs)

    def job(self, identifier: str) -> Job:
        """The job with this id. Raises as `path` does."""
        return self._read(self.path(identifier))[1]

    def ask(
        self,
        identifier: str,
        action: str,
        aside: Process | None = None,
        only: Callable[[Job], bool] = lambda _: True,
    ) -> bool:
        """Writes a request to a job; -> whether it was written. Raises as `path` does.

        Args:
            action, aside: see Control.
            only: decides by the job's state, under the lock. May also raise.
        """
        path = self.path(identifier)
        with self._changing():
            if not only(read(path)):
                return False
            self._ask(path, action, aside)
            return True

    def move(self, identifier: str, before: str | None) -> None:
        """Puts a queued job before another one, or to the end. Raises as `path` does, and
        ValueError if one of them is not in the queue."""
        self.path(identifier)
        with self._changing():
            queue = [job for job in self.jobs() if job.state == "queued"]
            queued = [job.id for job in queue]
            for wanted in (identifier, before):
                if wanted is not None and wanted not in queued:
                    raise ValueError(f"The job {wanted} is not waiting in the queue.")
            others = [job for job in queue if job.id != identifier]
            at = next((i for i, job in enumerate(others) if job.id == before), len(others))
            low = others[at - 1].order if at > 0 else -math.inf
            high = others[at].order if at < len(others) else math.inf
            if math.isfinite(low) and math.isfinite(high):
                order = (low + high) / 2
            else:
                order = low + 1 if math.isfinite(low) else high - 1 if math.isfinite(high) else 0.0
            if not low < order < high:  # halved so often that no number is left between them
                for job in reversed(others[at:]):  # a crash in this loop keeps the order
                    self._place(job.id, job.order + 1)
                order = low + 0.5
            self._place(identifier, order)

    def rename(self, identifier: str, title: str) -> None:
        """Gives a job a title; "" removes it. Raises as `path` does."""
        path = self.path(identifier)
        with self._changing():
            replace(self._control(path), title=title).write(path)

    def extend(self, identifier: str, steps: int) -> None:
        """Queues a finished job again: it trains for `steps` more steps from its last checkpoint,
        then replaces its LoRA. Raises as `path` does, and ValueError if that is not possible, or if
        its LoRA's file was replaced."""
        path = self.path(identifier)
        with self._changing():
            job = self.job(identifier)
            if job.state != "done":
                raise ValueError(f"The job is {job.state}: only a finished job can train on.")
            if job.on_cluster:
                raise ValueError(
                    "A job on a Ray cluster cannot train on: start a new job with more steps."
                )
            if rival := self._unfinished(job.name, self.jobs()):
                raise ValueError(
                    f"Another job that makes {job.name} is {rival.state}: delete that job first."
                )
            saved = disk.numbered(path / "checkpoints", "step-")
            if not saved:
                raise ValueError("The job's checkpoints are gone: start a new job with more steps.")
            spec, result = read_spec(path / Outline.FILE), Result.read_surely(path) or Result()
            output = Path(spec.output)
            if output.exists() and disk.sha256(output) != result.sha256:
                raise ValueError(
                    f"{output.name} is no longer the file that this job made, and would be "
                    "replaced: rename it, then train on."
                )
            # A job that ended early has the LoRA of a step before its last checkpoint.
            spec = replace(spec, steps=saved[-1] + steps, overwrite=True)
            control, status = self._control(path), Status.read_surely(path) or Status()
            key = _key(control.device, control.processes, spec.to_json())
            # The status is written last: until then the job counts as done, and `extend` can run
            # again after a crash.
            (path / Result.FILE).unlink(missing_ok=True)
            disk.replace(path / Outline.FILE, spec.to_json())
            replace(control, turn=control.turn + 1, action="", aside=None, key=key).write(path)
            replace(status, state="", message="", steps=spec.steps).write(path)

    def delete(self, identifier: str) -> None:
        """Removes a job that is not active; its LoRA stays. Raises as `path` does, and ValueError
        while it is active."""
        path = self.path(identifier)
        with self._changing():
            if self.job(identifier).state in ACTIVE:
                raise ValueError("The job is running: stop it first, then delete it.")
            remote = Handover.folder(path)
            # Renamed first, so that a crash in between leaves no partial job.
            removed = self.folder / f"{disk.TEMPORARY}{identifier}"
            patiently(path.rename, removed)
        if remote:
            shutil.rmtree(remote, ignore_errors=True)
        shutil.rmtree(removed, ignore_errors=True)

    def clean(self, keep: int, room: float) -> None:
        """Removes jobs that a crash left half deleted, repairs torn control files, and deletes the
        oldest ended jobs beyond `keep` jobs or `room` bytes in all. Their LoRAs stay."""
        with self._changing():  # so that no other process is writing these files
            disk.clear_torn(self.folder)
            for path in self._folders():
                if (path / Control.FILE).exists() and Control.read(path) is None:
                    Control().write(path)
        ended = [job for job in self.jobs() if job.state in ("done", "failed")]
        used = 0
        for number, job in enumerate(ended):
            with self.unless_deleted(job.id):
                files = self.path(job.id).rglob("*")
                used += sum(file.stat().st_size for file in files if file.is_file())
                if number >= keep or used > room:
                    self.delete(job.id)

    def _folders(self) -> Iterator[Path]:
        if not self.folder.is_dir():
            return  # it is created with the first job
        with os.scandir(self.folder) as entries:  # with thousands of jobs, faster than pathlib
            for entry in entries:
                if _is_id(entry.name) and entry.is_dir():
                    yield Path(entry.path)

    @contextmanager
    def existing(self, identifier: str) -> Iterator[None]:
        """Inside, FileNotFoundError becomes NoJob if the job was deleted."""
        try:
            yield
        except FileNotFoundError:
            if not _is_id(identifier) or (self.folder / identifier).exists():
                raise
            raise NoJob(identifier) from None

    @contextmanager
    def unless_deleted(self, identifier: str) -> Iterator[None]:
        """Ends quietly if the job is deleted inside."""
        with suppress(NoJob), self.existing(identifier):
            yield

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Inside, no other process changes the jobs. Raises Busy if one does for 20 s."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".changing.lock", timeout=LONGEST)
        try:
            lock.acquire()
        except Timeout:
            raise Busy from None
        try:
            yield
        finally:
            # For `jobs`: a change within a job's folder changes no time outside it.
            with suppress(OSError):  # a full disk; the change itself is done
                (self.folder / CHANGED).write_text(str(time.time_ns()))
            lock.release()

    def _ask(self, path: Path, action: str, aside: Process | None = None) -> None:
        control = self._control(path)
        turn = control.turn + (action == "")
        replace(control, turn=turn, action=action, aside=aside).write(path)

    def _place(self, identifier: str, order: float) -> None:
        path = self.path(identifier)
        replace(self._control(path), order=order).write(path)

    def _control(self, path: Path) -> Control:
        """control.json, to be changed. Raises OSError if the disk cannot read it, because an empty
        record would be written back."""
        return Control.read_surely(path) or Control()

    def _read(self, path: Path) -> tuple[Stamps, Job]:
        """A job, and the stamps of the files it was read from."""
        stamps = stamps_of(path)
        seen = self._seen.get(path.name)
        if seen is None or seen[0] != stamps or seen[1].state in ACTIVE:
            return stamps, read(path)
        return seen


def _same(key: str, spec: Spec, jobs: list[Job]) -> Job | None:
    """The job with these settings, unless it is finished and its LoRA gone."""
    made = (job for job in jobs if job.key == key)
    return next((job for job in made if job.state != "done" or Path(spec.output).is_file()), None)


def _key(device: str, processes: int, spec: str) -> str:
    return hashlib.sha256(f"{device}\n{processes}\n{spec}".encode()).hexdigest()


def _is_id(name: str) -> bool:
    return _ID.fullmatch(name) is not None
