"""A job on the user's Ray cluster: submitted through the cluster's Jobs REST API, and followed.

To the supervisor this process is a trainer: it writes the same files into the job's folder, follows
control.json, and may be killed and restarted. Ray transfers the pack as a package. Everything else
goes through a folder, the storage, that both this machine and the cluster see:

    <storage>/jobs/<id>/   the trainer's folder, as for a local job
             /banks/       latent banks, which jobs share
             /files/<key>/ checkpoints, LoRAs and pictures from elsewhere, copied once
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import signal
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from .. import disk
from ..jobs.records import Control, Handover, Outline, Result, Status, newer
from ..spec import Spec, read
from ..state.journal import Journal
from .api import ENDED, Api, NoAnswer
from .settings import Cluster

log = logging.getLogger("lcm_lora")
ROOT = Path(__file__).resolve().parents[2]
SENT = ("training", "lora", "samplers")
ENTRY = "lcm_lora/training/cluster/entry.py"
TICK, LONGEST = 1.0, 60.0  # seconds between polls; the longest wait between retries
LAST = 4000  # characters of Ray's log that are repeated after a crash
T = TypeVar("T")


def main(spec_file: Path, settings: Path) -> int:
    """Follows the job until it has ended. Exit status as run.py's."""
    job = spec_file.resolve().parent
    journal = Journal(job)
    try:
        spec = read(spec_file)
        journal.state("preparing", message="being submitted to the cluster", steps=spec.steps)
        return Follower(job, spec, Cluster.read(settings), journal).run()
    except ValueError as error:
        log.error("%s", error)
        journal.state("failed", message=str(error))
        return 1
    except OSError as error:
        if not disk.disk_is_full(error):
            raise
        log.error("%s", error)
        message = f"The disk of this machine is full ({error})."
        journal.state("paused", message=message, disk_full=True)
        return disk.DISK_FULL


class Follower:
    """Follows one job until it ends on the cluster."""

    def __init__(self, job: Path, spec: Spec, cluster: Cluster, journal: Journal):
        self.job, self.spec, self.cluster, self.journal = job, spec, cluster, journal
        self.api = Api(cluster)
        self.remote = Path(cluster.storage) / "jobs" / job.name
        self.handover = replace(Handover.read(job) or Handover(), remote=str(self.remote))
        self.terminated = threading.Event()
        self.mirrored: dict[Path, tuple[int, int]] = {}  # size and time of change in ns

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.terminated.set())
        self.mirror_control()
        state = self._state()[0] if self.handover.submission else ""
        if not state or state in ENDED:
            if self._status().state == "done":  # it ended while nothing followed it
                return self._ended(state, "")
            self._submit()
        while True:
            self.mirror_control()
            state, reason = self._state()
            self.mirror()
            if state in ("", *ENDED):
                return self._ended(state, reason)
            self._report(state)
            if self.terminated.wait(TICK):
                if self._action() != "stop":
                    return 1  # this machine shuts down; the job on the cluster goes on
                self.terminated.clear()
                self._patiently(lambda: self.api.stop(self.handover.submission))

    def _submit(self) -> None:
        """Writes the trainer's settings and submits the job under a new name."""
        self.remote.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(self._settings(), ensure_ascii=False)
        disk.replace(self.remote / Outline.FILE, settings)
        turn = self.handover.turn + 1
        submission = f"lcm-lora-{self.job.name}-{turn}"
        # Recorded first: a recorded submission that the cluster does not know is submitted again.
        earlier = (Status.read(self.remote) or Status()).started
        self._record(turn=turn, submission=submission, earlier=earlier)
        order = {
            "spec": self.cluster.there(self.remote / Outline.FILE),
            "workers": (Control.read(self.job) or Control()).processes,
            "gpus": self.cluster.gpus,
            "cpus": self.cluster.cpus,
        }
        environment, content = {"LCM_LORA_RAY": json.dumps(order)}, package()
        self._patiently(
            lambda: self.api.submit(submission, f"python {ENTRY}", environment, content)
        )
        log.info("submitted to %s as %s", self.cluster.address, submission)

    def _settings(self) -> dict[str, Any]:
        """The job's settings with the cluster's paths."""
        spec, there = self.spec, self.cluster.there
        settings = asdict(spec)
        settings["data"]["path"] = self._brought(spec.data.path)
        return settings | {
            "loras": [asdict(lora) | {"path": self._brought(lora.path)} for lora in spec.loras],
            "host": self.cluster.host,
            "host_flags": () if self.cluster.gpus else ("--cpu",),
            "checkpoint": self._brought(spec.checkpoint),
            "text_encoders": [self._brought(path) for path in spec.text_encoders],
            "vae": self._brought(spec.vae),
            "embeddings": [self._brought(path) for path in spec.embeddings if Path(path).is_dir()],
            "banks": there(Path(self.cluster.storage) / "banks"),
            "output": there(self.remote / "made" / Path(spec.output).name),
            "overwrite": True,
        }

    def _brought(self, path: str) -> str:
        """The cluster's path of a file or folder; it is copied if it is outside the storage."""
        source, storage = Path(path), Path(self.cluster.storage)
        if not path:
            return ""
        if not source.exists():
            raise ValueError(
                f"There is no file or folder {source}, which the job needs. Put it back, or start "
                "a new job without it."
            )
        if source.resolve().is_relative_to(storage.resolve()):
            return self.cluster.there(storage / source.resolve().relative_to(storage.resolve()))
        # Links are followed, as the trainer follows them.
        files = disk.files_under(source)[0] if source.is_dir() else [source]
        stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        folder = storage / "files" / disk.name_of(json.dumps(stamps))
        if not folder.exists():
            log.info("%s is being copied to the storage", source.name)
            with disk.whole_folder(folder) as new:
                if source.is_dir():
                    (new / source.name).mkdir()
                for file in files:
                    copy = new / source.name / file.relative_to(source)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copy)
        return self.cluster.there(folder / source.name)

    def mirror_control(self) -> None:
        """Passes the user's request on to the trainer."""
        control = Control(action=self._action())
        if self.remote.is_dir() and Control.read(self.remote) != control:
            control.write(self.remote)

    def mirror(self) -> None:
        """Copies what the trainer wrote since the last look: metrics, sample pictures, log."""
        names = ["metrics.jsonl", "samples/teacher.safetensors"]
        names += [f"samples/{file.name}" for file in self.remote.glob("samples/step-????????.png")]
        for name in names:
            try:
                stat = (self.remote / name).stat()
            except OSError:
                continue
            stamp = stat.st_size, stat.st_mtime_ns
            if self.mirrored.get(self.remote / name) != stamp:
                (self.job / name).parent.mkdir(exist_ok=True)
                with disk.whole_file(self.job / name) as new:
                    shutil.copyfile(self.remote / name, new)
                self.mirrored[self.remote / name] = stamp
        try:
            with open(self.remote / "log.txt", "rb") as file:
                file.seek(self.handover.log)
                new_lines = file.read()
        except OSError:
            return
        if new_lines:
            sys.stderr.buffer.write(new_lines)
            sys.stderr.flush()
            self._record(log=self.handover.log + len(new_lines))

    def _report(self, state: str) -> None:
        status = self._status()
        if not status.state:
            if state == "PENDING":
                self.journal.state("preparing", message="waiting for resources on the cluster")
            else:
                self.journal.state("preparing", message="starting on the cluster")
        elif status.state in ("preparing", "running"):
            self.journal.repeat(status)

    def _ended(self, state: str, reason: str) -> int:
        status = self._status()
        if status.state == "done":
            self._fetch(status)
            return 0
        if status.state in ("paused", "failed"):
            self.journal.repeat(status)
            return disk.DISK_FULL if status.disk_full else int(status.state == "failed")
        if self._action():
            self.journal.repeat(replace(status, state="paused", message="ended on the cluster"))
            return 0
        # A crash: the supervisor starts this process again, which submits the job again.
        log.error("The cluster ended the job: %s. %s", state or "it is unknown there", reason)
        if state:
            last = self.api.log(self.handover.submission)[-LAST:]
            log.error("The end of its log there:\n%s", last)
        return 1

    def _fetch(self, status: Status) -> None:
        """Copies the LoRA to this machine, checks it, and reports the job done."""
        output = Path(self.spec.output)
        made = self.remote / "made" / output.name
        result = Result.read(self.remote) or Result()
        if output.exists() and not self.spec.overwrite:
            if disk.sha256(output) != result.sha256:
                raise ValueError(
                    f"{output.name} exists already: choose another name, or switch overwrite on. "
                    f"The cluster's result is {made}."
                )
        output.parent.mkdir(parents=True, exist_ok=True)
        with disk.whole_file(output) as new:
            shutil.copyfile(made, new)
            if (sha256 := disk.sha256(new)) != result.sha256:
                raise ValueError(
                    f"{made} is damaged: its sha256 is {sha256}, expected {result.sha256}. Resume "
                    "the job to fetch it again."
                )
        replace(result, file=str(output)).write(self.job)
        self.journal.repeat(status)
        shutil.rmtree(self.remote, ignore_errors=True)

    def _state(self) -> tuple[str, str]:
        return self._patiently(lambda: self.api.state(self.handover.submission))

    def _patiently(self, call: Callable[[], T]) -> T:
        """The result of a call to the cluster, which is repeated until the cluster answers."""
        wait = TICK
        while True:
            try:
                return call()
            except NoAnswer as error:
                log.warning("%s does not answer: %s", self.cluster.address, error)
            self.journal.state(
                self.journal.status.state,
                message=f"the cluster {self.cluster.address} does not answer; trying again",
            )
            self.mirror_control()  # the storage may be reachable all the same
            self.mirror()
            if self._action() in ("pause", "stop"):
                message = (
                    "the cluster does not answer; its job will see the request to pause in the "
                    "shared storage"
                )
                self.journal.state("paused", message=message)
                raise SystemExit(0)
            if self.terminated.wait(wait):
                raise SystemExit(1)
            wait = min(LONGEST, 2 * wait)

    def _status(self) -> Status:
        """The report of this submission's trainer; an empty one before its first."""
        return newer(Status.read(self.remote) or Status(), self.handover.earlier)

    def _action(self) -> str:
        return (Control.read(self.job) or Control()).action

    def _record(self, **changes: Any) -> None:
        self.handover = replace(self.handover, **changes)
        self.handover.write(self.job)


def package() -> bytes:
    """The part of the pack that trains, as a zip file; equal bytes for equal files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in SENT:
            for file in sorted((ROOT / part).rglob("*")):
                if file.is_file() and "__pycache__" not in file.parts:
                    name = PurePosixPath("lcm_lora", *file.relative_to(ROOT).parts)
                    archive.writestr(zipfile.ZipInfo(str(name)), file.read_bytes())
    return buffer.getvalue()
