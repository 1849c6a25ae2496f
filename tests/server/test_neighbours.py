"""Beside other packs: each does what it does alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lcm_lora.tests.server.pages import new_page
from lcm_lora.tests.server.test_workflows import FOLDER, fitted, inputs_of, pictures

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE.parent / "golden" / "nodes.json").read_text(encoding="utf-8"))
PACKS = HERE / "neighbours"


@pytest.fixture(scope="module")
def beside(host_folder, server, tmp_path_factory):
    """A client of a server with the toy, our pack, and two that do as well-known ones do."""
    from lcm_lora.dev.server import Server, install

    made = Server(host_folder, tmp_path_factory.mktemp("beside"))
    for pack in PACKS.iterdir():
        shutil.copytree(pack, made.base / "custom_nodes" / pack.name)
    for kind in ("checkpoints", "loras"):
        for file in (server.base / "models" / kind).glob("toy-*"):
            install(file.resolve(), made.base / "models" / kind)
    with made:
        yield made.client()


@pytest.fixture
def prompt(subject):
    return fitted(FOLDER / "LCM-LoRA_text_to_image.json", subject)


def test_all_nodes_are_listed(beside):
    assert GOLDEN.keys() | {"NeighbourScale", "NeighbourNote"} <= beside.get("/object_info").keys()


def test_the_picture_is_the_same(beside, client, prompt):
    assert torch.equal(pictures(beside, prompt), pictures(client, prompt))
    assert beside.get("/neighbour/prompts")["seen"] >= 1


def test_its_patch_takes_part_on_either_side_of_ours(beside, prompt):
    plain = pictures(beside, prompt)
    sampler = inputs_of(prompt, "LCMKSampler")
    loader = inputs_of(prompt, "LCMLoRALoader")
    for inputs in (loader, sampler):
        theirs = {"model": inputs["model"], "scale": 0.8}
        prompt["theirs"] = {"class_type": "NeighbourScale", "inputs": theirs}
        inputs["model"] = ["theirs", 0]
        scaled = pictures(beside, prompt)
        inputs["model"] = theirs["model"]
        assert (scaled - plain).abs().mean() > 0.01
        theirs["scale"] = 1.0
        inputs["model"] = ["theirs", 0]
        assert torch.equal(pictures(beside, prompt), plain)
        inputs["model"] = theirs["model"]


def test_its_sampler_takes_our_model(beside, prompt):
    """As ComfyUI's own Euler does, for that is what it is."""
    (key,) = (key for key, node in prompt.items() if node["class_type"] == "LCMKSampler")
    ours = prompt[key]["inputs"]
    shared = ("model", "seed", "steps", "cfg", "positive", "negative", "denoise")
    drawn = []
    for sampler, scheduler in (("neighbour", "neighbour"), ("euler", "normal")):
        inputs = {name: ours[name] for name in shared} | {
            "latent_image": ours["latent"], "sampler_name": sampler, "scheduler": scheduler,
        }  # fmt: skip
        prompt[key] = {"class_type": "KSampler", "inputs": inputs}
        drawn.append(pictures(beside, prompt))
    assert torch.equal(*drawn)


def test_both_pages_are_there(browser, beside):
    page = new_page(browser, beside)
    assert page.evaluate("document.body.dataset.neighbour") == "here"
    assert page.evaluate("app.extensions.some((each) => each.name === 'lcmlora.jobs')")
    assert not page.wrong and not page.foreign
    page.context.close()
