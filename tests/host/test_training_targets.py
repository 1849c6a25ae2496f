"""The layers an LCM-LoRA has, counted on the host's own networks: those of the official files."""

import pytest
import torch

SD = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320,
    "use_spatial_transformer": True, "legacy": False,
}  # fmt: skip
SDXL = SD | {
    "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "context_dim": 2048,
    "use_linear_in_transformer": True, "num_head_channels": 64, "num_classes": "sequential",
    "adm_in_channels": 2816,
}  # fmt: skip
FAMILIES = {
    "SD1.5": (278, 67.25, SD | {
        "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "context_dim": 768,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "num_heads": 8,
        "num_head_channels": -1,
    }),
    "SSD-1B": (423, 104.90, SDXL | {
        "transformer_depth": [0, 0, 2, 2, 4, 4], "transformer_depth_middle": -1,
        "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4],
    }),
    "SDXL": (788, 196.75, SDXL | {
        "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    }),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_and_parameters_are_those_of_the_official_files(comfy, family):
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from lcm_lora.training.adapter import Adapter
    from lcm_lora.training.export import vector

    modules, millions, config = FAMILIES[family]
    with torch.device("meta"):
        network = UNetModel(
            **config, dtype=torch.float32, operations=comfy.ops.disable_weight_init, device="meta"
        )
    adapter = Adapter(network, rank=1, alpha=64.0)  # its size is linear in the rank
    assert len(adapter.names) == modules
    count = 64 * sum(p.numel() for p in adapter.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)
    adapter.layers.to_empty(device="cpu")  # the network is a shape only; its names are wanted
    named = vector(adapter, {}, family)
    assert len(named.deltas) == modules
    assert all(name.startswith("lora_unet_") for name in named.deltas)
    assert "lora_unet_down_blocks_1_attentions_0_proj_in" in named.deltas
    assert {delta.alpha for delta in named.deltas.values()} == {64.0}
