"""The store of jobs: states from files, even if some are torn, missing or stale."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from lcm_lora.training import disk, waiting
from lcm_lora.training.jobs import job as job_module
from lcm_lora.training.jobs import processes, supervisor
from lcm_lora.training.jobs import store as store_module
from lcm_lora.training.jobs.records import Control
from lcm_lora.training.jobs.store import Store
from lcm_lora.training.spec import Spec


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "jobs")


def spec(tmp_path, name="a", **changes):
    return Spec(
        host=str(tmp_path), checkpoint=str(tmp_path / "base.safetensors"), banks=str(tmp_path),
        output=str(tmp_path / f"{name}.safetensors"), **changes,
    )  # fmt: skip


def tell(store, job, name, **content):
    (store.folder / job / f"{name}.json").write_text(json.dumps(content))


def state(store, job):
    return store.job(job).state


def test_a_new_job_waits(store, tmp_path):
    job, new = store.create(spec(tmp_path, steps=30), "mine")
    assert new
    record = store.job(job)
    assert (record.state, record.name, record.steps) == ("queued", "mine", 30)
    assert record.checkpoint == "base.safetensors"
    assert record.lora_name is None
    assert record.created > 1.7e9


def test_the_same_settings_twice_are_one_job_until_it_has_ended(store, tmp_path):
    job, _ = store.create(spec(tmp_path), "a")
    assert store.create(spec(tmp_path), "a") == (job, False)
    assert store.create(spec(tmp_path, "b", steps=7), "b")[1]
    tell(store, job, "status", state="done")
    again, new = store.create(spec(tmp_path), "a")
    assert new and again != job


def test_the_queue_keeps_its_order_and_can_be_changed(store, tmp_path):
    jobs = [store.create(spec(tmp_path, steps=1 + i), str(i))[0] for i in range(50)]
    order = lambda: [job.id for job in store.jobs()]  # noqa: E731
    assert order() == jobs
    store.move(jobs[49], before=jobs[0])
    store.move(jobs[0], before=jobs[2])
    assert order()[:4] == [jobs[49], jobs[1], jobs[0], jobs[2]]
    store.move(jobs[49], before=None)
    assert order() == [jobs[1], jobs[0], *jobs[2:]]
    tell(store, jobs[5], "status", state="done")
    with pytest.raises(ValueError, match="not waiting"):
        store.move(jobs[5], before=None)
    with pytest.raises(ValueError, match="not waiting"):
        store.move(jobs[4], before=jobs[5])


def test_two_jobs_change_places_as_often_as_one_likes(store, tmp_path):
    jobs = [store.create(spec(tmp_path, steps=1 + i), str(i))[0] for i in range(5)]
    first, one, other, *rest = jobs
    for _ in range(60):  # a float holds some 50 halves
        store.move(other, before=one)
        assert [job.id for job in store.jobs()] == [first, other, one, *rest]
        one, other = other, one


def test_what_a_live_process_says_counts_while_it_lives(store, tmp_path):
    job, _ = store.create(spec(tmp_path), "a")
    me = os.getpid()
    tell(store, job, "supervisor", pid=me, identity=processes.identity(me), turn=0)
    assert state(store, job) == "preparing"
    tell(store, job, "status", state="running", step=3, loss=0.5, seconds_left=9)
    assert (store.job(job).state, store.job(job).step) == ("running", 3)
    store.ask(job, "pause")
    assert state(store, job) == "stopping"
    with pytest.raises(ValueError, match="stop it first"):
        store.delete(job)


@pytest.mark.parametrize("last_state", ["done", "failed", "paused"])
def test_a_process_that_has_said_its_last_word_is_stopping(store, tmp_path, last_state):
    job, _ = store.create(spec(tmp_path), "a")
    me = {"pid": os.getpid(), "identity": processes.identity(os.getpid()), "turn": 0}
    tell(store, job, "supervisor", **me, earlier=None)
    tell(store, job, "status", state=last_state, started=5.0, message="its last word")
    assert (state(store, job), store.job(job).message) == ("stopping", "its last word")


@pytest.mark.parametrize("last_state", ["preparing", "running", "failed", "paused"])
def test_words_of_the_process_before_are_not_those_of_this_one(store, tmp_path, last_state):
    job, _ = store.create(spec(tmp_path), "a")
    me = {"pid": os.getpid(), "identity": processes.identity(os.getpid()), "turn": 0}
    tell(store, job, "supervisor", **me, earlier=5.0)
    tell(store, job, "status", state=last_state, started=5.0, message="its last word")
    assert (state(store, job), store.job(job).message) == ("preparing", "")
    tell(store, job, "status", state="running", started=6.0)
    assert state(store, job) == "running"


@pytest.mark.parametrize("asked", ["pause", "stop", "finish"])
def test_one_that_fails_after_it_was_asked_to_end_has_failed(store, tmp_path, asked):
    job, _ = store.create(spec(tmp_path), "a")
    store.ask(job, asked)
    tell(store, job, "supervisor", ended="failed", turn=0, message="The loss became nan")
    tell(store, job, "status", state="failed", message="The loss became nan")
    assert (state(store, job), store.job(job).error) == ("failed", "The loss became nan")
    store.ask(job, "")
    store.ask(job, asked)
    assert state(store, job) == "paused"


def test_only_a_job_that_has_stepped_aside_is_shown_as_aside(store, tmp_path):
    job, _ = store.create(spec(tmp_path), "a")
    me = processes.Process.this()
    state_and_aside = lambda: (store.job(job).state, store.job(job).public()["aside"])  # noqa: E731
    assert state_and_aside() == ("queued", False)
    tell(store, job, "supervisor", **vars(me), turn=0)
    store.ask(job, "pause", aside=me)
    assert state_and_aside() == ("stopping", True)
    tell(store, job, "supervisor", ended="paused", turn=0)
    assert state_and_aside() == ("paused", True)
    tell(store, job, "status", state="done")
    assert state_and_aside() == ("done", False)


def test_a_process_that_took_over_the_number_is_not_the_job_s(store, tmp_path):
    job, _ = store.create(spec(tmp_path), "a")
    tell(store, job, "supervisor", pid=os.getpid(), identity="another-boot-1", turn=0)
    tell(store, job, "status", state="running", step=3, seconds_left=9)
    assert state(store, job) == "lost"
    assert store.job(job).seconds_left is None


def test_a_process_that_ended_is_noticed_though_no_file_changed(store, tmp_path):
    job, _ = store.create(spec(tmp_path), "a")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = processes.identity(child.pid)
    tell(store, job, "supervisor", pid=child.pid, identity=identity, turn=0)
    tell(store, job, "status", state="running")
    assert [record.state for record in store.jobs()] == ["running"]
    child.kill()
    while processes.identity(child.pid) is not None:  # until it is a zombie, at least
        pass
    assert [record.state for record in store.jobs()] == ["lost"]
    child.wait()
    assert processes.identity(child.pid) is None


@pytest.mark.parametrize("name", ["spec", "control", "supervisor", "status"])
@pytest.mark.parametrize(
    "content", [None, "", "{}", '{"state": "ru', "[1]", "\x00\x00", '{"step": "x"}']
)
def test_a_torn_or_missing_file_is_a_state_and_no_exception(store, tmp_path, name, content):
    job, _ = store.create(spec(tmp_path), "a")
    other, _ = store.create(spec(tmp_path, steps=2), "b")
    path = store.folder / job / f"{name}.json"
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    records = {record.id: record for record in store.jobs()}
    gone = name == "spec" and content != '{"step": "x"}'
    assert records[job].state == ("failed" if gone else "queued")
    assert records[other].state == "queued"
    assert ("spec.json" in records[job].message) == gone


def test_looks_of_several_threads_do_not_disturb_each_other(store, tmp_path):
    job, _ = store.create(spec(tmp_path), "a")
    folders = store._folders

    def another_looks_meanwhile():
        yield from folders()
        store._folders = lambda: iter(())  # its list is from before the job was there
        assert store.jobs() == []

    store._folders = another_looks_meanwhile
    assert [record.id for record in store.jobs()] == [job]


@pytest.mark.parametrize("file", ["spec.json", "control.json", "status.json"])
def test_a_job_that_is_deleted_while_it_is_read_is_no_job(store, tmp_path, monkeypatch, file):
    jobs = [store.create(spec(tmp_path, name), name)[0] for name in "ab"]
    other, _ = store.create(spec(tmp_path, "c"), "c")
    read = disk.read_json

    def read_as_it_goes(path):
        if path.name == file and path.parent.name in jobs and path.parent.exists():
            path.parent.rename(tmp_path / path.parent.name)
        return read(path)

    monkeypatch.setattr(disk, "read_json", read_as_it_goes)
    fresh = Store(store.folder)  # it has not read any of them yet
    with pytest.raises(KeyError, match=jobs[0]):
        fresh.job(jobs[0])
    assert [record.id for record in fresh.jobs()] == [other]
    assert (tmp_path / jobs[1]).is_dir()


@pytest.mark.parametrize("bad", ["", "..", "../x", "a" * 32, "con", "x" * 5000, "é", None, 3])
def test_an_id_is_a_uuid(store, bad):
    with pytest.raises(ValueError, match="UUID"):
        store.path(bad)


def test_an_unknown_id_is_a_key_error(store):
    with pytest.raises(KeyError):
        store.job("00000000-0000-4000-8000-000000000000")


def test_a_job_is_asked_as_it_is_then(store, tmp_path):
    job, _ = store.create(spec(tmp_path), "a")
    changing = store._changing

    def another_was_faster():
        store._changing = changing
        store.ask(job, "stop")
        return changing()

    store._changing = another_was_faster
    assert not store.ask(job, "pause", only=lambda record: record.state == "queued")
    assert json.loads((store.path(job) / "control.json").read_text())["action"] == "stop"
    assert store.ask(job, "", only=lambda record: record.state == "paused")
    assert state(store, job) == "queued"


@pytest.mark.parametrize(
    ("asked", "heard"), [("pause", "pause"), ("stop", "pause"), ("finish", "finish"), ("", "")]
)
def test_the_trainer_hears_what_a_job_is_asked(store, tmp_path, monkeypatch, asked, heard):
    monkeypatch.setattr(waiting.signal, "signal", lambda *_: None)
    job, _ = store.create(spec(tmp_path), "a")
    hears = waiting.Request(store.path(job) / "control.json")
    store.ask(job, asked)
    assert hears() == heard


def test_deleting_and_cleaning_leave_the_rest(store, tmp_path):
    jobs = [store.create(spec(tmp_path, steps=1 + i), str(i))[0] for i in range(6)]
    for job in jobs[:4]:
        tell(store, job, "status", state="done")
    (store.folder / ".tmp-left").mkdir()
    store.clean(keep=2, room=1e9)
    assert sorted(job.id for job in store.jobs()) == sorted(jobs[2:])
    store.delete(jobs[5])
    assert not (store.folder / jobs[5]).exists()
    assert not (store.folder / ".tmp-left").exists()


def test_old_jobs_go_where_they_take_too_much_room_and_their_loras_stay(store, tmp_path):
    jobs = [store.create(spec(tmp_path, str(i)), str(i))[0] for i in range(3)]
    for i, job in enumerate(jobs):
        tell(store, job, "status", state="done")
        (store.folder / job / "log.txt").write_bytes(b"x" * 10_000)
        (tmp_path / f"{i}.safetensors").write_bytes(b"a LoRA")
    store.clean(keep=10, room=25_000)
    assert sorted(job.id for job in store.jobs()) == sorted(jobs[1:])
    assert all((tmp_path / f"{i}.safetensors").exists() for i in range(3))


def test_a_finished_job_is_taken_again_while_its_lora_is_there(store, tmp_path):
    job, _ = store.create(spec(tmp_path), "a")
    tell(store, job, "status", state="done")
    (tmp_path / "a.safetensors").write_bytes(b"a LoRA")
    assert store.create(spec(tmp_path), "a") == (job, False)


def test_a_finished_job_trains_on_from_its_last_checkpoint(store, tmp_path):
    job, _ = store.create(spec(tmp_path, steps=900), "a")
    with pytest.raises(ValueError, match="queued: only a finished job"):
        store.extend(job, 10)
    # It ended early: its LoRA is that of step 100, though it trained 300.
    tell(store, job, "status", state="done", step=100, steps=900)
    with pytest.raises(ValueError, match="checkpoints are gone"):
        store.extend(job, 10)
    for step in (100, 300):
        (store.folder / job / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    output = tmp_path / "a.safetensors"
    output.write_bytes(b"made by it")
    tell(store, job, "result", output=str(output), sha256=disk.sha256(output))
    output.write_bytes(b"another LoRA")
    with pytest.raises(ValueError, match=r"a.safetensors is no longer .* rename it"):
        store.extend(job, 10)
    assert state(store, job) == "done" and output.read_bytes() == b"another LoRA"
    output.write_bytes(b"made by it")
    rival, _ = store.create(spec(tmp_path, steps=5, overwrite=True), "a")
    with pytest.raises(ValueError, match="makes a is queued: delete that job first"):
        store.extend(job, 10)
    store.delete(rival)
    store.extend(job, 10)
    assert (state(store, job), store.job(job).steps) == ("queued", 310)
    assert output.read_bytes() == b"made by it"  # until it has a new one


def test_a_name_that_is_taken_is_refused_and_nothing_is_queued(store, tmp_path):
    assert store.foreseen(spec(tmp_path), "a") == "new"
    job, _ = store.create(spec(tmp_path), "a")
    assert store.foreseen(spec(tmp_path), "a") == "same"
    assert store.foreseen(spec(tmp_path, steps=7), "a") == "promised"
    assert store.foreseen(spec(tmp_path, steps=7, overwrite=True), "a") == "new"
    with pytest.raises(ValueError, match="makes a with other settings is queued"):
        store.create(spec(tmp_path, steps=7), "a")
    (tmp_path / "b.safetensors").write_bytes(b"a LoRA")
    assert store.foreseen(spec(tmp_path, "b"), "b") == "taken"
    assert store.foreseen(spec(tmp_path, "b", overwrite=True), "b") == "replaces"
    with pytest.raises(ValueError, match="b exists already"):
        store.create(spec(tmp_path, "b"), "b")
    assert [record.id for record in store.jobs()] == [job]
    assert store.create(spec(tmp_path, steps=7, overwrite=True), "a")[1]


def test_a_failed_job_is_tried_again(store, tmp_path):
    job, _ = store.create(spec(tmp_path), "a")
    tell(store, job, "supervisor", ended="failed", turn=0, pid=1, identity="gone")
    assert state(store, job) == "failed"
    assert store.create(spec(tmp_path), "a") == (job, False)
    assert state(store, job) == "queued"


def test_two_stores_of_one_folder_agree(store, tmp_path):
    other = Store(store.folder)
    job, _ = store.create(spec(tmp_path), "a")
    assert other.create(spec(tmp_path), "a") == (job, False)
    other.ask(job, "pause")
    assert state(store, job) == "paused"
    store.ask(job, "")
    assert state(other, job) == "queued"


@pytest.mark.parametrize("its_own", [True, False])
def test_what_a_cluster_s_storage_holds_of_a_job_goes_with_it(store, tmp_path, its_own):
    job, _ = store.create(spec(tmp_path), "a")
    there = tmp_path / "storage" / (job if its_own else "others")
    (there / "checkpoints").mkdir(parents=True)
    (store.folder / job / "ray.json").write_text(json.dumps({"remote": str(there)}))
    store.delete(job)
    assert there.exists() is not its_own and there.parent.exists()


def test_what_dead_writers_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        for folder in (tmp_path, tmp_path / "deeper"):
            folder.mkdir(exist_ok=True)
            for pid in (gone.pid, os.getpid(), living.pid):
                (folder / f".tmp-{pid}-0a1b").write_text("half")
            (folder / "whole.json").write_text("{}")
        remaining = {f".tmp-{living.pid}-0a1b", "whole.json"}
        disk.clear_dead(tmp_path)
        assert {file.name for file in tmp_path.iterdir()} == remaining | {"deeper"}
        assert len(list((tmp_path / "deeper").iterdir())) == 4
        disk.clear_dead(tmp_path, deep=True)
        assert {file.name for file in (tmp_path / "deeper").iterdir()} == remaining
    finally:
        living.communicate(b"\n")


def test_a_torn_control_file_is_repaired(store, tmp_path):
    jobs = [store.create(spec(tmp_path, name), name)[0] for name in "ab"]
    torn, intact = (store.folder / job / "control.json" for job in jobs)
    before = intact.read_text()
    torn.write_text('{"order": 1')
    store.clean(10, 1e9)
    assert Control.read(torn.parent) == Control() and intact.read_text() == before


def test_a_lock_that_is_held_is_reported_without_a_path(store, tmp_path, monkeypatch):
    job, _ = store.create(spec(tmp_path), "a")
    monkeypatch.setattr(store_module, "LONGEST", 0.05)
    with FileLock(store.folder / ".changing.lock"):
        for change in (
            lambda: store.create(spec(tmp_path, seed=1), "b"), lambda: store.ask(job, "pause"),
            lambda: store.delete(job), lambda: store.move(job, None),
        ):  # fmt: skip
            with pytest.raises(store_module.Busy, match="Try again") as error:
                change()
            assert "/" not in str(error.value)
    store.ask(job, "pause")


def test_a_supervisor_that_may_not_change_the_jobs_yet_tries_again(store, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "LONGEST", 0.05)
    monkeypatch.setattr(supervisor, "FULL", 0.05)
    rounds = []
    monkeypatch.setattr(supervisor.Supervisor, "_round", lambda _: rounds.append(1))
    store.folder.mkdir()
    lock = FileLock(store.folder / ".changing.lock")
    lock.acquire()
    clean = Store.clean

    def then_it_is_free(self, *limits):
        try:
            clean(self, *limits)
        finally:
            lock.release()

    monkeypatch.setattr(Store, "clean", then_it_is_free)
    assert supervisor.main(store.folder) == 0
    assert rounds == [1]


def test_what_cannot_be_read_is_not_written_anew(store, tmp_path, monkeypatch):
    """The job's name and place in the queue would be lost with the file."""
    job, _ = store.create(spec(tmp_path), "a")
    file = store.path(job) / "control.json"
    before, read_text = file.read_bytes(), Path.read_text

    def fails(path, *_, **__):
        if path == file:
            raise OSError(5, "Input/output error")
        return read_text(path, *_, **__)

    monkeypatch.setattr(Path, "read_text", fails)
    with pytest.raises(OSError, match="Input/output"):
        store.ask(job, "pause")
    monkeypatch.undo()
    assert file.read_bytes() == before


def test_a_fault_of_ours_is_no_job_that_is_gone(store, tmp_path, monkeypatch):
    store.create(spec(tmp_path), "a")

    def faulty(*_):
        raise KeyError("rows")

    monkeypatch.setattr(job_module, "state_of", faulty)
    with pytest.raises(KeyError, match="rows"):
        store.jobs()
    missing = FileNotFoundError(2, "No such file", "python")
    with pytest.raises(FileNotFoundError):
        with store.unless_deleted(next(store.folder.glob("*-*-*")).name):
            raise missing
    with store.unless_deleted("00000000-0000-4000-8000-000000000000"):
        raise missing
