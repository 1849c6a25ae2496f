"""The records of a job, and the tables over them: its state, and what follows when it ends."""

import json
from pathlib import Path

import pytest
from lcm_lora.training import disk
from lcm_lora.training.jobs.processes import Process
from lcm_lora.training.jobs.records import (
    ACTIVITIES,
    Attempt,
    Control,
    Handover,
    Result,
    Status,
)
from lcm_lora.training.jobs.restart import CRASHES, PAUSES, restart_or_end
from lcm_lora.training.jobs.states import REQUESTED, activity_of, state_of

ME, ROOT = Process.this(), Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "record",
    [
        Control(),
        Control("pause", Process(7, "a boot"), 3, 1.5, "a", "key", "0,1", "GPU-8", 2, "yield", 9.0),
        Attempt(7, "a boot", 1, 5.0, "crashed", None, 2, 40, 99.0),
        Status(7, 5.0, "running", 6.0, "Bär \udce9", 3, 9, 0.5, 7.0, crash=True),
        Result("/a.safetensors", "ab", 5.0, {"a": "b"}),
        Handover("lcm-lora-1", 1, "/storage/jobs/a", None, 10),
    ],
)
def test_a_record_comes_back_from_its_file(tmp_path, record):
    assert type(record).read(tmp_path) is None
    record.write(tmp_path)
    assert type(record).read(tmp_path) == record


def test_files_of_older_versions_are_read(tmp_path):
    old = {
        "control": {"action": "pause", "turn": 1, "order": 2, "aside": {}, "later": [1]},
        "supervisor": {"pid": 7, "identity": None, "crashes": 1, "earlier": None},
        "status": {"pid": 7, "state": "running", "loss": float("inf"), "step": "x", "steps": True},
    }
    for name, content in old.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert Control.read(tmp_path) == Control(action="pause", turn=1, order=2.0)
    assert Attempt.read(tmp_path) == Attempt(pid=7, crashes=1)
    assert Status.read(tmp_path) == Status(pid=7, state="running")


def test_a_record_that_cannot_be_read_surely_is_an_error(tmp_path):
    (tmp_path / "control.json").mkdir()
    assert Control.read(tmp_path) is None
    with pytest.raises(OSError):
        Control.read_surely(tmp_path)


RUNS = Attempt(pid=ME.pid, identity=ME.identity, earlier=5.0)
GONE = Attempt(pid=ME.pid, identity="of another process")


@pytest.mark.parametrize(
    ("control", "attempt", "status", "state"),
    [
        (Control("stop"), RUNS, Status(state="done"), "stopping"),
        (Control(), RUNS, Status(), "preparing"),
        (Control(), RUNS, Status(started=5.0, state="failed"), "preparing"),
        (Control(), RUNS, Status(started=6.0, state="preparing"), "preparing"),
        (Control(), RUNS, Status(started=6.0, state="running"), "running"),
        (Control(), RUNS, Status(started=6.0, state="failed"), "stopping"),
        (Control("stop"), GONE, Status(state="done"), "done"),
        (Control("finish"), GONE, Status(state="done"), "done"),
        (Control("pause"), Attempt(), Status(), "paused"),
        (Control("stop"), Attempt(1, ended="failed"), Status(), "failed"),
        (Control("stop"), GONE, Status(state="running"), "paused"),
        (Control(), Attempt(1, ended="paused"), Status(), "paused"),
        (Control(), GONE, Status(state="running"), "lost"),
        (Control(), Attempt(1, ended="crashed"), Status(state="failed"), "queued"),
        (Control(turn=1), Attempt(1, ended="failed"), Status(state="failed"), "queued"),
        (Control(), Attempt(), Status(), "queued"),
    ],
)
def test_the_table_of_states(control, attempt, status, state):
    assert state_of(control, attempt, status)[0] == state


DRAWING = Status(started=6.0, state="running", activity="drawing samples", message="old")
TRAINING = Status(started=6.0, state="running", activity="training")


@pytest.mark.parametrize(
    ("control", "attempt", "status", "activity"),
    [
        (Control(), RUNS, Status(started=5.0, state="running", activity="training"), "starting"),
        (Control(), RUNS, DRAWING, "drawing samples"),
        (Control("pause"), RUNS, DRAWING, "pausing"),
        (Control("stop"), RUNS, TRAINING, "stopping"),
        (Control("finish"), RUNS, TRAINING, "finishing"),
        (Control("pause", processes=2), RUNS, TRAINING, "pausing after this step"),
        (Control("finish", processes=2), RUNS, DRAWING, "finishing"),
        (Control(), RUNS, Status(started=6.0, state="done"), "ending"),
        (Control(), GONE, DRAWING, ""),
        (Control(), Attempt(), Status(), ""),
    ],
)
def test_the_table_of_activities(control, attempt, status, activity):
    assert activity_of(control, attempt, status) == activity
    if control.action and activity:  # not what the trainer said before it was asked
        assert state_of(control, attempt, status) == ("stopping", activity)


def test_every_activity_is_documented():
    document = json.loads((ROOT / "training/jobs/openapi.json").read_text(encoding="utf-8"))
    documented = document["components"]["schemas"]["Job"]["properties"]["activity"]["enum"]
    asked = [activity for pair in REQUESTED.values() for activity in pair]
    assert sorted(documented) == sorted(["", "starting", "ending", *ACTIVITIES, *asked])


def test_crashes_below_the_furthest_step_do_not_count_as_progress():
    attempt, seen = RUNS, []
    for step in (9, 6, 9, 8):
        report = Status(started=6.0, state="running", step=step)
        attempt = restart_or_end(Control(), attempt, report, -9)
        seen.append((attempt.ended, attempt.crashes, attempt.step))
    assert seen == [("crashed", 1, 9), ("crashed", 2, 9), ("crashed", 3, 9), ("failed", 3, 9)]


@pytest.mark.parametrize(
    ("control", "status", "code", "ended"),
    [
        (Control(), Status(started=6.0, state="done"), 0, "done"),
        (Control(), Status(started=6.0, state="failed", message="why"), 1, "failed"),
        (Control("stop"), Status(started=6.0, state="failed", crash=True), 1, "paused"),
        (Control(), Status(started=6.0, state="running"), disk.DISK_FULL, "paused"),
        (Control(), Status(started=6.0, state="paused", disk_full=True), None, "paused"),
        (Control(), Status(started=6.0, state="failed", crash=True), 1, "crashed"),
        (Control(), Status(started=6.0, state="running"), -9, "crashed"),
        (Control(), Status(started=5.0, state="failed"), -9, "crashed"),  # an earlier process's
        (Control(), Status(), None, "crashed"),
    ],
)
def test_the_table_of_ends(control, status, code, ended):
    outcome = restart_or_end(control, RUNS, status, code)
    assert outcome.ended == ended
    assert (outcome.pid, outcome.turn, outcome.earlier) == (RUNS.pid, RUNS.turn, RUNS.earlier)
    assert (outcome.not_before is None) == (ended != "crashed")


def test_crashes_count_until_there_is_a_new_step():
    status = Status(started=6.0, state="failed", step=3, message="no device", crash=True)
    attempt = restart_or_end(Control(), RUNS, status, 1)
    assert (attempt.crashes, attempt.step) == (1, 3)
    for crashes in range(2, CRASHES + 1):
        attempt = restart_or_end(Control(), attempt, status, 1)
        assert (attempt.ended, attempt.crashes) == ("crashed", crashes)
    further = restart_or_end(Control(), attempt, Status(started=6.0, state="running", step=4), -9)
    assert (further.ended, further.crashes, further.step) == ("crashed", 1, 4)
    failed = restart_or_end(Control(), attempt, status, 1)
    assert failed.ended == "failed"
    assert f"crashed {CRASHES + 1} times in a row at step 3: no device" in failed.message
    assert len(PAUSES) == CRASHES
