"""The shipped workflows, run by a real server on the toy: the pictures show what was asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ALL = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))
WORKFLOWS = [path for path in ALL if path.stem.startswith("LCM-LoRA")]  # those that draw


def images(paths) -> torch.Tensor:
    """Picture files as [N, 3, H, W] in 0..1."""
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255


def fitted(path, subject):
    from lcm_lora.dev.demo import fitted

    return fitted(json.loads(path.read_text(encoding="utf-8")), subject)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_it_draws_the_caption(path, client, subject):
    from lcm_lora.dev.toy.judge import Judge

    prompt = fitted(path, subject)
    for node in prompt.values():
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"]["batch_size"] = 12
    (paths,) = client.pictures(client.run(prompt)).values()
    drawn = images(paths)
    assert drawn.shape == (12, 3, 64, 64)
    if "style" in path.stem:
        # Blue paper in every picture, where photos have backdrops of all hues.
        assert (drawn[:, 2] - drawn[:, 0]).mean((1, 2)).min() > 0.15
    else:
        assert (drawn[:, 2] - drawn[:, 0]).mean((1, 2)).min() < 0.05
        judge = Judge()
        boots = judge.model.garment(judge.features(drawn)).argmax(1) == 9
        assert boots.float().mean() >= 0.75


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_its_nodes_and_inputs_exist(path, client):
    from lcm_lora.dev.workflow import to_api

    known = client.get("/object_info")
    prompt = to_api(json.loads(path.read_text(encoding="utf-8")))
    for node in prompt.values():
        spec = known[node["class_type"]]["input"]
        named = set(spec["required"]) | set(spec.get("optional", {}))
        assert {name.partition(".")[0] for name in node["inputs"]} <= named
        assert set(spec["required"]) <= set(node["inputs"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_it_names_the_official_file(path):
    assert "lcm-lora-sdv1-5.safetensors" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_it_has_a_picture(path):
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert min(picture.size) >= 256


def test_the_same_picture_twice_and_alone_or_in_a_batch(client, subject):
    prompt = fitted(WORKFLOWS[0], subject)
    (size,) = (n for n in prompt.values() if n["class_type"] == "EmptyLatentImage")
    size["inputs"]["batch_size"] = 3
    (batch,) = client.pictures(client.run(prompt)).values()
    size["inputs"]["batch_size"] = 1
    (alone,) = client.pictures(client.run(prompt)).values()
    difference = (images(batch[:1]) - images(alone)).abs().max()
    # The noise is the same; products in a batch round differently, by one grey level at most.
    assert difference <= 2 / 255
