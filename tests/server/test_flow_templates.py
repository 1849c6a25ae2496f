"""The shipped workflows of flow models, run whole by a real server on small random networks.

The networks, the LoRAs and the VAE are read by ComfyUI's own loaders. The text encoders are not
those of the models: a CLIP-L has their names, and Flux's second one is left out.
"""

import copy
import json
import shutil
from pathlib import Path

import pytest
from lcm_lora.dev.client import PromptError
from lcm_lora.tests.server.flow_files import lay_out
from lcm_lora.tests.server.test_workflows import FLOW, images, inputs_of, pictures

HERE = Path(__file__).parent
SIDE = 64
# By the end of a workflow's name: its LoRAs with their strengths, a shift that is not the model's
# own, and what the nodes say.
EXPECTED = {
    "(Qwen-Image)": (
        {"Qwen-Image-Lightning-4steps-V1.0.safetensors": 1.0, "gummycandy_qwen.safetensors": 1.0},
        3.0,
        {
            "LCMLoRAStack": [
                "qwen-lightning; LoRAs applied: 2",
                "1 x Qwen-Image-Lightning-4steps-V1.0: 34 of 34 modules",
                "1 x gummycandy_qwen: 34 of 34 modules",
                "from the name Qwen-Image-Lightning-4steps-V1.0.safetensors",
                "shift 3, as the LoRA's authors use it",
            ],
            "LCMKSampler": [
                "qwen-lightning, 4 steps: 1 0.9 0.75 0.5; cfg 1, negative prompt unused"
            ],
        },
    ),
    "(Z-Image)": (
        {"pixel_art_style_z_image_turbo.safetensors": 1.0},
        None,
        {
            "LCMLoRAApply": ["40 of 40 modules applied"],
            "LCMModelSampling": [
                "flow: no LoRA on the MODEL sets a family",
                "the model's own shift: flow sets none",
            ],
            "LCMKSampler": [
                "flow, 8 steps: 1 0.955 0.9 0.833 0.75 0.643 0.5 0.3; cfg 1, negative prompt unused"
            ],
        },
    ),
    "(Flux)": (
        {
            "Hyper-FLUX.1-dev-8steps-lora.safetensors": 0.125,
            "flux_dev_frostinglane_araminta_k.safetensors": 1.0,
        },
        None,
        {
            "LCMLoRAStack": [
                "hyper-flux; LoRAs applied: 2",
                "0.125 x Hyper-FLUX.1-dev-8steps-lora: 44 of 44 modules",
                "1 x flux_dev_frostinglane_araminta_k: 36 of 36 modules",
                "from the name Hyper-FLUX.1-dev-8steps-lora.safetensors",
                "the model's own shift: hyper-flux sets none",
            ],
            "LCMKSampler": [
                "hyper-flux, 8 steps: 1 0.957 0.905 0.84 0.76 0.655 0.513 0.311; cfg 1, negative "
                "prompt unused"
            ],
        },
    ),
}


@pytest.fixture(scope="module")
def drawing(host_folder, server, tmp_path_factory):
    """A client of a server with the small networks."""
    from lcm_lora.dev.server import Server

    made = Server(host_folder, tmp_path_factory.mktemp("flow"))
    shutil.copytree(HERE / "small_networks", made.base / "custom_nodes" / "small_networks")
    lay_out(made.base)
    with made:
        yield made.client()


def small(path: Path) -> dict:
    """The workflow as an API prompt, in the size of the networks."""
    from lcm_lora.dev.workflow import to_api

    prompt = to_api(json.loads(path.read_text(encoding="utf-8")))
    inputs_of(prompt, "EmptySD3LatentImage").update(width=SIDE, height=SIDE)
    for node in prompt.values():
        if node["class_type"] == "DualCLIPLoader":  # its T5 has a fixed size
            clip = {"clip_name": node["inputs"]["clip_name1"], "type": "stable_diffusion"}
            node |= {"class_type": "CLIPLoader", "inputs": clip}
    return prompt


def key_of(prompt: dict, kind: str) -> str:
    (key,) = (key for key, node in prompt.items() if node["class_type"] == kind)
    return key


def by_the_host(prompt: dict, loras: dict[str, float], shift: float | None) -> dict:
    """The same picture by ComfyUI's own nodes."""
    prompt = copy.deepcopy(prompt)
    model = [key_of(prompt, "UNETLoader"), 0]
    for name, strength in loras.items():
        inputs = {"model": model, "lora_name": name, "strength_model": strength}
        prompt[name] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
        model = [name, 0]
    if shift is not None:
        inputs = {"model": model, "shift": shift}
        prompt["shift"] = {"class_type": "ModelSamplingAuraFlow", "inputs": inputs}
        model = ["shift", 0]
    sampler = prompt[key_of(prompt, "LCMKSampler")]
    inputs = sampler["inputs"] | {
        "model": model, "latent_image": sampler["inputs"]["latent"], "sampler_name": "euler",
        "scheduler": "simple",
    }  # fmt: skip
    del inputs["latent"]
    sampler |= {"class_type": "KSampler", "inputs": inputs}
    for node in prompt.values():
        if node["class_type"] == "CLIPTextEncode":
            node["inputs"]["clip"] = [key_of(prompt, "CLIPLoader"), 0]
    return {key: node for key, node in prompt.items() if not node["class_type"].startswith("LCM")}


def without_style(prompt: dict) -> dict:
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        for name in {"count.weight_1", "strength_model"} & node["inputs"].keys():
            node["inputs"][name] = 0.0
    return prompt


@pytest.mark.parametrize("path", FLOW, ids=lambda path: path.stem)
def test_it_draws_what_the_hosts_own_nodes_draw(path, drawing):
    loras, shift, says = EXPECTED[path.stem.rpartition(" ")[2]]
    prompt = small(path)
    shown = drawing.run(prompt)
    (files,) = drawing.pictures(shown).values()
    drawn = images(files)
    assert drawn.shape == (1, 3, SIDE, SIDE) and drawn.std() > 0.01
    expected = pictures(drawing, by_the_host(prompt, loras, shift))
    said = {
        prompt[key]["class_type"]: [
            text.format(**values) for text, values, _ in ui["lcm_lora_text"]
        ]
        for key, ui in shown.items()
        if "lcm_lora_text" in ui
    }
    assert (drawn - expected).abs().max() < 1.5 / 255
    assert (pictures(drawing, without_style(prompt)) - drawn).abs().mean() > 0.01
    assert said == says


def test_a_lora_for_another_model_is_refused_by_both_names(drawing):
    qwen, _, flux = (small(path) for path in FLOW)
    hyper = inputs_of(flux, "LCMLoRAStack")["lora_name"]
    inputs_of(qwen, "LCMLoRAStack")["lora_name"] = hyper
    with pytest.raises(PromptError, match=f"{hyper} was made for Flux .* the model is Qwen-Image"):
        drawing.run(qwen)
