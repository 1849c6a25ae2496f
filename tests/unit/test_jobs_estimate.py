"""What a job will take: from earlier jobs of the same architecture on the same device."""

import json

import pytest
import torch
from lcm_lora.training.checkpoint_file import NETWORK
from lcm_lora.training.jobs.estimate import estimate
from lcm_lora.training.jobs.store import Store
from lcm_lora.training.spec import Data, Spec
from safetensors.torch import save_file

DATA = Data(prompts=("a bag", "a dress"), count=100, draw_steps=10)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "jobs")


def checkpoint(tmp_path, name="base", width=768):
    path = tmp_path / f"{name}.safetensors"
    block = "input_blocks.1.1.transformer_blocks.0."
    save_file(
        {
            f"{NETWORK}{block}attn2.to_k.weight": torch.zeros(320, width),
            f"{NETWORK}{block}norm1.weight": torch.zeros(320),
            "first_stage_model.x": torch.zeros(3),
        },
        path,
    )
    return str(path)


def spec(tmp_path, name="a", **changes):
    path = changes.pop("checkpoint", None) or checkpoint(tmp_path)
    return Spec(
        host=str(tmp_path), checkpoint=path, banks=str(tmp_path),
        output=str(tmp_path / f"{name}.safetensors"), **{"data": DATA, "batch": 10, **changes},
    )  # fmt: skip


def trained(store, settings, device="", speeds=(1.0, 20.0, 19.0, 21.0), memory=3e9):
    """A job that has left these lines of metrics."""
    identifier, _ = store.create(settings, settings.output, device)
    path = store.path(identifier)
    lines = [
        json.dumps({"step": i + 1, "samples_per_second": speed, "memory": memory})
        for i, speed in enumerate(speeds)
    ]
    (path / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    status = {"state": "done", "step": len(speeds)}
    (path / "status.json").write_text(json.dumps(status), encoding="utf-8")


def test_without_an_earlier_job_no_time_is_invented(store, tmp_path):
    made = estimate(spec(tmp_path), "a", "", 1, store)
    assert (made.training_seconds, made.drawing_seconds, made.time) == (None, None, "unknown")
    assert (made.architecture, made.own_resolution, made.drawn) == ("SD1.5", 512, 100)
    assert (made.memory_bytes, made.memory) == (4.7e9, "estimated")


def test_the_same_settings_are_measured(store, tmp_path):
    trained(store, spec(tmp_path))
    made = estimate(spec(tmp_path, "b", steps=400, seed=3), "a", "", 1, store)
    # 400 x 10 pictures at the median without the first line.
    assert (made.training_seconds, made.time) == (pytest.approx(200), "measured")
    # Drawing takes 20 calls a picture, training 5.15.
    assert made.drawing_seconds == pytest.approx(100 * 20 / (20 * 5.15))
    assert (made.memory_bytes, made.memory) == (3e9, "measured")
    # What the earlier job drew is used again.
    assert estimate(spec(tmp_path, "b", steps=400), "a", "", 1, store).drawing_seconds == 0


def test_other_settings_are_estimated(store, tmp_path):
    trained(store, spec(tmp_path))
    larger = estimate(spec(tmp_path, resolution=1024, steps=400), "a", "", 1, store)
    assert (larger.training_seconds, larger.time) == (pytest.approx(800), "estimated")
    assert (larger.memory_bytes, larger.memory) == (None, "unknown")
    kept = estimate(spec(tmp_path, passes=8, steps=400), "a", "", 1, store)
    assert kept.training_seconds == pytest.approx(200 * 3.4 / 5.15)
    own = estimate(spec(tmp_path, data=Data("pictures", str(tmp_path))), "a", "", 1, store)
    assert (own.drawn, own.drawing_seconds) == (0, 0)


@pytest.mark.parametrize(
    "changes",
    [{"precision": "fp32"}, {"host_flags": ("--cpu",)}, {"objective": "phased"}, {"width": 2048}],
)
def test_what_cannot_be_compared_does_not_count(store, tmp_path, changes):
    width = changes.pop("width", None)
    other = checkpoint(tmp_path, "other", width) if width else None
    trained(store, spec(tmp_path, checkpoint=other, **changes))
    assert estimate(spec(tmp_path), "a", "", 1, store).time == "unknown"


def test_another_device_does_not_count(store, tmp_path):
    trained(store, spec(tmp_path), device="1")
    assert estimate(spec(tmp_path), "a", "", 1, store).time == "unknown"
    assert estimate(spec(tmp_path), "a", "1", 1, store).time == "measured"


def test_the_disk_holds_checkpoints_lora_and_what_is_drawn(store, tmp_path):
    parameters = 64 * (320 + 768)
    bank = 2 * (100 * 4 * 64 * 64 + 2 * 77 * 768)
    settings = spec(tmp_path)
    made = estimate(settings, "a", "", 1, store)
    assert made.disk_bytes == 12 * parameters * (settings.keep + 2) + 2 * parameters + bank


def test_a_checkpoint_that_does_not_tell_its_architecture(store, tmp_path):
    (tmp_path / "old.ckpt").write_bytes(b"x")
    made = estimate(spec(tmp_path, checkpoint=str(tmp_path / "old.ckpt")), "a", "", 1, store)
    assert (made.architecture, made.time, made.memory) == ("", "unknown", "unknown")
    assert made.disk_bytes is None


def flow_file(tmp_path, name, more=(), width=32):
    """The network of a Flux, in a file of its own."""
    path = tmp_path / f"{name}.safetensors"
    shapes = {
        "double_blocks.0.img_attn.qkv.weight": (3 * width, width), "img_in.weight": (width, 64),
        "txt_in.weight": (width, 16), "vector_in.in_layer.weight": (width, 768),
    } | dict.fromkeys(more, (width, 256))  # fmt: skip
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return str(path)


GUIDANCE = ("guidance_in.in_layer.weight",)


def test_a_network_with_embedded_guidance_is_called_once(store, tmp_path):
    """And not compared with its relative that has none, nor with one of another size."""
    file = flow_file(tmp_path, "dev", GUIDANCE)
    trained(store, spec(tmp_path, checkpoint=file))
    made = estimate(spec(tmp_path, "b", checkpoint=file, seed=3), "a", "", 1, store)
    assert made.time == "measured"
    # Training takes 4.15 calls a picture, drawing 10.
    assert made.drawing_seconds == pytest.approx(100 * 10 / (20 * 4.15))
    kept = estimate(spec(tmp_path, "b", checkpoint=file, passes=8), "a", "", 1, store)
    assert kept.training_seconds == pytest.approx(1000 * 10 * (3.15 + 1 / 8) / (20 * 4.15))
    for other in (flow_file(tmp_path, "schnell"), flow_file(tmp_path, "large", GUIDANCE, 64)):
        assert estimate(spec(tmp_path, checkpoint=other), "a", "", 1, store).time == "unknown"


def test_the_memory_of_a_flow_model_is_calculated(store, tmp_path):
    file = flow_file(tmp_path, "dev", GUIDANCE)
    made = estimate(spec(tmp_path, checkpoint=file, precision="bf16"), "a", "", 1, store)
    weights = 32 * (3 * 32 + 64 + 16 + 768 + 256)
    activations = (32 * 32 + 256) * 32 * (1 + 17)
    lora = 64 * (3 * 32 + 32)
    assert made.memory_bytes == 2 * (weights + activations) + 16 * lora
    assert (made.memory, made.own_resolution) == ("estimated", 1024)
    full = estimate(spec(tmp_path, checkpoint=file, precision="fp32"), "a", "", 1, store)
    assert full.memory_bytes == 4 * (weights + activations) + 16 * lora
