"""A small SD1.5-type model with random weights, and one LoRA for it in every key dialect."""

from __future__ import annotations

import torch

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "use_spatial_transformer": True,
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "transformer_depth_middle": -2,
    "context_dim": 768,
    "num_heads": 8,
    "num_head_channels": -1,
    "legacy": False,
}
KINDS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
KINDS += ("conv1", "conv2", "conv_shortcut", "time_emb_proj")


Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""up and down by diffusers' path"""


def tiny_model():
    """A ModelPatcher as the host's checkpoint loader makes it: one level, no middle block.

    Its weights lie on the CPU, also where the host loads models directly to a GPU, so that tests
    can compare them with tensors of their own.
    """
    import comfy.ops
    import comfy.sd
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    torch.manual_seed(0)
    unet = UNetModel(**UNET, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    weights = {
        f"model.diffusion_model.{key}": 0.02 * torch.randn(tensor.shape)
        for key, tensor in unet.state_dict().items()
    }
    # The host asks for a text encoder's name; without its weights the CLIP is None.
    patcher = comfy.sd.load_state_dict_guess_config(weights, output_vae=False, output_clip=False)[0]
    patcher.model.to("cpu")
    return patcher


def modules(model) -> dict[str, str]:
    """Modules that an LCM-LoRA adapts: diffusers' path to the host's, both with dots."""
    import comfy.utils

    there = model.model.state_dict()
    paths = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    return {
        path.removesuffix(".weight"): native.removesuffix(".weight")
        for path, native in paths.items()
        if path.removesuffix(".weight").endswith(KINDS) and f"diffusion_model.{native}" in there
    }


def some_layers(model) -> dict[str, str]:
    """Keys of weights by diffusers' paths: a square one, a wide and a tall one, convolutions."""
    ends = ("attn1.to_q", "attn2.to_k", "ff.net.0.proj", "ff.net.2", "proj_in", "resnets.0.conv1")
    native = modules(model)
    paths = [next(path for path in native if path.endswith(end)) for end in ends]
    return {path: f"diffusion_model.{native[path]}.weight" for path in paths}


def factors(model, rank: int = 4, seed: int = 0) -> Pairs:
    """Random factors for every module."""
    generator = torch.Generator().manual_seed(seed)
    there, pairs = model.model.state_dict(), {}
    for path, native in modules(model).items():
        out, columns, *kernel = there[f"diffusion_model.{native}.weight"].shape
        ones = [1] * len(kernel)
        up = torch.randn(out, rank, *ones, generator=generator) * 0.1
        pairs[path] = up, torch.randn(rank, columns, *kernel, generator=generator) * 0.1
    return pairs


def dialects(model, rank: int = 4, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """The same LoRA, scale 1, as the tools of the field write it."""
    return dialects_of(factors(model, rank, seed), modules(model))


def dialects_of(pairs: Pairs, native: dict[str, str]) -> dict[str, dict[str, torch.Tensor]]:
    """The same, of these factors; native: the host's path by diffusers' path."""
    files: dict[str, dict[str, torch.Tensor]] = {}

    def put(dialect: str, up_key: str, up: torch.Tensor, down_key: str, down: torch.Tensor):
        files.setdefault(dialect, {}).update({up_key: up, down_key: down})

    for path, (up, down) in pairs.items():
        kohya, host = path.replace(".", "_"), native[path]
        for dialect, name in {
            "kohya": f"lora_unet_{kohya}",
            "kohya native": f"lora_unet_{host.replace('.', '_')}",
            "native": f"diffusion_model.{host}",
        }.items():
            put(dialect, f"{name}.lora_up.weight", up, f"{name}.lora_down.weight", down)
            files[dialect][f"{name}.alpha"] = torch.tensor(float(down.shape[0]))
        for dialect, name in {
            "diffusers": f"unet.{path}",
            "peft": f"base_model.model.{path}",
        }.items():
            put(dialect, f"{name}.lora_B.weight", up, f"{name}.lora_A.weight", down)
        old = f"unet.{path}".replace(".to_", ".processor.to_").replace("to_out.0", "to_out")
        put("old", f"{old}_lora.up.weight", up, f"{old}_lora.down.weight", down)
    return files


def patched_weights(model) -> dict[str, torch.Tensor]:
    """Every patched weight, computed by the host."""
    import comfy.lora

    there = model.model.state_dict()
    return {
        key: comfy.lora.calculate_weight(patches, there[key].float().clone(), key)
        for key, patches in model.patches.items()
    }
