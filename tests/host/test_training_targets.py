"""The layers an LCM-LoRA has, counted on the host's own networks: those of the official files."""

import json
from math import prod

import pytest
from lcm_lora.dev.bench.networks import ARCHITECTURES, host_unet
from lcm_lora.tests.host.flow_models import flow_model
from lcm_lora.tests.host.test_training_flow_classes import CHANGES, CLASSES

OFFICIAL = {"SD1.5": (278, 67.25), "SSD-1B": (423, 104.90), "SDXL": (788, 196.75)}


@pytest.mark.parametrize("family", OFFICIAL)
def test_modules_and_parameters_are_those_of_the_official_files(comfy, family):
    from lcm_lora.training.adapter import Adapter
    from lcm_lora.training.export import vector

    modules, millions = OFFICIAL[family]
    network = host_unet(ARCHITECTURES[family], "meta")
    adapter = Adapter(network, rank=1, alpha=64.0)  # its size is linear in the rank
    assert len(adapter.names) == modules
    count = 64 * sum(p.numel() for p in adapter.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)
    adapter.layers.to_empty(device="cpu")  # the network is a shape only; its names are wanted
    named = vector(adapter.state(), adapter.alpha, {}, family)
    assert len(named.deltas) == modules
    assert all(name.startswith("lora_unet_") for name in named.deltas)
    assert "lora_unet_down_blocks_1_attentions_0_proj_in" in named.deltas
    assert {delta.alpha for delta in named.deltas.values()} == {64.0}


def hollow(path, network, prefix="model.diffusion_model."):
    """A file with the network's shapes, whose weights take no room on the disk."""
    header, end = {}, 0
    for name, weight in network.state_dict().items():
        begin, end = end, end + prod(weight.shape)
        header[f"{prefix}{name}"] = {
            "dtype": "F8_E4M3", "shape": list(weight.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.mark.parametrize(("family", "side"), [("SD1.5", 512), ("SSD-1B", 1024), ("SDXL", 1024)])
def test_the_header_of_a_checkpoint_tells_the_same(comfy, tmp_path, family, side):
    from lcm_lora.training.checkpoint_file import CheckpointFile

    network = host_unet(ARCHITECTURES[family], "meta")
    file = CheckpointFile.read(hollow(tmp_path / "c.safetensors", network))
    assert (file.architecture, file.resolution) == (family, side)
    assert file.lora_parameters(64) / 1e6 == pytest.approx(OFFICIAL[family][1], abs=0.005)


FLOW = {"Wan": 640}  # what is not made for 1024 pixels


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "", "net."])
@pytest.mark.parametrize("kind", CLASSES)
def test_the_header_of_a_flow_model_tells_what_the_host_finds(comfy, tmp_path, kind, prefix):
    from lcm_lora.lora.weights.host import detect
    from lcm_lora.training.adapter import OF_BLOCKS, Adapter
    from lcm_lora.training.checkpoint_file import CheckpointFile

    patcher = flow_model(kind, device="meta", **CHANGES.get(kind, {}))
    network = patcher.model.diffusion_model
    file = CheckpointFile.read(hollow(tmp_path / "c.safetensors", network, prefix))
    assert file.architecture == detect(patcher).name
    assert file.resolution == FLOW.get(file.architecture, 1024)
    format_ = patcher.model.latent_format
    latents = format_.latent_channels, format_.spacial_downscale_ratio
    assert (file.latent_channels, file.shrink) == latents
    embedded = getattr(getattr(network, "params", None), "guidance_embed", False)
    assert file.guided_calls == (1 if embedded else 2)
    adapter = Adapter(network, rank=1, alpha=1.0, targets=OF_BLOCKS)
    parameters = sum(p.numel() for p in adapter.parameters())
    assert file.lora_parameters(1) == parameters
    weights = sum(p.numel() for p in network.state_dict().values())
    assert file.step_bytes(1, 512, "bf16") > 2 * weights + 16 * parameters
    assert file.step_bytes(1, 512, "bf16") - file.step_bytes(1, 512, "auto") == weights  # fp8
    assert file.text_numbers % file.width in (0, file.flow.pooled % file.width)
