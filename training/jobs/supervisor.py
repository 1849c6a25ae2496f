"""Runs the queue: one process for each store of jobs, which ends when there is nothing left to do.

`ensure` starts the supervisor. A second supervisor ends immediately, because the first holds the
lock. It starts each device's jobs in order, restarts crashed trainers from their newest checkpoint,
and enforces a stop. It stays while jobs are paused for a server, to continue them when that server
is gone. If the supervisor is killed, the next one finds the trainers by supervisor.json.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from .. import disk
from ..cluster.settings import Cluster
from . import processes, restart
from .job import Job
from .processes import Process
from .records import Attempt, Control, Outline, Status
from .states import ACTIVE
from .store import Store

log = logging.getLogger("lcm_lora")
RUN = Path(__file__).resolve().parents[1] / "run.py"
LOCK, NAME = ".supervisor.lock", ".supervisor.json"
TICK = 0.3  # seconds between rounds
FULL = 5.0  # seconds to wait after the disk has failed
KEEP, ROOM = 200, 20e9  # ended jobs that stay, and the bytes they may take
TERMINATE, KILL = 20.0, 60.0  # seconds after "stop"

_started: dict[Path, subprocess.Popen[bytes]] = {}
"""The newest supervisor that this process has started for each store."""


def ensure(folder: Path) -> None:
    """Starts the supervisor of this store if none is running or just starting."""
    for _ in range(100):
        named = _named(folder)
        if named.alive:
            return
        mine = _started.get(folder)
        if mine is not None and mine.poll() is None and named.pid != mine.pid:
            return  # it has not written its name yet
        try:
            FileLock(folder / LOCK).acquire(timeout=0.1).lock.release()
        except Timeout:
            continue  # one that is ending, or another server's that has not written its name yet
        command = [sys.executable, str(RUN), "--supervise", str(folder)]
        _started[folder] = processes.start(command, folder / "supervisor.log", "supervisor")
        return
    log.warning("The jobs' supervisor does not start; see %s.", folder / "supervisor.log")


def main(folder: Path) -> int:
    """Works until the queue is empty. Exit status 0, also if another supervisor is at work."""
    store, me = Store(folder), Process.this()
    while True:
        try:
            with FileLock(folder / LOCK).acquire(timeout=1):
                _name(folder, me)
                log.info("supervisor %d starts working on the queue", me.pid)
                Supervisor(store).run()
                # The number stays: it shows that this supervisor is past its start.
                _name(folder, Process(me.pid))
        except Timeout:
            log.info("supervisor %d ends, because another one is at work", me.pid)
            return 0
        # A job may have been queued after the last round, while the name was still there.
        if not any(job.waits or job.state in ACTIVE for job in store.jobs()):
            log.info("supervisor %d has nothing left to do", me.pid)
            return 0


def _named(folder: Path) -> Process:
    content = disk.read_object(folder / NAME)
    pid, identity = content.get("pid"), content.get("identity")
    if not isinstance(pid, int) or not isinstance(identity, str | None):
        return Process()
    return Process(pid, identity)


def _name(folder: Path, process: Process) -> None:
    disk.replace(folder / NAME, json.dumps(asdict(process)))


@dataclass
class Supervisor:
    """The loop and its state; supervisor.json has everything that matters after a crash."""

    store: Store
    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    stopping_since: dict[str, float] = field(default_factory=dict)

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
            except OSError:  # a full disk, or a held lock: the next round does the rest
                log.exception("Could not process the queue.")
                time.sleep(FULL)

    def _round(self) -> bool:
        """Looks at every job and starts what may start; -> whether there is anything left to do."""
        for job in self.store.jobs():
            with self.store.unless_deleted(job.id):
                self._look(job)
        jobs = self.store.jobs()
        busy = set().union(*(_devices(job) for job in jobs if job.state in ACTIVE))
        for job in jobs:
            if job.state == "queued":
                with self.store.unless_deleted(job.id):
                    if busy.isdisjoint(_devices(job)) and self._may_start(job):
                        self._launch(job)
                        busy |= _devices(job)
        return bool(busy) or any(job.waits for job in jobs)

    def _look(self, job: Job) -> None:
        attempt = self._attempt(job)
        if job.state in ACTIVE:
            self._enforce(job)
        elif attempt.pid and attempt.ended is None:
            self._ended(job, attempt)
        elif job.is_forsaken:
            self.store.ask(job.id, "", only=lambda now: now.is_forsaken)

    def _may_start(self, job: Job) -> bool:
        """Whether the pause after a crash is over. If more than the longest pause is left, the
        clock was set back, and the job may start."""
        left = (self._attempt(job).not_before or 0.0) - time.time()
        return not 0 < left <= max(restart.PAUSES)

    def _launch(self, job: Job) -> None:
        path = self.store.path(job.id)
        # A supervisor that was killed here may have left a trainer that it had not recorded.
        processes.end(job.id, kill=True)
        control, before = self._control(job), self._attempt(job)
        command, target = [sys.executable], [str(path / Outline.FILE)]
        if job.on_cluster:
            target = ["--ray", str(self.store.folder.parent / Cluster.FILE), *target]
        elif control.processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "0"]
            command += ["--nproc-per-node", str(control.processes)]
        # torch's builds for Windows have no libuv, which torchrun asks for.
        environment = {"USE_LIBUV": "0"} if sys.platform == "win32" else {}
        if job.visible and not job.on_cluster:
            # ComfyUI's --cuda-device sets both; ROCm reads the second one first.
            names = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
            environment |= dict.fromkeys(names, job.visible)
        earlier = (Status.read(path) or Status()).started
        command += [str(RUN), *target]
        process = processes.start(command, path / "log.txt", job.id, **environment)
        self.children[job.id] = process
        is_same_turn = before.turn == control.turn
        Attempt(
            pid=process.pid,
            identity=processes.identity(process.pid),
            turn=control.turn,
            earlier=earlier,
            crashes=before.crashes if is_same_turn else 0,
            step=before.step if is_same_turn else 0,
        ).write(path)
        log.info("%s started as process %d", job.name, process.pid)

    def _ended(self, job: Job, attempt: Attempt) -> None:
        """Records how a job's process ended, which decides whether the job restarts."""
        child = self.children.pop(job.id, None)
        code = child.wait() if child else None
        processes.end(job.id, kill=True)  # workers that torchrun may have left
        self._sweep(job)
        self.stopping_since.pop(job.id, None)
        path = self.store.path(job.id)
        status = Status.read(path) or Status()
        outcome = restart.restart_or_end(self._control(job), attempt, status, code)
        log.info("%s ended with exit status %s: %s", job.name, code, outcome)
        outcome.write(path)

    def _sweep(self, job: Job) -> None:
        """Removes temporary files of killed processes, wherever a job writes."""
        path = self.store.path(job.id)
        disk.clear_dead(path, deep=True)
        outline = Outline.read(path) or Outline()
        for folder in (Path(outline.output).parent, Path(outline.banks)):
            if folder.is_absolute() and folder.is_dir():
                disk.clear_dead(folder)

    def _enforce(self, job: Job) -> None:
        """Terminates, and then kills, the processes of a job that does not follow a "stop"."""
        if self._control(job).action != "stop":
            self.stopping_since.pop(job.id, None)
            return
        waited = time.monotonic() - self.stopping_since.setdefault(job.id, time.monotonic())
        if waited > KILL:
            processes.end(job.id, kill=True)
        elif waited > TERMINATE:
            processes.end(job.id, kill=False)

    def _attempt(self, job: Job) -> Attempt:
        return Attempt.read(self.store.path(job.id)) or Attempt()

    def _control(self, job: Job) -> Control:
        return Control.read(self.store.path(job.id)) or Control()


def _devices(job: Job) -> set[str]:
    """The devices of this machine that a job uses; the first one if it names none."""
    if job.on_cluster:
        return {job.id}
    return set((job.visible or "0").split(","))
