"""The shipped workflows, run by a real server on the toy: the pictures show what was asked for."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from lcm_lora.dev import demo
from lcm_lora.lora.formats.searched import SEARCH
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
FOLDERS = ("checkpoints", "controlnet", "diffusion_models", "loras", "text_encoders", "vae")
ALL = sorted(FOLDER.glob("*.json"))
FLOW = [path for path in ALL if path.stem in demo.FLOW]
OF_TEXT = [path for path in ALL if "Text to image" in path.stem and path not in FLOW]
DRAWING = [path for path in ALL if not path.stem.startswith("Distil") and path not in FLOW]


def images(paths) -> torch.Tensor:
    """Picture files as [N, 3, H, W] in 0..1."""
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255


def fitted(path, subject):
    from lcm_lora.dev.demo import fitted

    return fitted(json.loads(path.read_text(encoding="utf-8")), subject)


def needs_painter(path, client) -> None:
    """Skips a workflow with the host's Painter on a host that has none."""
    if '"Painter"' in path.read_text(encoding="utf-8"):
        if "Painter" not in client.get("/object_info"):
            pytest.skip("this ComfyUI has no Painter node")


def inputs_of(prompt: dict, kind: str) -> dict:
    """The inputs of the only node of a class."""
    (inputs,) = (node["inputs"] for node in prompt.values() if node["class_type"] == kind)
    return inputs


def pictures(client, prompt: dict) -> torch.Tensor:
    """The pictures that the prompt's only SaveImage saves."""
    (paths,) = client.pictures(client.run(prompt)).values()
    return images(paths)


@pytest.fixture(scope="session")
def judge():
    from lcm_lora.dev.toy.judge import Judge

    return Judge()


def as_asked(judge, drawn: torch.Tensor, subject) -> float:
    """The share that shows the object of the caption."""
    from lcm_lora.dev.toy import world

    (kind,) = (number for number, name in enumerate(world.NAMES) if name in subject.captions[0])
    return judge.accuracy(judge.features(drawn), [(kind,)] * len(drawn))


def in_hand(judge, drawn: torch.Tensor, hand: str) -> float:
    """The share that is drawn in a hand: 3d, sticker, blueprint."""
    return judge.hand(judge.features(drawn), hand)


@pytest.mark.parametrize("path", OF_TEXT, ids=lambda path: path.stem)
def test_it_draws_the_caption(path, client, subject, judge):
    prompt = fitted(path, subject)
    inputs_of(prompt, "EmptyLatentImage")["batch_size"] = 12
    drawn = pictures(client, prompt)
    assert drawn.shape == (12, 3, subject.size, subject.size)
    assert as_asked(judge, drawn, subject) >= 0.75
    assert in_hand(judge, drawn, "sticker" if "style" in path.stem else "3d") >= 0.75


def given_picture(server) -> torch.Tensor:
    return images([server.base / "input" / "example.png"])


def test_image_to_image_starts_from_the_picture(client, server, subject):
    prompt = fitted(FOLDER / "Image to image.json", subject)
    source = given_picture(server)
    drawn = pictures(client, prompt)
    assert drawn.shape == source.shape
    inputs_of(prompt, "LCMKSampler")["denoise"] = 1.0
    anew = pictures(client, prompt)
    near, far = ((picture - source).abs().mean() for picture in (drawn, anew))
    assert 0.01 < near < 0.75 * far


def test_inpainting_changes_only_the_hole(client, server, subject):
    from lcm_lora.dev.toy.stand_ins import HOLE

    prompt = fitted(FOLDER / "Inpainting.json", subject)
    left, top, right, bottom = HOLE
    hole = torch.zeros(subject.size, subject.size, dtype=torch.bool)
    hole[top : bottom + 1, left : right + 1] = True
    changed = (pictures(client, prompt) - given_picture(server)).abs()
    assert changed[..., ~hole].max() < 1.5 / 255
    assert changed[..., hole].mean() > 0.02


def test_the_control_net_has_a_say(client, subject):
    prompt = fitted(FOLDER / "ControlNet.json", subject)
    drawn = pictures(client, prompt)
    inputs_of(prompt, "ControlNetApplyAdvanced")["strength"] = 0.0
    plain = pictures(client, prompt)
    assert (drawn - plain).abs().mean() > 0.01
    # At strength 0 the result is that of text to image.
    prompt = fitted(FOLDER / "1 Text to image (SD1.5).json", subject)
    assert (pictures(client, prompt) - plain).abs().max() < 1.5 / 255


def test_live_painting_follows_the_strokes(client, server, subject, judge):
    from lcm_lora.dev.toy import stand_ins

    path = FOLDER / "Live painting.json"
    needs_painter(path, client)
    prompt = fitted(path, subject)
    drawn = []
    for strokes in (0, len(stand_ins.STROKES)):
        inputs_of(prompt, "Painter")["mask"] = stand_ins.painted(strokes)
        shown = client.run(prompt)
        (preview,) = (key for key in prompt if prompt[key]["class_type"] == "PreviewImage")
        (picture,) = shown[preview]["images"]
        drawn.append(images([server.base / "temp" / picture["subfolder"] / picture["filename"]]))
    painted = images([server.base / "input" / stand_ins.painted(len(stand_ins.STROKES))])
    without, follows = ((picture - painted).abs().mean() for picture in drawn)
    assert follows < 0.8 * without
    assert as_asked(judge, drawn[1], subject) == 1


def test_hires_fix_draws_the_same_larger(client, subject, judge):
    prompt = fitted(FOLDER / "Hires fix.json", subject)
    inputs_of(prompt, "EmptyLatentImage")["batch_size"] = 6
    drawn = pictures(client, prompt)
    assert drawn.shape == (6, 3, 3 * subject.size // 2, 3 * subject.size // 2)
    small = torch.nn.functional.interpolate(drawn, size=(subject.size,) * 2, mode="area")
    assert as_asked(judge, small, subject) >= 0.5
    prompt = fitted(FOLDER / "1 Text to image (SD1.5).json", subject)
    inputs_of(prompt, "EmptyLatentImage")["batch_size"] = 6
    first = pictures(client, prompt)
    own = (small - first).abs().mean()
    assert own < 0.75 * (small - first.roll(1, 0)).abs().mean()


def test_what_combine_saves_draws_the_same_in_the_hosts_loader(client, server, subject, judge):
    prompt = fitted(FOLDER / "Merge three LoRAs into one (SDXL).json", subject)
    drawn = pictures(client, prompt)
    saved = inputs_of(prompt, "LCMLoRASave")["filename"] + ".safetensors"
    assert (server.base / "models" / "loras" / saved).is_file()
    applied = inputs_of(prompt, "LCMLoRAApply")
    (apply,) = (key for key, node in prompt.items() if node["class_type"] == "LCMLoRAApply")
    prompt[apply] = {
        "class_type": "LoraLoader",
        "inputs": {
            "model": applied["model"], "clip": applied["clip"], "lora_name": saved,
            "strength_model": 1.0, "strength_clip": 1.0,
        },
    }  # fmt: skip
    vectors = ("LCMLoRAVectorLoader", "LCMLoRACombine", "LCMLoRASave", "PreviewAny")
    alone = {key: node for key, node in prompt.items() if node["class_type"] not in vectors}
    assert (pictures(client, alone) - drawn).abs().max() < 1.5 / 255
    assert in_hand(judge, drawn, "3d") == 0  # in the styles


def test_the_weights_of_a_style_are_found_and_kept_in_the_file(client, server, subject):
    from lcm_lora.lora.formats import files

    prompt = fitted(FOLDER / "Find the weights of a style.json", subject)
    inputs_of(prompt, "LCMWeightSearch").update(
        prompts="a red fox\na blue car\na cup of tea", budget=6, pictures=2, reference_steps=6,
        guidance=3.0, steps=2,
    )  # fmt: skip
    inputs_of(prompt, "EmptyLatentImage").update(width=64, height=64)
    shown = client.run(prompt)
    (preview,) = (key for key in prompt if prompt[key]["class_type"] == "PreviewImage")
    assert shown[preview]["images"]
    (found,) = (key for key in prompt if prompt[key]["class_type"] == "PreviewAny")
    report = shown[found]["text"][0]
    name = inputs_of(prompt, "LCMLoRASave")["filename"] + ".safetensors"
    kept = json.loads(files.read(server.base / "models" / "loras" / name).metadata[SEARCH])
    assert kept["measured"] <= 6 and kept["steps"] == 2
    assert all(f"{weight:g}" in report for _, weight in kept["weights"]), report


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_its_nodes_and_inputs_exist(path, client):
    from lcm_lora.dev.workflow import to_api

    needs_painter(path, client)
    nodes = client.get("/object_info")
    prompt = to_api(json.loads(path.read_text(encoding="utf-8")))
    for node in prompt.values():
        spec = nodes[node["class_type"]]["input"]
        named = set(spec["required"]) | set(spec.get("optional", {}))
        assert {name.partition(".")[0] for name in node["inputs"]} <= named
        assert set(spec["required"]) <= set(node["inputs"])


@pytest.mark.parametrize("path", DRAWING, ids=lambda path: path.stem)
def test_it_names_the_official_file(path):
    assert re.search(r'"lcm-lora-sd(v1-5|xl)\.safetensors"', path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_it_has_a_picture(path):
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert min(picture.size) >= 256


def test_an_interruption_leaves_the_server_ready(client, subject):
    from lcm_lora.dev.client import PromptError

    prompt = fitted(FOLDER / "1 Text to image (SD1.5).json", subject)
    expected = pictures(client, prompt)
    inputs_of(prompt, "LCMKSampler").update(steps=50, seed=8)
    inputs_of(prompt, "EmptyLatentImage")["batch_size"] = 32
    shares = []

    def interrupt(done: float, total: int) -> None:
        shares.append(done % 1)  # of the node that runs, and only the sampler reports
        if shares[-1]:
            client.post("/interrupt", {})

    with pytest.raises(PromptError, match="interrupted"):
        client.run(prompt, on_progress=interrupt)
    assert 0 < max(shares) < 0.5
    prompt = fitted(FOLDER / "1 Text to image (SD1.5).json", subject)
    # Two pictures, so that the host has no answer in its cache.
    inputs_of(prompt, "EmptyLatentImage")["batch_size"] = 2
    assert (pictures(client, prompt)[:1] - expected).abs().max() < 2.5 / 255


def test_the_same_picture_twice_and_alone_or_in_a_batch(client, subject):
    prompt = fitted(FOLDER / "1 Text to image (SD1.5).json", subject)
    inputs_of(prompt, "EmptyLatentImage")["batch_size"] = 3
    batch = pictures(client, prompt)
    inputs_of(prompt, "EmptyLatentImage")["batch_size"] = 1
    difference = (batch[:1] - pictures(client, prompt)).abs().max()
    # The noise is the same; products in a batch round differently, by one grey level at most.
    assert difference < 2.5 / 255


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_it_says_where_its_files_come_from(path):
    for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
        values = [value for value in node.get("widgets_values") or [] if isinstance(value, str)]
        named = {value for value in values if value.endswith(".safetensors")}
        models = node["properties"].get("models", [])
        assert {model["name"] for model in models} == named
        for model in models:
            assert model["url"].startswith("https://huggingface.co/")
            assert model["directory"] in FOLDERS
