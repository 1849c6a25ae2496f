"""What a job reports, and which of the teacher's answers it keeps, over a restart."""

import json
import math

from lcm_lora.training.data.answers import folder
from lcm_lora.training.jobs.records import Status
from lcm_lora.training.spec import Spec
from lcm_lora.training.state.journal import Journal


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


def test_answers_are_of_one_job_with_one_number_of_processes(tmp_path):
    """A step of two processes has other pictures than the same step of one."""
    paths = {name: str(tmp_path / name) for name in ("host", "checkpoint", "banks")}
    paths["output"] = str(tmp_path / "a.safetensors")
    spec, other = Spec(**paths, passes=2), Spec(**paths, passes=2, guidance=(4.0,))
    asked = [(spec, "a", 1), (spec, "a", 2), (spec, "b", 1), (other, "a", 1)]
    assert len({folder(tmp_path, *arguments) for arguments in asked}) == 4
    assert folder(tmp_path, spec, "a", 1) == folder(tmp_path, spec, "a", 1)
