"""Finished jobs in a store, with figures and sample pictures, as a trainer leaves them."""

from __future__ import annotations

import math

from lcm_lora.training import disk
from lcm_lora.training.jobs.records import Attempt, Result, Status
from lcm_lora.training.spec import Data, Spec
from lcm_lora.training.state import sheets
from lcm_lora.training.state.journal import Journal
from PIL import Image

SIDE = 64


def lay(ground, name: str, steps: int = 200, every: int = 50, scale: float = 1.0) -> str:
    """A finished job, with a loss each 10 steps and sample pictures `every` steps; -> its id."""
    output = ground.loras / f"{name}.safetensors"
    checkpoint = ground.base / "models" / "checkpoints" / ground.subject.checkpoint
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes((ground.loras / ground.subject.lcm_lora).read_bytes())
    spec = Spec(
        host=str(ground.server.host), checkpoint=str(checkpoint), output=str(output),
        banks=str(ground.base / "banks"), steps=steps, rank=4, resolution=SIDE,
        guidance=(2.5,), overwrite=True, sample_every=every,
        data=Data(prompts=("a bag", "a dress"), count=8),
    )  # fmt: skip
    identifier, _ = ground.store.create(spec, name)
    job = ground.store.path(identifier)
    journal = Journal(job)
    (job / "samples").mkdir()
    for step in range(10, steps + 1, 10):
        loss = scale * (0.3 * math.exp(-step / 100) + 0.02)
        figures = {"lr": 1e-3, "gradient_norm": 0.2, "samples_per_second": 1.5, "memory": 10**9}
        journal.metrics(step=step, loss=loss, **figures)
        if step % every == 0:
            errors = {steps: loss / int(steps) for steps in "124"}
            likeness = {"distance": errors, "recall": {steps: 0.9 - loss for steps in "124"}}
            journal.metrics(step=step, endpoint_error=errors, **likeness)
            sheet = Image.new("RGB", (4 * SIDE, 2 * SIDE), (step % 256, 99, 180))
            sheets.write(job / "samples" / f"step-{step:08d}.png", sheet, spec.data.prompts)
    Result(str(output), disk.sha256(output), 1.0, {}).write(job)
    Status(pid=1, started=1.0, updated=1.0, state="done", step=steps, steps=steps).write(job)
    Attempt(pid=1, identity="ended", ended="done").write(job)
    return identifier
