"""The real ComfyUI in this process, and the toy's files where it looks for models."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from lcm_lora.tests.host.queued import PROMPTS, supervisor_of


@pytest.fixture(scope="session")
def comfy(tmp_path_factory, host_folder):
    """.host: ComfyUI's folder; .base: its base directory; .loras, .checkpoints: model folders."""
    from lcm_lora.dev import in_process

    base = tmp_path_factory.mktemp("comfyui")
    in_process.enter(host_folder, base)
    models = base / "models"
    return SimpleNamespace(
        host=host_folder, base=base, loras=models / "loras", checkpoints=models / "checkpoints"
    )


@pytest.fixture(scope="session")
def toy_checkpoint(comfy) -> Path:
    """The assembled toy, kept in the checkout's own folder between runs."""
    from lcm_lora.dev.commands import LOCAL
    from lcm_lora.dev.toy import assemble

    return assemble.checkpoint(LOCAL / "models")


@pytest.fixture(scope="module")
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


@pytest.fixture
def job(tmp_path, comfy, toy_checkpoint, banks):
    """job(name, **settings) -> the Spec of a short distillation of the toy."""
    from lcm_lora.training.spec import Data, Spec

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
