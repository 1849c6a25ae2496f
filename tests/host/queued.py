"""What tests of the queue ask of it, and wait for."""

import json
import os
import signal
import time

from lcm_lora.training.jobs import processes

PROMPTS = ("a photo of a bag", "a photo of a dress", "a photo of an ankle boot")


def supervisor_of(store) -> int | None:
    """The process that supervises this store, found by its command line."""
    for process in processes.of_job("supervisor"):
        if str(store.folder) in process.cmdline():
            return process.pid
    return None


def kill_supervisor(store) -> None:
    """Returns when it is dead: for some milliseconds a killed process is still there."""
    pid = supervisor_of(store)
    os.kill(pid, signal.SIGKILL)
    until(lambda: processes.identity(pid) is None, "the supervisor is dead")


def until(check, what: str, seconds: float = 400):
    deadline = time.monotonic() + seconds
    while not (result := check()):
        assert time.monotonic() < deadline, f"waited too long until {what}"
        time.sleep(0.05)
    return result


def ended(store, identifier, *states):
    def check():
        now = store.job(identifier).state
        assert now in states or now not in ("failed", "paused", "done"), log_of(store, identifier)
        return now in states

    until(check, f"the job is {states}")
    return store.job(identifier)


def log_of(store, identifier) -> str:
    path = store.path(identifier)
    files = [path / "log.txt", path / "supervisor.json", store.folder / "supervisor.log"]
    return "\n".join(file.read_text() for file in files if file.exists())


def at_step(store, identifier, step):
    until(lambda: store.job(identifier).step >= step, f"step {step}")


def trainer(store, identifier) -> int:
    return json.loads((store.path(identifier) / "supervisor.json").read_text())["pid"]


def gone(store):
    until(lambda: supervisor_of(store) is None, "the supervisor has ended")
