"""Jobs on a real Ray cluster: two nodes of one processor each, on this machine."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from lcm_lora.tests.host.queued import ended, gone, kill_supervisor, trainer, until
from lcm_lora.training.cluster.settings import Cluster
from lcm_lora.training.jobs import processes, supervisor

pytest.importorskip("ray", reason="ray is not installed")
TOKEN = "0123456789abcdef" * 4
CLUSTER = """
import json
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 1, "include_dashboard": True, "dashboard_port": 0,
    "object_store_memory": 100_000_000})
cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
cluster.wait_for_nodes()
print(json.dumps({"address": "http://" + cluster.webui_url}), flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster():
    """The address of the cluster's dashboard."""
    # A short path: Ray makes sockets below it, whose names have at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        here = {
            # A cluster's `python` is that of its own environment.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": folder,
            # It admits only clients that send the token.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
        }
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=os.environ | here, cwd=folder,
        )  # fmt: skip
        try:
            announcement = next(line for line in process.stdout if line.startswith('{"address"'))
            yield json.loads(announcement)["address"]
        finally:
            process.stdin.close()
            process.wait(timeout=60)


@pytest.fixture
def settings(store, comfy, tmp_path):
    """settings(address, token) writes the cluster's beside the store; -> the storage."""

    def write(address: str, token: str = TOKEN) -> Path:
        storage = tmp_path / "storage"
        storage.mkdir(exist_ok=True)
        fields = {"address": address, "storage": str(storage), "host": str(comfy.host), "gpus": 0.0}
        fields["token"] = token
        (store.folder.parent / Cluster.FILE).write_text(json.dumps(fields))
        return storage

    return write


@pytest.mark.faults
def test_two_workers_on_a_cluster_make_the_bytes_of_two_processes_here(
    store, job, cluster, settings, monkeypatch
):
    """The local job loses a worker on the way, and the other one loses its follower."""
    storage = settings(cluster)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # Ray sets this for a worker with one processor
    local, _ = store.create(job("local"), "local", processes=2)
    supervisor.ensure(store.folder)
    until(lambda: store.job(local).step >= 4, "it trains here")
    first = trainer(store, local)
    workers = [process for process in processes.of_job(local) if process.pid != first]
    assert len(workers) == 2
    workers[-1].kill()
    remote, _ = store.create(job("remote", sample_every=6), "remote", "ray:2", 2)
    supervisor.ensure(store.folder)
    until(lambda: store.job(remote).step >= 2, "it trains on the cluster")
    os.kill(trainer(store, remote), signal.SIGKILL)
    ended(store, local, "done")
    ended(store, remote, "done")
    outputs = [
        Path(json.loads((store.path(identifier) / "spec.json").read_text())["output"])
        for identifier in (local, remote)
    ]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert trainer(store, local) != first
    path = store.path(remote)
    lines = (path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"loss"' in line] == list(range(1, 13))
    assert (path / "samples" / "step-00000012.png").stat().st_size > 1000
    assert "step 12 of 12" in (path / "log.txt").read_text()
    assert "as lcm-lora-" in (path / "log.txt").read_text()
    assert not list((storage / "jobs").iterdir()), "what the storage held of the job is still there"
    gone(store)


@pytest.mark.faults
def test_stop_and_resume_on_a_cluster(store, job, cluster, settings):
    storage = settings(cluster)
    running, _ = store.create(job("a", steps=5000), "a", "ray")
    supervisor.ensure(store.folder)
    until(lambda: store.job(running).step >= 2, "it trains on the cluster")
    store.ask(running, "stop")
    paused = ended(store, running, "paused")
    assert paused.step >= 2
    gone(store)
    store.ask(running, "")
    supervisor.ensure(store.folder)
    until(lambda: store.job(running).step > paused.step, "it goes on")
    kill_supervisor(store)
    supervisor.ensure(store.folder)
    # It ends there while nobody follows it here.
    kill_supervisor(store)
    os.kill(trainer(store, running), signal.SIGKILL)
    control = storage / "jobs" / running / "control.json"
    control.write_text('{"action": "finish"}')
    status = control.with_name("status.json")
    until(lambda: json.loads(status.read_text())["state"] == "done", "it is finished there")
    supervisor.ensure(store.folder)
    ended(store, running, "done")
    gone(store)


@pytest.mark.faults
@pytest.mark.parametrize("token", ["", "f" * 64])
def test_a_cluster_that_wants_another_token(store, job, cluster, settings, token):
    settings(cluster, token)
    refused, _ = store.create(job("a"), "a", "ray")
    supervisor.ensure(store.folder)
    record = ended(store, refused, "failed")
    assert "The cluster refuses" in record.message
    assert TOKEN not in record.message


def test_a_cluster_that_is_not_there_is_reported_and_asked_again(store, job, settings):
    settings("http://127.0.0.1:9")
    waiting, _ = store.create(job("a"), "a", "ray")
    supervisor.ensure(store.folder)
    until(lambda: "does not answer" in store.job(waiting).message, "it is reported")
    assert store.job(waiting).state == "preparing"
    store.ask(waiting, "stop")
    ended(store, waiting, "paused")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"address": "head:8265"}, "must begin with http"),
        ({"storage": "/nowhere"}, "must be an existing folder"),
        ({"gpu": 1}, "unknown settings: gpu"),
        ({"token": 5}, "token must be text"),
    ],
)
def test_settings_that_are_refused(tmp_path, change, says):
    file = tmp_path / "ray.json"
    good = {"address": "http://head:8265", "storage": str(tmp_path), "host": "/ComfyUI"}
    file.write_text(json.dumps(good | change))
    with pytest.raises(ValueError, match=says):
        Cluster.read(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        Cluster.read(file)
