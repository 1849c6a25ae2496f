"""The real ComfyUI in this process, and the toy's files where it looks for models."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lcm_lora.tests.host.queued import PROMPTS, supervisor_of


@pytest.fixture(scope="session")
def comfy(tmp_path_factory, host_folder):
    """.host: ComfyUI's folder; .base: its base directory; .loras, .checkpoints: model folders."""
    from lcm_lora.dev import in_process

    base = in_process.enter(host_folder, tmp_path_factory.mktemp("comfyui"))
    models = base / "models"
    return SimpleNamespace(
        host=host_folder, base=base, loras=models / "loras", checkpoints=models / "checkpoints"
    )


@pytest.fixture(scope="session")
def toy_checkpoint(comfy) -> Path:
    """The assembled toy, kept in the checkout's own folder between runs."""
    from lcm_lora.dev.toy import assemble

    return assemble.checkpoint()


@pytest.fixture(scope="session")
def banks(tmp_path_factory):
    """One folder of latent banks, so that only the first job draws its latents."""
    return tmp_path_factory.mktemp("banks")


@pytest.fixture
def store(tmp_path):
    """An empty queue, whose processes end with the test."""
    from lcm_lora.training.jobs import processes
    from lcm_lora.training.jobs.store import Store

    made = Store(tmp_path / "jobs")
    yield made
    for job in made.jobs():
        processes.end(job.id, kill=True)
    if (pid := supervisor_of(made)) is not None:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def spec_in(comfy, toy_checkpoint, banks):
    """spec_in(folder, **settings) -> the Spec of a short distillation of the toy."""
    from lcm_lora.training.spec import Data, Spec

    def spec(folder: Path, **changes) -> Spec:
        settings = {
            "host": str(comfy.host), "checkpoint": str(toy_checkpoint), "banks": str(banks),
            "output": str(folder / "lcm.safetensors"),
            "data": Data(prompts=PROMPTS, count=8, draw_steps=4), "resolution": 64, "steps": 12,
            "batch": 2, "rank": 4, "guidance": (2.5,), "lr": 1e-3, "checkpoint_every": 3,
            "log_every": 1, "sample_every": 0, "seed": 3,
        }  # fmt: skip
        return Spec(**settings | changes)

    return spec


@pytest.fixture
def job(tmp_path, spec_in):
    """job(name, **settings) -> a Spec, as spec_in's."""
    return lambda name="a", **changes: spec_in(tmp_path / name, **changes)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, spec_in) -> bytes:
    """The file of such a distillation that ran through, to hold those against that did not."""
    folder = tmp_path_factory.mktemp("unbroken")
    spec = folder / "spec.json"
    spec.write_text(spec_in(folder).to_json(), encoding="utf-8")
    run = Path(__file__).resolve().parents[2] / "training" / "run.py"
    subprocess.run([sys.executable, str(run), str(spec)], check=True)
    return (folder / "lcm.safetensors").read_bytes()
