"""What other people's checkers of packs and workflows say of this one."""

import json
import subprocess
from pathlib import Path

import pytest
from lcm_lora.dev import environment
from lcm_lora.dev.workflow import to_api
from lcm_lora.tests import tools
from lcm_lora.tests.server.test_workflows import ALL, fitted, needs_painter

CONVERT = """
import json, sys
from comfy_cli.workflow_to_api import convert_ui_to_api
known, *workflows = (json.load(open(path, encoding="utf-8")) for path in sys.argv[1:])
for workflow in workflows:
    print(json.dumps(convert_ui_to_api(workflow, known)))
"""

pytestmark = pytest.mark.usefixtures("network")


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    """The files that users get, in a ComfyUI's folder for packs."""
    scratch = tmp_path_factory.mktemp("checked")
    with tools.archive(scratch) as made:
        made.extractall(scratch / "custom_nodes" / "lcm-lora")
    return scratch / "custom_nodes" / "lcm-lora"


@pytest.fixture(scope="module")
def history(tmp_path_factory) -> Path:
    """A folder with a repository in which the code of each ComfyUI that we support is a tag."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("COMFYUI_PATH", raising=False)  # it would replace all of them
        oldest_first = reversed(environment.HOSTS)
        hosts = [(version, environment.prepare(version)[1]) for version in oldest_first]
    made = tmp_path_factory.mktemp("history") / "ComfyUI"
    made.mkdir()
    who = "-c user.name=test -c user.email=test@localhost -c commit.gpgsign=false".split()

    def git(*words: str, at: Path = made) -> None:
        where = ["--git-dir", made / ".git", "--work-tree", at]
        command = ["git", *where, *who, "-c", "core.compression=0", *words]
        subprocess.run(command, cwd=at, check=True, capture_output=True)

    git("init", "-q")
    for version, host in hosts:
        git("add", "--all", "--force", "*.py", at=host)
        git("commit", "-q", "-m", version, at=host)
        git("tag", f"v{version}")
    git("update-ref", "refs/remotes/origin/master", "HEAD")
    return made.parent


@pytest.mark.parametrize("version", environment.HOSTS)
def test_comfy_import_guard_finds_all_that_we_use(version, pack, history):
    result = tools.run(
        "comfy-import-guard==1.3.0", "comfy-import-guard",
        "--cache-dir", history, "--offline", "check", "--comfy-dir", pack.parents[1],
        "--pack", pack.name, "--target", f"v{version}", "--strict", cwd=pack,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 pack(s): 0 will break, 1 safe, 0 warn, 0 skipped" in result.stdout


@pytest.fixture(scope="module")
def known(client, tmp_path_factory) -> Path:
    """A file with what the server says of its nodes."""
    file = tmp_path_factory.mktemp("validated") / "known.json"
    file.write_text(json.dumps(client.get("/object_info")), encoding="utf-8")
    return file


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_comfy_cli_takes_the_workflow(path, client, subject, known):
    needs_painter(path, client)
    prompt = fitted(path, subject)
    for node in prompt.values():
        if "checkpoint" in node["inputs"]:
            node["inputs"]["checkpoint"] = subject.checkpoint
    file = known.with_name(path.name)
    file.write_text(json.dumps(prompt), encoding="utf-8")
    output = tools.comfy(
        "--json", "workflow", "validate", "--workflow", str(file), "--input", str(known),
        cwd=known.parent,
    )  # fmt: skip
    verdict = json.loads(output.splitlines()[-1])["data"]
    assert verdict["valid"] and not verdict["warning_count"], verdict


def test_comfy_cli_reads_the_workflows_as_we_do(client, known):
    has_painter = "Painter" in client.get("/object_info")
    paths = [p for p in ALL if has_painter or '"Painter"' not in p.read_text(encoding="utf-8")]
    read = tools.run(tools.COMFY_CLI, "python", "-c", CONVERT, known, *paths, cwd=known.parent)
    assert read.returncode == 0, read.stderr
    for path, line in zip(paths, read.stdout.splitlines(), strict=True):
        theirs, ours = json.loads(line), to_api(json.loads(path.read_text(encoding="utf-8")))
        assert theirs.keys() == ours.keys(), path.stem
        for key, node in ours.items():
            assert theirs[key]["class_type"] == node["class_type"]
            # Like the front end, it adds inputs that are newer than the workflow.
            assert theirs[key]["inputs"] == theirs[key]["inputs"] | node["inputs"]
