"""A training that starts from a LoRA file, against the host's own reading of that file."""

import json
from pathlib import Path

import pytest
import torch
from lcm_lora.lora.formats import files
from lcm_lora.training.adapter import Adapter
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def teacher(comfy, toy_checkpoint):
    from lcm_lora.training.host import load_teacher

    return load_teacher(Path(toy_checkpoint))


@pytest.fixture(scope="module")
def lcm(comfy):
    """The demo's LCM-LoRA, with the names of diffusers."""
    from lcm_lora.dev.toy import assemble

    return assemble.lora(assemble.LCM_LORA)


@pytest.fixture
def started(teacher):
    """started(file, rank, alpha) -> (the adapter's changes by layer, dense, the adapter)."""
    from lcm_lora.training.start import start_from

    made = []

    def start(file, rank, alpha):
        adapter = Adapter(teacher.network, rank, alpha, 3)
        made.append(adapter)
        start_from(adapter, teacher, file)
        changes = {
            name: (up.flatten(1) @ down.flatten(1)) * alpha / rank
            for name, up, down in adapter.tensors()
        }
        return changes, adapter

    yield start
    for adapter in made:
        adapter.detach()


def of_host(teacher, file):
    """The dense changes of a file, by layer, as the host adds them."""
    import comfy.lora

    patcher = teacher._patcher
    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    patches = comfy.lora.load_lora(load_file(file), keys)
    changes = {}
    for key, patch in patches.items():
        weight = torch.zeros_like(comfy.utils.get_attr(patcher.model, key), dtype=torch.float32)
        patched = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], weight, key)
        changes[key.removeprefix("diffusion_model.").removesuffix(".weight")] = patched.flatten(1)
    return changes


def distance(a, b):
    return float((a - b).norm() / b.norm())


def test_a_larger_rank_takes_the_file_as_it_is(teacher, lcm, started):
    theirs = of_host(teacher, lcm)
    changes, adapter = started(lcm, 28, 14.0)
    assert changes.keys() == theirs.keys()
    assert max(distance(changes[name], theirs[name]) for name in theirs) < 1e-5
    # The ranks that the file does not have can still learn.
    fresh = Adapter(teacher.network, 28, 14.0, 3)
    fresh.detach()
    pairs = zip(adapter.tensors(), fresh.tensors(), strict=True)
    assert all(torch.equal(ours[2][24:], new[2][24:]) for ours, new in pairs)


def test_a_smaller_rank_takes_the_largest_singular_values(teacher, lcm, started, caplog):
    theirs = of_host(teacher, lcm)
    with caplog.at_level("INFO", "lcm_lora"):
        changes, _ = started(lcm, 5, 5.0)
    for name in list(theirs)[::7]:
        u, s, v = torch.linalg.svd(theirs[name].double(), full_matrices=False)
        best = (u[:, :5] * s[:5]) @ v[:5]
        assert distance(changes[name].double(), best) < 1e-4, name
    assert "of its energy at rank 5" in caplog.text


def rewritten(lcm, file, change=lambda key, tensor: tensor, more=None, **metadata):
    tensors = {key: change(key, tensor) for key, tensor in load_file(lcm).items()}
    save_file(tensors | (more or {}), file, {**files.read(lcm).metadata, **metadata})
    return file


def zeros(key, tensor):
    return torch.zeros_like(tensor) if key.endswith("lora_up.weight") else tensor


MIDDLE = "lora_unet_mid_block_attentions_0_proj_in"
FOREIGN = {
    "lora_unet_time_embedding_linear_1.lora_up.weight": torch.ones(1280, 1),
    "lora_unet_time_embedding_linear_1.lora_down.weight": torch.ones(1, 320),
}
CASES = {
    "a style in it": (
        {"lcm_lora.style_loras": json.dumps([["ink.safetensors", 0.8]])},
        "contains the style ink.safetensors",
    ),
    "all zero": ({"change": zeros}, "is zero in every layer"),
    "DoRA": ({"more": {f"{MIDDLE}.dora_scale": torch.ones(1)}}, "DoRA|dora"),
    "a bias": ({"more": {f"{MIDDLE}.diff_b": torch.ones(1)}}, "left over|other changes"),
    "layers that are not trained": ({"more": FOREIGN}, "does not train|left over"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_it_cannot_start_from(lcm, started, tmp_path, case):
    change, message = CASES[case]
    file = rewritten(lcm, tmp_path / "start.safetensors", **change)
    with pytest.raises(ValueError, match=message):
        started(file, 4, 4.0)


def test_a_lora_of_another_architecture_is_named(started, tmp_path):
    module = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    parts = {"lora_up.weight": torch.ones(640, 2), "lora_down.weight": torch.ones(2, 2048)}
    save_file(
        {f"{module}.{part}": tensor for part, tensor in parts.items()}, tmp_path / "xl.safetensors"
    )
    with pytest.raises(ValueError, match="made for SDXL.*the model is SD1.5"):
        started(tmp_path / "xl.safetensors", 4, 4.0)


def test_a_missing_file_is_named(started, tmp_path):
    with pytest.raises(ValueError, match="there is no LoRA .*gone.safetensors"):
        started(tmp_path / "gone.safetensors", 4, 4.0)
