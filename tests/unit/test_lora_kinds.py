"""Files that are no LoRA for a model are called what they are, by keys of real files."""

from __future__ import annotations

import pytest
import torch
from lcm_lora.lora.formats.files import read
from lcm_lora.lora.formats.kinds import left_out_because
from safetensors.torch import save_file


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("lora_controlnet input_blocks.1.0.emb_layers.1.up", "a Control-LoRA"),
        ("controlnet_cond_embedding.conv_in.weight down_blocks.0.resnets.0.conv1.weight",
         "a ControlNet"),
        ("control_model.input_blocks.0.0.weight", "a ControlNet"),
        ("zero_convs.0.0.weight input_blocks.0.0.weight", "a ControlNet"),
        ("controlnet_blocks.0.weight transformer_blocks.0.attn.to_q.weight", "a ControlNet"),
        ("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight",
         "a ControlNet-LLLite"),
        ("body.0.in_conv.weight conv_in.weight", "a T2I-Adapter"),
        ("body.0.resnets.0.block1.weight", "a T2I-Adapter"),
        ("image_proj.proj.weight ip_adapter.1.to_k_ip.weight", "an IP-Adapter"),
        ("down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight", "AnimateDiff"),
        ("model.diffusion_model.input_blocks.0.0.weight cond_stage_model.x", "a whole checkpoint"),
        ("conditioner.embedders.0.transformer.text_model.x", "a whole checkpoint"),
        ("down_blocks.0.resnets.0.conv1.weight", "a whole UNet"),
        ("input_blocks.0.0.weight", "a whole UNet"),
        ("double_blocks.0.img_attn.qkv.weight double_blocks.0.img_attn.norm.key_norm.scale",
         "a whole diffusion model"),
        ("blocks.0.cross_attn.k.weight", "a whole diffusion model"),
        ("decoder.conv_in.weight", "a VAE"),
        ("encoder.down_blocks.0.resnets.0.conv1.weight", "a VAE"),
        ("taesd_decoder.1.weight", "a VAE"),
        ("1.weight 3.conv.0.weight", "a VAE"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a text encoder"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight shared.weight", "a text encoder"),
        ("model.layers.0.self_attn.q_proj.weight", "a text encoder"),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", "a CLIP vision model"),
        ("redux_up.weight", "a style model"),
        ("conv_first.weight body.0.rdb1.conv1.weight", "an upscaler"),
        ("model.0.weight model.1.sub.0.RDB1.conv1.0.weight", "an upscaler"),
        ("layers.0.residual_group.blocks.0.attn.qkv.weight", "an upscaler"),
        ("emb_params", "an embedding"),
        ("clip_g clip_l", "an embedding"),
        ("<cat-toy>", "an embedding"),
        ("bundle_emb.cat.clip_l", "an embedding"),
        ("some.thing", "its 1 keys are unknown, such as some.thing"),
    ],
)  # fmt: skip
def test_a_file_without_a_lora_is_called_what_it_is(tmp_path, keys, words):
    save_file({key: torch.ones(2) for key in keys.split()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"^a.safetensors holds no LoRA: .*{words}"):
        read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("module", "more", "words"),
    [
        ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.norm.key_norm.scale", "FLUX"),
        ("down_blocks.0.motion_modules.0.temporal_transformer.proj_in", "", "AnimateDiff"),
        ("0.to_q_lora", "", "IP-Adapter"),
        ("double_blocks.0.processor.qkv_lora", "", "FLUX in the layout of XLabs"),
    ],
)
def test_factors_for_something_else_are_not_taken_for_a_lora(tmp_path, module, more, words):
    up, down = (".up.weight", ".down.weight") if "_lora" in module else (".lora_B", ".lora_A")
    tensors = {f"{module}{up}": torch.ones(4, 2), f"{module}{down}": torch.ones(2, 4)}
    save_file(tensors | ({more: torch.ones(2)} if more else {}), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=f"^a.safetensors holds no LoRA for a model.*{words}"):
        read(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("bundle_emb.cat.clip_l", "an embedding"),
        ("lora_unet_conv_in.alpha", "an alpha without factors"),
        ("unet.conv_in.weight", "a whole weight"),
        ("x", "unknown key"),
    ],
)
def test_what_is_left_out_of_a_lora_has_a_reason(key, words):
    assert words in left_out_because(key)
