"""Bad files and settings over HTTP: a clear error at the node, and the next prompt works."""

import pytest
import torch
from safetensors.torch import load_file, save_file


def loading(subject, lora: str, **changes) -> dict:
    inputs = {"model": ["1", 0], "lora_name": lora, "strength": 1.0, "family": "auto"}
    sample = {
        "model": ["2", 0], "seed": 1, "steps": 1, "cfg": 1.0, "positive": ["3", 0],
        "negative": ["3", 0], "latent": ["4", 0], "denoise": 1.0,
    }  # fmt: skip
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": subject.checkpoint}},
        "2": {"class_type": "LCMLoRALoader", "inputs": inputs},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "a bag"}},
        "4": {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1},
        },
        "5": {"class_type": "LCMKSampler", "inputs": sample | changes},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {
            "class_type": "SaveImage",
            "inputs": {"images": ["6", 0], "filename_prefix": "after"},
        },
    }


def saving(name: str, lora: str, overwrite: bool = False) -> dict:
    inputs = {"vector": ["1", 0], "filename": name, "dtype": "fp16", "overwrite": overwrite}
    return {
        "1": {"class_type": "LCMLoRAVectorLoader", "inputs": {"lora_name": lora}},
        "2": {"class_type": "LCMLoRASave", "inputs": inputs},
    }


@pytest.fixture
def loras(server):
    return server.base / "models" / "loras"


def broken(kind: str, good) -> bytes | dict[str, torch.Tensor]:
    content = good.read_bytes()
    if kind == "empty":
        return b""
    if kind == "truncated":
        return content[: len(content) // 2]
    if kind == "pickle":
        return b"\x80\x04" + content[:100]
    if kind == "text":
        return b"<html>404 not found</html>" * 20
    tensors = load_file(good)
    first = next(name for name in tensors if name.endswith("lora_down.weight"))
    module = first.removesuffix(".lora_down.weight")
    if kind == "nan alpha":
        tensors[f"{module}.alpha"] = torch.tensor(float("nan"))
    elif kind == "rank 0":
        tensors[first] = tensors[first][:0]
    elif kind == "shapes":
        tensors[first] = tensors[first][1:]
    elif kind == "family":
        width = "attn2_to_k.lora_down.weight"
        name = next(name for name in tensors if name.endswith(width))
        rank = tensors[name].shape[0]
        tensors = {
            key: torch.zeros(rank, 2048) if key.endswith(width) else tensor
            for key, tensor in tensors.items()
        }
    return tensors


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("empty", "is empty"),
        ("truncated", "not a complete safetensors file"),
        ("pickle", "is a pickle"),
        ("text", "is a web page"),
        ("nan alpha", "its alpha is nan"),
        ("rank 0", "rank"),
        ("shapes", "do not multiply"),
        ("family", "was made for SDXL"),
    ],
)
def test_a_bad_file_is_named_and_the_next_prompt_works(kind, says, client, subject, server, loras):
    from lcm_lora.dev.client import PromptError
    from lcm_lora.dev.toy import assemble

    name = f"bad {kind}.safetensors"
    content = broken(kind, assemble.lora(assemble.STICKER_LORA))
    if isinstance(content, bytes):
        (loras / name).write_bytes(content)
    else:
        save_file(content, loras / name)
    with pytest.raises(PromptError, match=says) as error:
        client.run(loading(subject, name))
    assert error.value.node == "2"
    assert f"bad {kind}" in str(error.value)
    assert server.alive()
    assert client.pictures(client.run(loading(subject, subject.lcm_lora)))["7"][0].is_file()


def test_steps_over_the_grid(client, subject):
    from lcm_lora.dev.client import PromptError

    with pytest.raises(PromptError, match="30 steps do not fit.*25 of the 50") as error:
        client.run(loading(subject, subject.lcm_lora, steps=30, denoise=0.5))
    assert error.value.node == "5"


@pytest.mark.parametrize("name", ["../escaped", "/etc/escaped", "a/../../escaped", "", "CON"])
def test_a_name_outside_the_folder(name, client, subject, loras):
    from lcm_lora.dev.client import PromptError

    before = sorted(loras.parent.parent.rglob("*escaped*"))
    with pytest.raises(PromptError, match="cannot be used"):
        client.run(saving(name, subject.style_lora))
    assert sorted(loras.parent.parent.rglob("*escaped*")) == before


def test_a_saved_lora_is_offered_at_once_and_an_overwritten_one_is_loaded_anew(
    client, subject, loras
):
    from lcm_lora.dev.client import PromptError

    client.run(saving("fresh", subject.style_lora))
    listed = client.get("/object_info/LCMLoRALoader")["LCMLoRALoader"]["input"]["required"]
    options = listed["lora_name"][0]
    options = options if isinstance(options, list) else listed["lora_name"][1]["options"]
    assert "fresh.safetensors" in options
    with pytest.raises(PromptError, match="exists already"):
        client.run(saving("fresh", subject.lcm_lora))
    prompt = loading(subject, "fresh.safetensors")
    before = client.pictures(client.run(prompt))["7"][0].read_bytes()
    client.run(saving("fresh", subject.lcm_lora, overwrite=True))
    prompt["7"]["inputs"]["filename_prefix"] = "anew"
    after = client.pictures(client.run(prompt))["7"][0].read_bytes()
    assert before != after
    assert not list(loras.glob(".*.tmp"))
