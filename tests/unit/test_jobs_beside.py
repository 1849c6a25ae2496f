"""Pausing for prompts and notifying pages: the server's side, without a server."""

import io
import json
import os
import time

import pytest
from lcm_lora.training.jobs import processes, supervisor
from lcm_lora.training.jobs import store as store_module
from lcm_lora.training.jobs.beside import IDLE, Beside
from lcm_lora.training.jobs.processes import Process
from lcm_lora.training.jobs.store import Store
from lcm_lora.training.spec import Spec


class Server:
    """A server as Beside sees it; it records what Beside calls."""

    def __init__(self, folder):
        self.store = Store(folder / "jobs")
        self.prompts, self.freed, self.worked, self.notified, self.waiting = 0, 0, 0, 0, []
        self.folder, self.now = folder, 0.0
        self.beside = Beside(
            self.store, lambda: self.prompts, self._free, self._work, self._notify, self.waiting
        )

    def _free(self):
        self.freed += 1

    def _work(self):
        self.worked += 1

    def _notify(self):
        self.notified += 1

    def job(self, policy, name="a"):
        spec = Spec(
            host=str(self.folder), checkpoint=str(self.folder / "x"), banks=str(self.folder),
            output=str(self.folder / f"{name}.safetensors"),
        )  # fmt: skip
        return self.store.create(spec, name, policy=policy)[0]

    def runs(self, job):
        me = os.getpid()
        record = {"pid": me, "identity": processes.identity(me), "turn": self.turn(job)}
        (self.store.path(job) / "supervisor.json").write_text(json.dumps(record))

    def ends(self, job):
        (self.store.path(job) / "supervisor.json").write_text('{"ended": "paused"}')

    def turn(self, job):
        return json.loads((self.store.path(job) / "control.json").read_text())["turn"]

    def look(self, seconds=1.0):
        self.now += seconds
        self.beside.look(self.now)

    def meanwhile(self, act):
        """Calls `act` during the next look, after that has read the jobs."""
        read = self.store.jobs

        def jobs():
            self.store.jobs = read
            listed = read()
            act()
            return listed

        self.store.jobs = jobs

    def asked(self, job):
        control = json.loads((self.store.path(job) / "control.json").read_text())
        return control["action"], "aside" in control


@pytest.fixture
def server(tmp_path):
    return Server(tmp_path)


def test_a_yielding_job_goes_and_comes_back_when_the_queue_has_been_empty_for_a_while(server):
    job = server.job("yield")
    server.runs(job)
    server.look()
    assert server.store.job(job).state == "preparing"
    server.prompts = 1
    server.look()
    assert server.store.job(job).state == "stopping"
    server.ends(job)
    assert server.store.job(job).state == "paused"
    assert "while the graph runs" in server.store.job(job).message
    server.prompts = 0
    server.look(IDLE - 0.5)
    assert server.store.job(job).state == "paused"
    server.look(1)
    assert server.store.job(job).state == "queued"
    assert server.worked


@pytest.mark.parametrize("policy", ["exclusive", "share"])
def test_the_others_stay(server, policy):
    job = server.job(policy)
    server.runs(job)
    server.prompts = 1
    server.look()
    assert server.store.job(job).state == "preparing"


def test_a_job_that_a_prompt_waits_for_does_not_step_aside_for_it(server):
    job = server.job("yield")
    server.prompts = 1
    server.look()
    assert server.store.job(job).state == "paused"
    server.waiting.append(job)
    server.look(0.1)
    assert server.store.job(job).state == "queued"
    server.runs(job)
    server.look()
    assert server.store.job(job).state == "preparing"


def test_what_the_user_has_paused_stays_paused(server):
    job = server.job("yield")
    server.store.ask(job, "pause")
    server.look(100)
    assert server.store.job(job).state == "paused"


@pytest.mark.parametrize("action", ["pause", "stop", "finish"])
def test_what_the_user_asks_in_the_same_moment_is_what_counts(server, action):
    job = server.job("yield")
    server.runs(job)
    server.prompts = 1
    server.meanwhile(lambda: server.store.ask(job, action))
    server.look()
    assert server.asked(job) == (action, False)
    server.ends(job)
    server.prompts = 0
    server.look(100)
    assert server.asked(job) == (action, False)


def test_one_that_is_paused_for_good_as_it_comes_back_stays_paused(server):
    job = server.job("yield")
    server.prompts = 1
    server.look()
    assert server.asked(job) == ("pause", True)
    server.prompts = 0
    server.meanwhile(lambda: server.store.ask(job, "pause"))
    server.look(100)
    assert server.asked(job) == ("pause", False)


@pytest.mark.parametrize("busy", [True, False])
def test_one_that_is_deleted_in_the_same_moment_disturbs_nobody(server, busy):
    jobs = [server.job("yield", name) for name in "ab"]
    if not busy:  # the paused jobs resume
        server.prompts = 1
        server.look()
    server.prompts = int(busy)
    server.meanwhile(lambda: server.store.delete(jobs[0]))
    server.look(100)
    assert server.asked(jobs[1]) == (("pause", True) if busy else ("", False))


def test_another_server_brings_back_only_what_nobody_else_holds(server):
    job = server.job("yield")
    parent = os.getppid()
    server.store.ask(job, "pause", Process(parent, processes.identity(parent)))
    server.look(100)
    assert server.store.job(job).state == "paused"
    server.store.ask(job, "pause", Process(parent, "of one that ended"))
    server.look(100)
    assert server.store.job(job).state == "queued"


def test_the_supervisor_stays_for_one_that_stands_aside_until_its_server_is_gone(
    server, monkeypatch
):
    job = server.job("yield")
    server.prompts = 1
    server.look()
    assert server.asked(job) == ("pause", True) and server.worked
    at_work, launched = supervisor.Supervisor(server.store), []
    monkeypatch.setattr(at_work, "_launch", lambda record: launched.append(record.id))
    assert at_work._round() and not launched
    server.store.ask(job, "pause", Process(os.getpid(), "of one that ended"))
    assert at_work._round() and launched == [job]
    server.store.ask(job, "pause")
    assert not at_work._round()


def test_one_that_steps_aside_after_the_supervisor_s_last_look_is_not_left(server, monkeypatch):
    job, runs = server.job("yield"), []

    def run(_):
        runs.append(job)
        server.store.ask(job, "pause", Process.this() if len(runs) == 1 else None)

    monkeypatch.setattr(supervisor.Supervisor, "run", run)
    assert supervisor.main(server.store.folder) == 0
    assert len(runs) == 2


def test_memory_is_asked_for_when_a_job_starts_and_after_each_prompt(server):
    shared = server.job("share", "b")
    server.runs(shared)
    server.look()
    assert server.freed == 0
    job = server.job("exclusive")
    server.runs(job)
    server.look()
    server.look()
    assert server.freed == 1
    server.prompts = 1
    server.look()
    server.prompts = 0
    server.look()
    server.look()
    assert server.freed == 2


def test_pages_are_notified_only_when_a_job_changes(server):
    one, two = server.job("share", "a"), server.job("share", "b")
    server.look()
    server.look()
    assert server.notified == 1
    server.store.ask(two, "pause")
    server.look()
    assert server.notified == 2
    server.store.delete(one)
    server.look()
    assert server.notified == 3


def calls_of(server, looks):
    """Counts the file system calls of this many looks, half a second apart."""
    asked = []

    def counted(call):
        return lambda *arguments, **options: asked.append(call) or call(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((os, "stat"), (os, "scandir"), (io, "open"), (os, "open")):
            patch.setattr(module, name, counted(getattr(module, name)))
        for _ in range(looks):
            server.look(0.5)
    return len(asked)


def settle(server):
    for _ in range(2):
        server.look(0.5)
        time.sleep(0.1)


def test_kept_jobs_are_not_read_while_nothing_happens(server, monkeypatch):
    """At two looks a second no more than a few calls a second, however many jobs are kept."""
    monkeypatch.setattr(store_module, "SETTLED", 0.05)
    jobs = [server.job("yield", str(number)) for number in range(40)]
    for job in jobs:
        (server.store.path(job) / "status.json").write_text('{"state": "done"}')
    settle(server)
    assert 0 < calls_of(server, 20) <= 4 * 10
    before = server.notified
    # What is asked by this server or another process is seen at the next look.
    Store(server.store.folder).delete(jobs[0])
    server.look(0.5)
    assert server.notified == before + 1
    (server.store.path(jobs[1]) / "status.json").unlink()
    server.store.ask(jobs[1], "pause")
    server.look(0.5)
    assert server.notified == before + 2 and server.store.job(jobs[1]).state == "paused"
    settle(server)
    assert calls_of(server, 20) <= 4 * 10
    server.store.ask(jobs[1], "")
    server.look(0.5)
    assert server.worked and server.store.job(jobs[1]).state == "queued"
    server.prompts = 1
    server.look(0.5)
    assert server.asked(jobs[1]) == ("pause", True)


def test_a_prompt_beside_jobs_that_have_ended_reads_none_of_them(server, monkeypatch):
    monkeypatch.setattr(store_module, "SETTLED", 0.05)
    job = server.job("yield")
    (server.store.path(job) / "status.json").write_text('{"state": "done"}')
    settle(server)
    server.prompts = 1
    assert calls_of(server, 20) <= 4 * 10
