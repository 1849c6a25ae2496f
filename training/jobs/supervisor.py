"""Runs the queue: one process for a store of jobs, gone when nothing is left to do.

Started by `ensure`; a second one ends at once, for the first holds the lock. It takes each device's
jobs in order, relaunches a trainer that crashed from its newest checkpoint, and escalates a stop. A
job that stands aside goes on when its server is no more, so it stays for that too.
Killed and started again it finds its trainers by what it wrote about them.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .. import disk
from . import processes, ray_job
from .store import ACTIVE, Job, Store

log = logging.getLogger("lcm_lora")
RUN = Path(__file__).resolve().parents[1] / "run.py"
LOCK, NAME = ".supervisor.lock", ".supervisor.json"
TICK = 0.3  # seconds between looks
FULL = 5.0  # seconds to wait when the disk refuses
CRASHES = 3  # in a row without a new step, then the job has failed
PAUSES = (1.0, 10.0, 60.0)  # seconds before a relaunch
KEEP, ROOM = 200, 20e9  # ended jobs that stay, and the bytes they may take
TERMINATE, KILL = 20.0, 60.0  # seconds after a stop was asked


_started: dict[Path, subprocess.Popen] = {}
"""The newest supervisor that this process has started for each store."""


def ensure(folder: Path) -> None:
    """Starts the supervisor of this store if none is running or just starting."""
    for _ in range(100):
        known = disk.read_object(folder / NAME)
        if processes.alive(known.get("pid"), known.get("identity")):
            return
        mine = _started.get(folder)
        if mine is not None and mine.poll() is None and known.get("pid") != mine.pid:
            return  # it has not said its name yet
        try:
            FileLock(folder / LOCK).acquire(timeout=0.1).lock.release()
        except Timeout:
            continue  # one that is dying, or another server's that has not said its name yet
        command = [sys.executable, str(RUN), "--supervise", str(folder)]
        _started[folder] = processes.start(command, folder / "supervisor.log", "supervisor")
        return
    log.warning("The jobs' supervisor neither runs nor ends; see %s.", folder / "supervisor.log")


def main(folder: Path) -> int:
    """Until the queue is empty. Exit status 0, also when another supervisor is at work."""
    store, me = Store(folder), os.getpid()
    while True:
        try:
            with FileLock(folder / LOCK).acquire(timeout=1):
                name = {"pid": me, "identity": processes.identity(me)}
                disk.replace(folder / NAME, json.dumps(name))
                log.info("supervisor %d takes up the queue", me)
                Supervisor(store).run()
                # Not removed: by its number one knows that this one is past its start.
                disk.replace(folder / NAME, json.dumps({"pid": me, "identity": None}))
        except Timeout:
            log.info("supervisor %d ends, for another one is at work", me)
            return 0
        # A job may have been queued after the last look, by one who saw the name still there.
        if not any(job.waits or job.state in ACTIVE for job in store.jobs()):
            log.info("supervisor %d has nothing left to do", me)
            return 0


@dataclass
class Supervisor:
    """The loop and what it remembers; all that matters after a crash is in supervisor.json."""

    store: Store
    children: dict[str, subprocess.Popen] = field(default_factory=dict)
    asked_since: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        is_clean = False
        while True:
            try:
                if not is_clean:
                    self.store.clean(KEEP, ROOM)
                    is_clean = True
                if not self._round():
                    return
                time.sleep(TICK)
            except OSError:  # a full disk, a lock that is held: the next round does what is left
                log.exception("The queue could not be worked on.")
                time.sleep(FULL)

    def _round(self) -> bool:
        """Looks at every job and starts what may start; -> whether anything is left to do."""
        for job in self.store.jobs():
            with self.store.unless_deleted(job.id):
                self._look(job)
        jobs = self.store.jobs()
        busy = set().union(*(_devices(job) for job in jobs if job.state in ACTIVE))
        waiting = [job for job in jobs if job.state == "queued"]
        for job in waiting:
            with self.store.unless_deleted(job.id):
                if busy.isdisjoint(_devices(job)) and self._may_start(job):
                    self._launch(job)
                    busy |= _devices(job)
        return bool(busy) or any(job.waits for job in jobs)

    def _look(self, job: Job) -> None:
        known = self._known(job)
        if job.state in ACTIVE:
            self._escalate(job)
        elif "pid" in known and "ended" not in known:
            self._ended(job)
        elif job.forsaken:
            self.store.ask(job.id, "", only=lambda found: found.forsaken)

    def _may_start(self, job: Job) -> bool:
        """Not while it waits after a crash, but never for long, should the clock be set back."""
        left = self._known(job).get("not_before", 0) - time.time()
        return not 0 < left <= max(PAUSES)

    def _launch(self, job: Job) -> None:
        path = self.store.path(job.id)
        # A supervisor that was killed here may have left a trainer that it did not write down.
        processes.end(job.id, kill=True)
        control = disk.read_object(path / "control.json")
        command, on = [sys.executable], []
        if job.remote:
            on = ["--ray", str(self.store.folder.parent / ray_job.SETTINGS)]
        elif (count := int(control.get("processes", 1))) > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "0"]
            command += ["--nproc-per-node", str(count)]
        # libuv is missing from torch's builds for Windows, where torchrun asks for it.
        told = {"USE_LIBUV": "0"} if sys.platform == "win32" else {}
        if job.visible and not job.remote:
            # As ComfyUI's --cuda-device sets them: ROCm reads the second first.
            told |= dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), job.visible)
        # By this the words of an earlier process are known from those of this one.
        earlier = disk.read_object(path / "status.json").get("started")
        process = processes.start(
            [*command, str(RUN), *on, str(path / "spec.json")], path / "log.txt", job.id, **told
        )
        self.children[job.id] = process
        before, turn = self._known(job), control.get("turn", 0)
        again = before if before.get("turn") == turn else {}
        self._tell(
            job, pid=process.pid, identity=processes.identity(process.pid), turn=turn,
            crashes=again.get("crashes", 0), step=again.get("step", 0), earlier=earlier,
        )  # fmt: skip
        log.info("%s started as process %d", job.name, process.pid)

    def _ended(self, job: Job) -> None:
        """The trainer is no more: what that means, and whether it is launched again."""
        child = self.children.pop(job.id, None)
        code = child.wait() if child else None
        processes.end(job.id, kill=True)  # workers that torchrun may have left
        self._sweep(job)
        self.asked_since.pop(job.id, None)
        known = self._known(job)
        status = disk.read_object(self.store.path(job.id) / "status.json")
        if status.get("started") == known.get("earlier"):
            status = {}
        said, message = status.get("state"), str(status.get("message", ""))
        control = disk.read_object(self.store.path(job.id) / "control.json")
        if said == "done" or (said == "failed" and not status.get("crash")):
            outcome = {"ended": said, "message": message}
        elif control.get("action") or code == disk.DISK_FULL or status.get("disk_full"):
            outcome = {"ended": "paused", "message": message}
        else:
            step = int(status.get("step", 0))
            crashes = 1 if step > known.get("step", 0) else known.get("crashes", 0) + 1
            if crashes > CRASHES:
                outcome = {
                    "ended": "failed",
                    "message": f"The training crashed {crashes} times in a row at step {step}"
                    + (f": {message}" if status.get("crash") else ".")
                    + " Its log tells more.",
                }
            else:
                wait = PAUSES[min(crashes, len(PAUSES)) - 1]
                outcome = {
                    "ended": "crashed", "crashes": crashes, "step": step,
                    "not_before": time.time() + wait,
                }  # fmt: skip
        log.info("%s ended with status %s: %s", job.name, code, outcome)
        self._tell(job, **known | outcome)

    def _sweep(self, job: Job) -> None:
        """Half files of processes that were killed, wherever a job writes."""
        disk.clear_dead(self.store.path(job.id), deep=True)
        spec = disk.read_object(self.store.path(job.id) / "spec.json")
        for place in (Path(str(spec.get("output", ""))).parent, Path(str(spec.get("banks", "")))):
            if place.is_absolute() and place.is_dir():
                disk.clear_dead(place)

    def _escalate(self, job: Job) -> None:
        """A stop that is not followed: asked to terminate, and then its whole tree is killed."""
        control = disk.read_object(self.store.path(job.id) / "control.json")
        if control.get("action") != "stop":
            self.asked_since.pop(job.id, None)
            return
        waited = time.monotonic() - self.asked_since.setdefault(job.id, time.monotonic())
        if waited > KILL:
            processes.end(job.id, kill=True)
        elif waited > TERMINATE:
            processes.end(job.id, kill=False)

    def _known(self, job: Job) -> dict[str, Any]:
        return disk.read_object(self.store.path(job.id) / "supervisor.json")

    def _tell(self, job: Job, **known: Any) -> None:
        disk.replace(self.store.path(job.id) / "supervisor.json", json.dumps(known))


def _devices(job: Job) -> set[str]:
    """The devices a job takes; the first where none is named, and on a cluster none of ours."""
    if job.remote:
        return {job.id}
    return set((job.visible or "0").split(","))
