"""The supervisor on real trainings of the toy: the queue, kills, pause and stop."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from lcm_lora.training.jobs import processes, supervisor
from lcm_lora.training.jobs.store import Store
from lcm_lora.training.spec import Data, Spec

PROMPTS = ("a photo of a bag", "a photo of a dress", "a photo of an ankle boot")


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    return tmp_path_factory.mktemp("banks")


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "jobs")
    yield made
    for job in made.jobs():
        processes.end(job.id, kill=True)
    if (pid := supervisor_of(made)) is not None:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def job(tmp_path, comfy, toy_checkpoint, banks):
    def spec(name="a", **changes) -> Spec:
        settings = {
            "host": str(comfy.host), "checkpoint": str(toy_checkpoint), "banks": str(banks),
            "output": str(tmp_path / name / "lcm.safetensors"),
            "data": Data(prompts=PROMPTS, count=8, draw_steps=4), "resolution": 64, "steps": 12,
            "batch": 2, "rank": 4, "guidance": (2.5,), "lr": 1e-3, "checkpoint_every": 3,
            "log_every": 1, "sample_every": 0, "seed": 3,
        }  # fmt: skip
        return Spec(**settings | changes)

    return spec


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
    while not (found := check()):
        assert time.monotonic() < deadline, f"waited too long until {what}"
        time.sleep(0.05)
    return found


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


@pytest.mark.faults
def test_the_queue_runs_in_order_and_everything_ends(store, job):
    first, _ = store.create(job("a"), "a")
    second, _ = store.create(job("b", seed=4), "b")
    third, _ = store.create(job("c", steps=2), "c")
    store.move(third, before=first)
    supervisor.ensure(store.folder)
    supervisor.ensure(store.folder)
    ended(store, second, "done")
    changed = {each.name: each.changed for each in store.jobs()}
    assert changed["c"] < changed["a"] < changed["b"]
    assert store.job(first).lora_name == "a.safetensors"
    gone(store)
    assert not processes.of_job(first)


def test_kills_of_trainer_and_supervisor_change_no_byte(store, job):
    plain, _ = store.create(job("plain"), "plain")
    killed, _ = store.create(job("killed"), "killed")
    supervisor.ensure(store.folder)
    at_step(store, killed, 4)
    os.kill(trainer(store, killed), signal.SIGKILL)
    at_step(store, killed, 7)
    kill_supervisor(store)
    os.kill(trainer(store, killed), signal.SIGKILL)
    until(lambda: store.job(killed).state == "lost", "it is seen that nobody runs it")
    supervisor.ensure(store.folder)
    ended(store, killed, "done")
    outputs = [
        Path(json.loads((store.path(each) / "spec.json").read_text())["output"])
        for each in (plain, killed)
    ]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    gone(store)


def test_a_supervisor_that_died_alone_is_replaced_and_the_training_never_stopped(store, job):
    running, _ = store.create(job(), "a")
    supervisor.ensure(store.folder)
    at_step(store, running, 2)
    before = trainer(store, running)
    kill_supervisor(store)
    supervisor.ensure(store.folder)
    ended(store, running, "done")
    assert trainer(store, running) == before


@pytest.mark.faults
def test_pause_resume_stop_and_delete(store, job):
    running, _ = store.create(job(steps=500), "a")
    supervisor.ensure(store.folder)
    at_step(store, running, 2)
    store.ask(running, "pause")
    assert ended(store, running, "paused").step >= 2
    gone(store)
    store.ask(running, "")
    assert store.job(running).state == "queued"
    supervisor.ensure(store.folder)
    step = store.job(running).step
    at_step(store, running, step + 2)
    store.ask(running, "stop")
    ended(store, running, "paused")
    store.delete(running)
    assert not store.jobs()
    gone(store)


@pytest.mark.faults
def test_a_bad_job_fails_at_once_and_the_next_one_runs(store, job, tmp_path):
    bad, _ = store.create(job("bad", checkpoint=str(tmp_path / "none.safetensors")), "bad")
    good, _ = store.create(job("good", steps=2), "good")
    supervisor.ensure(store.folder)
    ended(store, good, "done")
    found = store.job(bad)
    assert found.state == "failed"
    assert "no checkpoint" in found.error


def test_two_stores_share_a_device_one_job_after_the_other(store, job, tmp_path):
    other = Store(tmp_path / "other jobs")
    first, _ = store.create(job("a"), "a")
    second, _ = other.create(job("b", steps=1), "b")
    try:
        supervisor.ensure(store.folder)
        at_step(store, first, 1)
        supervisor.ensure(other.folder)
        until(lambda: "another ComfyUI" in other.job(second).message, "the second waits")
        assert store.job(first).state == "running"
        ended(other, second, "done")
        assert store.job(first).state == "done"
    finally:
        processes.end(second, kill=True)
        gone(other)


def test_a_stop_is_followed_while_the_bank_is_made(store, job, banks):
    many = Data(prompts=PROMPTS, count=4000, draw_steps=4)
    making, _ = store.create(job("a", data=many, resolution=64), "a")
    supervisor.ensure(store.folder)
    until(lambda: "rows" in store.job(making).message, "the bank is being made")
    store.ask(making, "stop")
    ended(store, making, "paused")
    assert "before the training" in store.job(making).message


def test_a_job_that_crashes_again_and_again_fails(store, job, monkeypatch, tmp_path):
    """A host whose loader kills the process, as a driver may."""
    host = tmp_path / "host"
    (host / "comfy").mkdir(parents=True)
    (host / "comfy" / "__init__.py").touch()
    (host / "comfy" / "sd.py").touch()
    (host / "comfy" / "options.py").write_text("import os, signal; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(supervisor, "PAUSES", (0.1, 0.1, 0.1))
    bad, _ = store.create(job("bad", host=str(host)), "bad")
    assert supervisor.main(store.folder) == 0
    found = store.job(bad)
    assert found.state == "failed"
    assert "crashed 4 times" in found.error
    store.ask(bad, "")
    assert store.job(bad).state == "queued"
