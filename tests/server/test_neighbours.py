"""With other packs installed, each pack does what it does alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lcm_lora.tests.server.pages import new_page
from lcm_lora.tests.server.test_workflows import FOLDER, fitted, inputs_of, pictures

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE.parent / "golden" / "nodes.json").read_text(encoding="utf-8"))
# From comfyui-tooling-nodes and ComfyUI_Ib_CustomNodes, which are complete on PyPI.
KNOWN = """
comfyui-tooling-nodes==0.1.0 \
    --hash=sha256:a67723c739a75f167c1c6ec02e6179f70a023afab4ec96b1165018bc011a4e7a
comfyui-ib-customnodes==0.2.3 \
    --hash=sha256:b07597426ec895d98a8e4a5865857b69d6c64238da989431125e921ff564e8a9
"""


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> list[Path]:
    """The folders of well-known packs; none where no packages can be fetched."""
    scratch = tmp_path_factory.mktemp("known")
    (scratch / "known.txt").write_text(KNOWN, encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:",
         "--retries", "1", "--timeout", "20", "--target", scratch / "packs",
         "-r", scratch / "known.txt"],
    )  # fmt: skip
    return [path.parent for path in (scratch / "packs").glob("*/__init__.py")]


@pytest.fixture(scope="module")
def beside(host_folder, server, tmp_path_factory, known):
    """A client of a server with the toy, our pack, two that make the same calls of ComfyUI as
    well-known ones do, and well-known ones."""
    from lcm_lora.dev.server import Server, install

    made = Server(host_folder, tmp_path_factory.mktemp("beside"))
    for pack in (*(HERE / "neighbours").iterdir(), *known):
        shutil.copytree(pack, made.base / "custom_nodes" / pack.name)
    for kind in ("checkpoints", "loras"):
        for file in (server.base / "models" / kind).glob("demo-*"):
            install(file.resolve(), made.base / "models" / kind)
    with made:
        yield made.client()


@pytest.fixture
def prompt(subject):
    return fitted(FOLDER / "1 Text to image (SD1.5).json", subject)


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
    """It equals ComfyUI's own Euler, because it calls it."""
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


@pytest.mark.usefixtures("network")
def test_well_known_packs_do_what_they_do(beside, known):
    assert len(known) == 2
    assert {"ETN_CropImage", "LoadImageFromPath"} <= beside.get("/object_info").keys()
    assert "error" not in beside.get("/etn/model_info")


# This comes last, because nothing else can run while there is a browser.
def test_both_pages_are_there(browser, beside):
    page = new_page(browser, beside)
    assert page.evaluate("document.body.dataset.neighbour") == "here"
    assert page.evaluate("app.extensions.some((each) => each.name === 'lcmlora.jobs')")
    assert not page.wrong and not page.foreign
    page.context.close()
