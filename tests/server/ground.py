"""A user folder of its own, with servers that come and go, jobs, and what is killed there."""

import time

from lcm_lora.training.jobs import processes
from lcm_lora.training.jobs.records import Attempt
from lcm_lora.training.jobs.restart import CRASHES
from lcm_lora.training.jobs.states import ACTIVE

STEPS = 30
ENDED = ("done", "failed", "paused")


def order(client, name: str, **changes) -> str:
    """Queues a small job; -> its id. The changes must include `checkpoint`."""
    settings = {
        "name": name, "steps": STEPS, "batch": 2,
        "rank": 4, "guidance": 2.5, "lr": 1e-3, "seed": 3, "checkpoint_every": 3,
        "sample_every": 10, "policy": "share", "precision": "fp32",
        "data": {"prompts": "a photo of a bag", "count": 8, "draw_steps": 4, "resolution": 64},
    }  # fmt: skip
    return client.post("/lcm_lora/jobs", settings | changes)["id"]


def done(store, job: str, seconds: float) -> bool:
    """Waits for a job's end; -> whether it ended in time and is done."""
    until = time.monotonic() + seconds
    while (state := store.job(job).state) not in ENDED:
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return state == "done"


def kill_supervisors(store) -> None:
    for process in processes.of_job("supervisor"):
        if str(store.folder) in process.cmdline():
            process.kill()


def end_jobs(store) -> None:
    """Ends all jobs at once. They would go on after their server has ended."""
    for job in store.jobs():
        store.ask(job.id, "stop")
    kill_supervisors(store)
    for job in store.jobs():
        processes.end(job.id, kill=True)


class Ground:
    """A user folder with the toy, a server, and functions that kill what runs there."""

    def __init__(self, host_folder, folder, subject, models):
        from lcm_lora.dev.server import Server, install
        from lcm_lora.training.jobs.store import Store

        self.new = lambda port=0: Server(host_folder, folder, port)
        self.subject, self.server = subject, self.new()
        self.base = self.server.base
        for kind in ("checkpoints", "loras"):
            for file in (models / kind).glob("demo-*"):
                install(file.resolve(), self.base / "models" / kind)
        self.store = Store(self.base / "user" / "__lcm_lora" / "jobs")
        self.loras = self.base / "models" / "loras"

    def up(self, port: int = 0) -> None:
        """Starts a server, on a free port if none is given."""
        self.server = self.new(port)
        self.server.__enter__()

    def order(self, name: str, **changes) -> str:
        """Queues a job; -> its id."""
        settings = {"checkpoint": self.subject.checkpoint} | changes
        return order(self.server.client(), name, **settings)

    def done(self, job: str, seconds: float = 300) -> bool:
        return done(self.store, job, seconds)

    def end_jobs(self) -> None:
        end_jobs(self.store)

    def clear(self) -> None:
        """Ends and deletes all jobs."""
        until = time.monotonic() + 60
        while jobs := self.store.jobs():
            self.end_jobs()  # the server may have started another supervisor meanwhile
            for job in jobs:
                if self.store.job(job.id).state not in ACTIVE:
                    self.store.delete(job.id)
            assert time.monotonic() < until, "jobs do not end"

    def spared(self, job: str) -> None:
        """Waits for a new step if one more crash would make the job fail by its rules."""
        attempt = Attempt.read(self.store.path(job)) or Attempt()
        if attempt.crashes >= CRASHES:
            while (now := self.store.job(job)).step <= attempt.step and now.state not in ENDED:
                time.sleep(0.1)

    def kill(self, victim: str, job: str) -> None:
        if victim == "server":
            self.server.kill()
        elif victim == "trainer":
            processes.end(job, kill=True)
        else:
            kill_supervisors(self.store)
