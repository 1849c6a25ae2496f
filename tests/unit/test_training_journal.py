"""What a job reports, and which of the teacher's answers it keeps, over a restart."""

import json
import math
import time

import pytest
from lcm_lora.training.data.answers import folder
from lcm_lora.training.jobs.records import Status
from lcm_lora.training.spec import Spec
from lcm_lora.training.state import journal as journal_module
from lcm_lora.training.state.journal import Journal
from lcm_lora.training.state.progress import Pace, is_due, times


def test_a_process_that_goes_on_reports_how_far_the_one_before_came(tmp_path):
    Journal(tmp_path).state("running", step=20, loss=0.5, message="fast")
    journal = Journal(tmp_path)
    journal.state("preparing")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["loss"]) == ("preparing", 20, 0.5)
    assert status["message"] == ""


def test_a_repeated_report_without_figures_keeps_its_own_figures(tmp_path):
    """A job may be asked to pause before its submission to a cluster has reported anything."""
    journal = Journal(tmp_path)
    journal.state("running", step=400, steps=1000, loss=0.2)
    journal.repeat(Status(state="paused", message="ended on the cluster"))
    report = Status.read(tmp_path)
    assert (report.state, report.message) == ("paused", "ended on the cluster")
    assert (report.step, report.steps, report.loss) == (400, 1000, 0.2)


def test_metrics_are_json_whatever_the_figures(tmp_path):
    journal = Journal(tmp_path)
    journal.metrics(step=1, loss=0.5, gradient_norm=math.inf)

    def refused(word):
        raise AssertionError(f"{word} is no JSON")

    line = json.loads(journal.metrics_file.read_text(), parse_constant=refused)
    assert line["gradient_norm"] is None and line["loss"] == 0.5


def reported(job, wanted):
    """The first status that is wanted."""
    deadline = time.monotonic() + 60
    while (status := Status.read(job)) is None or not wanted(status):
        assert time.monotonic() < deadline, status
        time.sleep(0.01)
    return status


def test_while_a_long_step_lasts_the_time_left_goes_down(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "BEAT", 0.02)
    journal = Journal(tmp_path)
    with journal.beating():
        assert Status.read(tmp_path) is None  # it has nothing to say yet
        journal.state("running", "training", step=3, seconds_left=6000.0)
        later = reported(tmp_path, lambda status: status.seconds_left < 6000)
        journal.note("drawing samples", activity_done=1, activity_total=8)
        drawing = reported(tmp_path, lambda status: status.activity != "training")
    assert (later.state, later.step, later.activity) == ("running", 3, "training")
    assert (drawing.activity, drawing.activity_done, drawing.step) == ("drawing samples", 1, 3)
    journal.state("paused", message="by its user")
    report = Status.read(tmp_path)
    assert report == journal.status
    assert (report.activity, report.activity_total, report.seconds_left) == ("", 0, None)


def test_a_disk_that_fails_does_not_end_the_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "BEAT", 0.02)
    journal = Journal(tmp_path / "later")
    with journal.beating():
        with pytest.raises(OSError):
            journal.state("running", step=1)
        (tmp_path / "later").mkdir()
        assert reported(tmp_path / "later", lambda status: True).step == 1


def test_measurements_of_pictures_that_are_drawn_again_are_dropped(tmp_path):
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.metrics(step=step, loss=0.5)
        journal.metrics(step=step, endpoint_error={"1": 0.1})
    journal.forget_after(2, unsampled=True)
    lines = [json.loads(line) for line in journal.metrics_file.read_text().splitlines()]
    kept = [(line["step"], "loss" in line) for line in lines]
    assert kept == [(1, True), (1, False), (2, True)]


def test_the_time_left_includes_pictures_and_checkpoints(tmp_path):
    paths = {name: str(tmp_path / name) for name in ("host", "checkpoint", "banks")}
    paths["output"] = str(tmp_path / "a.safetensors")
    spec = Spec(**paths, steps=100, batch=4, sample_every=40, checkpoint_every=10)
    pace = Pace()
    assert pace.seconds_left(spec, 0) is None
    pace.add_step(30.0)
    assert pace.seconds_left(spec, 1) == 99 * 30
    for _ in range(3):
        pace.add_step(2.0)  # the first step is forgotten
    assert pace.seconds_left(spec, 4) == 96 * 2
    # 12 pictures are 3 batches of 4, and a step is 6 calls: a call for all of them is as a step.
    assert pace.seconds_left(spec, 4, prompts=12, calls=10) == 96 * 2 + 10 * 1
    pace.a_call, pace.a_save = 0.5, 3.0
    assert pace.seconds_left(spec, 4, prompts=12, calls=10) == 96 * 2 + 10 * 0.5 + 10 * 3.0
    assert pace.seconds_left(spec, 100, prompts=12, calls=4) == 4 * 0.5


@pytest.mark.parametrize("every", [0, 1, 3, 7, 10, 20])
def test_how_often_something_is_due(every):
    for step in range(11):
        due = [later for later in range(step + 1, 11) if is_due(every, later, 10)]
        assert times(every, step, 10) == len(due)


def test_answers_are_of_one_job_with_one_number_of_processes(tmp_path):
    """A step of two processes has other pictures than the same step of one."""
    paths = {name: str(tmp_path / name) for name in ("host", "checkpoint", "banks")}
    paths["output"] = str(tmp_path / "a.safetensors")
    spec, other = Spec(**paths, passes=2), Spec(**paths, passes=2, guidance=(4.0,))
    asked = [(spec, "a", 1), (spec, "a", 2), (spec, "b", 1), (other, "a", 1)]
    assert len({folder(tmp_path, *arguments) for arguments in asked}) == 4
    assert folder(tmp_path, spec, "a", 1) == folder(tmp_path, spec, "a", 1)
