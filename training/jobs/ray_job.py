"""A job on the user's Ray cluster: handed over through the cluster's Jobs REST API, and followed.

To the supervisor this process is what a trainer is: it writes the same files into the job's folder,
follows control.json, and may be killed and started again. The pack goes to the cluster as a package
of Ray's; everything else through a folder ("storage") that this machine and the cluster's both see:

    <storage>/jobs/<id>/   the folder the trainer works in, as a local job's
             /banks/       latent banks, which the jobs share
             /files/<key>/ checkpoints, LoRAs and pictures that lie elsewhere, copied here once

Nothing of Ray is imported: it is HTTP (docs.ray.io, "Ray Jobs REST API").
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import logging
import shutil
import signal
import sys
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .. import disk
from ..disk import DISK_FULL, disk_is_full
from ..spec import Spec, build, read
from ..state.journal import Journal

log = logging.getLogger("lcm_lora")
ROOT = Path(__file__).resolve().parents[2]
SETTINGS = "ray.json"  # beside the folder of jobs
NOTES = "ray.json"  # in a job's folder: what this process must know when it is started again
SENT = ("training", "lora", "samplers")
TICK, LONGEST = 1.0, 60.0  # seconds between looks, and between calls of one that does not answer
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
HELP = (
    'It is a JSON file: {"address": "http://head:8265", "storage": "/folder/that/all/see", '
    '"host": "/ComfyUI/on/the/cluster"}, with "token", "storage_there", "gpus" and "cpus" where '
    "they are needed."
)


@dataclass(frozen=True)
class Cluster:
    """The user's cluster, out of a file that no page and no workflow can read.

    Attributes:
        address: of Ray's dashboard. token: where the cluster asks for one.
        storage: the folder as this machine sees it; storage_there: as the cluster does, "" for the
            same path. host: ComfyUI's folder on the cluster, whose Python must have what ComfyUI
            needs. gpus, cpus: of each worker; with 0 GPUs it trains on the processor.
    """

    address: str
    storage: str
    host: str
    storage_there: str = ""
    token: str = ""
    gpus: float = 1.0
    cpus: float = 1.0

    @classmethod
    def read(cls, file: Path) -> Cluster:
        """Raises ValueError where the file is not there or tells something else."""
        found = disk.read_json(file)
        if found is None:
            raise ValueError(f"The cluster's settings {file} are not there, or no JSON. {HELP}")
        cluster = build(cls, found, file.name)
        if not cluster.address.startswith(("http://", "https://")):
            raise ValueError(f"address must begin with http:// or https://. {HELP}")
        if not Path(cluster.storage).is_dir():
            raise ValueError(f"storage must be a folder that is there, found {cluster.storage!r}.")
        return cluster

    def there(self, path: Path) -> str:
        """How the cluster calls a path inside the storage."""
        if not self.storage_there:
            return str(path)
        return str(PurePosixPath(self.storage_there, *path.relative_to(self.storage).parts))


class NoAnswer(OSError):
    """The cluster cannot be reached now, or is in trouble of its own; it is asked again later."""


class Api:
    """The cluster's Jobs REST API. Raises NoAnswer, and ValueError for what the cluster refuses."""

    def __init__(self, cluster: Cluster):
        self.address, self.token = cluster.address.rstrip("/"), cluster.token

    def state(self, submission: str) -> tuple[str, str]:
        """Of a submission: PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED, or "" where there is none;
        and what Ray says about it."""
        answer = self._call("GET", f"jobs/{submission}")
        if answer is None:
            return "", ""
        told = json.loads(answer)
        return told["status"], told.get("message") or ""

    def submit(self, submission: str, entrypoint: str, environment: dict, package: bytes) -> None:
        if self.state(submission)[0]:
            return  # handed over before, but the answer was lost
        name = f"_ray_pkg_{hashlib.sha256(package).hexdigest()[:16]}.zip"
        if self._call("GET", f"packages/gcs/{name}") is None:
            self._call("PUT", f"packages/gcs/{name}", package)
        told = {
            "submission_id": submission, "entrypoint": entrypoint,
            "runtime_env": {"working_dir": f"gcs://{name}", "env_vars": environment},
        }  # fmt: skip
        if self._call("POST", "jobs/", json.dumps(told).encode()) is None:
            raise ValueError(f"{self.address} answers, but takes no Ray jobs. {HELP}")

    def stop(self, submission: str) -> None:
        self._call("POST", f"jobs/{submission}/stop", b"")

    def log(self, submission: str) -> str:
        answer = self._call("GET", f"jobs/{submission}/logs")
        return json.loads(answer or "{}").get("logs") or ""

    def _call(self, method: str, path: str, body: bytes | None = None) -> bytes | None:
        """What the cluster answers; None where it knows nothing of that name."""
        request = urllib.request.Request(f"{self.address}/api/{path}", body, method=method)
        request.add_header("Content-Type", "application/json")
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code == 404 and method != "PUT":
                return None
            said = f"{error}. {error.read(2000).decode('utf-8', 'replace')}".strip()
            if error.code >= 500:
                raise NoAnswer(said) from None
            raise ValueError(f"The cluster refuses: {said}") from None
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswer(str(getattr(error, "reason", error))) from None


def main(spec_file: Path, settings: Path) -> int:
    """Until the job has ended. Exit status as run.py's."""
    job = spec_file.resolve().parent
    journal = Journal(job)
    try:
        spec = read(spec_file)
        journal.state("preparing", message="goes to the cluster", steps=spec.steps)
        return Follower(job, spec, Cluster.read(settings), journal).run()
    except ValueError as error:
        log.error("%s", error)
        journal.state("failed", message=str(error))
        return 1
    except OSError as error:
        if not disk_is_full(error):
            raise
        log.error("%s", error)
        journal.state("paused", message=f"The disk here is full ({error}).", disk_full=True)
        return DISK_FULL


class Follower:
    """One job's, until it ends on the cluster."""

    def __init__(self, job: Path, spec: Spec, cluster: Cluster, journal: Journal):
        self.job, self.spec, self.cluster, self.journal = job, spec, cluster, journal
        self.api = Api(cluster)
        self.remote = Path(cluster.storage) / "jobs" / job.name
        self.notes: dict[str, Any] = {"submission": "", "earlier": None, "log": 0}
        self.notes |= disk.read_object(job / NOTES)
        self.notes["remote"] = str(self.remote)
        self.terminated = threading.Event()
        self.mirrored: dict[Path, tuple[int, int]] = {}

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.terminated.set())
        self.mirror_control()
        known = self.notes["submission"] and self._state()[0]
        if not known or known in ENDED:
            if self._status().get("state") == "done":  # while nobody followed it
                return self._ended(known, "")
            self._submit()
        while True:
            self.mirror_control()
            state, said = self._state()
            self.mirror()
            if state in ("", *ENDED):
                return self._ended(state, said)
            self._tell(state)
            if self.terminated.wait(TICK):
                if self._action() != "stop":
                    return 1  # this machine goes down; the job on the cluster does not
                self.terminated.clear()
                self._patiently(self.api.stop, self.notes["submission"])

    def _submit(self) -> None:
        """Writes what the trainer reads, and hands the job over under a new name."""
        self.remote.mkdir(parents=True, exist_ok=True)
        disk.replace(self.remote / "spec.json", json.dumps(self._spec(), ensure_ascii=False))
        turn = int(self.notes.get("turn", 0)) + 1
        # Noted first: a submission that is noted and unknown to the cluster is handed over again.
        self._note(
            turn=turn, submission=f"lcm-lora-{self.job.name}-{turn}",
            earlier=disk.read_object(self.remote / "status.json").get("started"),
        )  # fmt: skip
        told = {
            "spec": self.cluster.there(self.remote / "spec.json"),
            "workers": int(disk.read_object(self.job / "control.json").get("processes", 1)),
            "gpus": self.cluster.gpus, "cpus": self.cluster.cpus,
        }  # fmt: skip
        self._patiently(
            self.api.submit, self.notes["submission"],
            "python lcm_lora/training/jobs/ray_entry.py", {"LCM_LORA_RAY": json.dumps(told)},
            package(),
        )  # fmt: skip
        log.info("handed over to %s as %s", self.cluster.address, self.notes["submission"])

    def _spec(self) -> dict[str, Any]:
        """The description as the cluster reads it."""
        spec, there = self.spec, self.cluster.there
        told = asdict(spec)
        told["loras"] = [{**lora, "path": self._brought(lora["path"])} for lora in told["loras"]]
        told["data"]["path"] = self._brought(spec.data.path)
        return told | {
            "host": self.cluster.host,
            "host_flags": () if self.cluster.gpus else ("--cpu",),
            "checkpoint": self._brought(spec.checkpoint),
            "embeddings": [self._brought(path) for path in spec.embeddings if Path(path).is_dir()],
            "banks": there(Path(self.cluster.storage) / "banks"),
            "output": there(self.remote / "made" / Path(spec.output).name),
            "overwrite": True,
        }

    def _brought(self, path: str) -> str:
        """A file or folder that the job reads, as the cluster sees it; copied where it does not."""
        source, storage = Path(path), Path(self.cluster.storage)
        if not path:
            return ""
        if not source.exists():
            raise ValueError(f"There is no {source}.")
        if source.resolve().is_relative_to(storage.resolve()):
            return self.cluster.there(storage / source.resolve().relative_to(storage.resolve()))
        # With what links lead to, as the trainer reads it.
        files = disk.files_under(source)[0] if source.is_dir() else [source]
        stamps = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        folder = storage / "files" / disk.name_of(json.dumps(stamps))
        if not folder.exists():
            log.info("%s is copied to the storage", source.name)
            with disk.whole_folder(folder) as new:
                if source.is_dir():
                    (new / source.name).mkdir()
                for file in files:
                    copy = new / source.name / file.relative_to(source)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copy)
        return self.cluster.there(folder / source.name)

    def mirror_control(self) -> None:
        """What is asked of the job, as the trainer hears it."""
        told, file = {"action": self._action()}, self.remote / "control.json"
        if self.remote.is_dir() and disk.read_object(file) != told:
            disk.replace(file, json.dumps(told))

    def mirror(self) -> None:
        """What the trainer wrote since the last look: metrics, pictures, words."""
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
                file.seek(self.notes["log"])
                new_words = file.read()
        except OSError:
            return
        if new_words:
            sys.stderr.buffer.write(new_words)
            sys.stderr.flush()
            self._note(log=self.notes["log"] + len(new_words))

    def _tell(self, state: str) -> None:
        status = self._status()
        if not status:
            where = "waits for its place" if state == "PENDING" else "starts"
            self.journal.state("preparing", message=f"{where} on the cluster")
        elif status.get("state") in ("preparing", "running"):
            self.journal.state(status.pop("state"), **status)

    def _ended(self, state: str, said: str) -> int:
        status = self._status()
        words = status.pop("state", "")
        if words == "done":
            self._fetch(status)
            return 0
        if words in ("paused", "failed"):
            self.journal.state(words, **status)
            return DISK_FULL if status.get("disk_full") else int(words == "failed")
        if self._action():
            self.journal.state("paused", **status | {"message": "it was ended on the cluster"})
            return 0
        # A crash: the supervisor starts this process again, and it hands the job over anew.
        log.error("The cluster ended the job: %s. %s", state or "it is unknown there", said)
        if state:
            log.error("Its last words there:\n%s", self.api.log(self.notes["submission"])[-4000:])
        return 1

    def _fetch(self, status: dict[str, Any]) -> None:
        """Brings the LoRA here: whole, verified, and last of all."""
        output = Path(self.spec.output)
        made = self.remote / "made" / output.name
        told = disk.read_object(self.remote / "result.json")
        if output.exists() and not self.spec.overwrite:
            if disk.sha256(output) != told.get("sha256"):
                raise ValueError(
                    f"{output.name} exists already: choose another name, or allow overwrite. What "
                    f"the cluster made is {made}."
                )
        output.parent.mkdir(parents=True, exist_ok=True)
        with disk.whole_file(output) as new:
            shutil.copyfile(made, new)
            if (found := disk.sha256(new)) != told.get("sha256"):
                raise ValueError(
                    f"{made} is damaged: its sha256 is {found}, {told.get('sha256')} was written."
                )
        disk.replace(self.job / "result.json", json.dumps(told | {"file": str(output)}, indent=1))
        self.journal.state("done", **status)
        shutil.rmtree(self.remote, ignore_errors=True)

    def _state(self) -> tuple[str, str]:
        return self._patiently(self.api.state, self.notes["submission"])

    def _patiently(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """What a call of the cluster finds; where it does not answer it is asked until it does."""
        wait = TICK
        while True:
            try:
                return call(*arguments)
            except NoAnswer as error:
                log.warning("%s does not answer: %s", self.cluster.address, error)
            self.journal.state(
                self.journal.status["state"],
                message=f"the cluster {self.cluster.address} does not answer; it is asked again",
            )
            self.mirror_control()  # the storage may be there all the same
            self.mirror()
            if self._action() in ("pause", "stop"):
                message = "the cluster does not answer; the job there reads in the storage to pause"
                self.journal.state("paused", message=message)
                raise SystemExit(0)
            if self.terminated.wait(wait):
                raise SystemExit(1)
            wait = min(LONGEST, 2 * wait)

    def _status(self) -> dict[str, Any]:
        """What the trainer of this submission says; {} before its first word."""
        status = disk.read_object(self.remote / "status.json")
        if status.get("started") == self.notes["earlier"]:
            return {}
        return {k: v for k, v in status.items() if k not in ("pid", "started", "updated")}

    def _action(self) -> str:
        return str(disk.read_object(self.job / "control.json").get("action", ""))

    def _note(self, **told: Any) -> None:
        self.notes |= told
        disk.replace(self.job / NOTES, json.dumps(self.notes))


def package() -> bytes:
    """The part of the pack that trains, zipped; the same bytes for the same files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in SENT:
            for file in sorted((ROOT / part).rglob("*")):
                if file.is_file() and "__pycache__" not in file.parts:
                    name = PurePosixPath("lcm_lora", *file.relative_to(ROOT).parts)
                    archive.writestr(zipfile.ZipInfo(str(name)), file.read_bytes())
    return buffer.getvalue()


def remote(job: Path) -> Path | None:
    """A job's folder in the storage, where it has been to a cluster."""
    told = disk.read_object(job / NOTES).get("remote")
    # Named like the job, or somebody has written into the notes.
    return Path(told) if isinstance(told, str) and Path(told).name == job.name else None


def checkpoints(job: Path) -> Path:
    """Where a job's checkpoints lie: in its folder, or in the storage."""
    return (remote(job) or job) / "checkpoints"
