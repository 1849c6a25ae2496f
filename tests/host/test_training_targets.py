"""The layers an LCM-LoRA has, counted on the host's own networks: those of the official files."""

import json
from math import prod

import pytest
from lcm_lora.dev.bench.networks import ARCHITECTURES, host_unet

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


def hollow(path, network):
    """A checkpoint file with the network's shapes, whose weights take no room on the disk."""
    header, end = {}, 0
    for name, weight in network.state_dict().items():
        begin, end = end, end + prod(weight.shape)
        header[f"model.diffusion_model.{name}"] = {
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
