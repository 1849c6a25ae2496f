"""Every weight that the host can patch is found by every name that the field has for it: on the
host's own text encoders and UNets, whose shapes are real and whose numbers are not there."""

from __future__ import annotations

import random

import pytest
import torch
from lcm_lora.dev.bench.networks import ARCHITECTURES, SDXL
from lcm_lora.tests.host.test_lora_dialects import patcher
from lcm_lora.tests.host.tiny_lora import patched_weights, tiny_model
from safetensors.torch import load_file

KOALA = SDXL | {
    "num_res_blocks": [1, 1, 1], "transformer_depth": [0, 2, 6], "transformer_depth_middle": 6,
    "transformer_depth_output": [0, 0, 2, 2, 6, 6],
}  # fmt: skip
REFINER = SDXL | {
    "num_res_blocks": [2, 2, 2, 2], "model_channels": 384, "channel_mult": [1, 2, 4, 4],
    "context_dim": 1280, "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0],
    "transformer_depth_middle": 4, "adm_in_channels": 2560,
    "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
}  # fmt: skip


UNETS = {**ARCHITECTURES, "KOALA": KOALA, "refiner": REFINER}


def text_model(family: str) -> torch.nn.Module:
    """The host's text encoders of a family, without numbers."""
    from comfy import sd1_clip, sdxl_clip
    from comfy.text_encoders import (
        flux,
        hunyuan_video,
        hydit,
        pixart_t5,
        qwen_image,
        sd2_clip,
        sd3_clip,
        z_image,
    )  # fmt: skip

    kinds = {
        "SD1": sd1_clip.SD1ClipModel, "SD2": sd2_clip.SD2ClipModel,
        "SDXL": sdxl_clip.SDXLClipModel, "refiner": sdxl_clip.SDXLRefinerClipModel,
        "SD3": sd3_clip.SD3ClipModel, "Flux": flux.FluxClipModel,
        "PixArt": pixart_t5.PixArtT5XXL, "HunyuanVideo": hunyuan_video.HunyuanVideoClipModel,
        "HunyuanDiT": hydit.HyditModel, "Qwen-Image": qwen_image.QwenImageTEModel,
        "Z-Image": z_image.ZImageTEModel,
    }  # fmt: skip
    with torch.device("meta"):
        return kinds[family](device="meta", dtype=torch.float16)


# Of each family: its encoders by the host's name, with kohya's prefixes, diffusers' and, where it
# has one, OneTrainer's (OMI).
ENCODERS = {
    "SD1": {"clip_l": (("te_", "te1_"), "text_encoder", "clip_l")},
    "SD2": {"clip_h": (("te_", "te1_"), "text_encoder", "clip_h")},
    "SDXL": {
        "clip_l": (("te_", "te1_"), "text_encoder", "clip_l"),
        "clip_g": (("te2_",), "text_encoder_2", "clip_g"),
    },
    "refiner": {"clip_g": (("te_", "te1_"), "text_encoder", "clip_g")},
    "SD3": {
        "clip_l": (("te_", "te1_"), "text_encoder", "clip_l"),
        "clip_g": (("te2_",), "text_encoder_2", "clip_g"),
        "t5xxl": (("te3_",), "text_encoder_3", "t5"),
    },
    "Flux": {
        "clip_l": (("te_", "te1_"), "text_encoder", "clip_l"),
        "t5xxl": (("te2_", "te3_"), "text_encoder_2", "t5"),
    },
    "PixArt": {"t5xxl": (("te_", "te1_"), "text_encoder", "t5")},
    "HunyuanVideo": {
        "llama": (("te1_",), "text_encoder", "llama"),
        "clip_l": (("te2_",), "text_encoder_2", "clip_l"),
    },
    "HunyuanDiT": {
        "hydit_clip": (("te1_",), "text_encoder", "hydit_clip"),
        "mt5xl": (("te2_",), "text_encoder_2", "mt5xl"),
    },
    "Qwen-Image": {"qwen25_7b": (("te_", "te1_"), "text_encoder", "qwen25_7b")},
    "Z-Image": {"qwen3_4b": (("te_", "te1_"), "text_encoder", "qwen3_4b")},
}
WRAPPERS = ("base_model.model.", "_orig_mod.", "module.", "_fsdp_wrapped_module.")
FLAT_WRAPPERS = ("_orig_mod_", "module_", "base_model_model_")


def spellings(encoder: str, path: str, family: str) -> list[str]:
    """All names of the layer at `path` within an encoder."""
    kohya, diffusers, omi = ENCODERS[family][encoder]
    own = path.removeprefix("bert.")  # a level that only the host has
    names = [f"lora_{prefix}{own.replace('.', '_')}" for prefix in kohya]
    names += [f"text_encoders.{encoder}.transformer.{path}", f"{omi}.{path}", f"{diffusers}.{path}"]
    names += [f"{diffusers}.{wrapper}{path}" for wrapper in WRAPPERS]
    if path.startswith("text_model."):  # a prefix that transformers 5 dropped
        names.append(f"{diffusers}.{path.removeprefix('text_model.')}")
    # The levels that the classes of transformers have: Qwen3Model has none (Comfy-Org/ComfyUI
    # #13747), Qwen3ForCausalLM the first, Qwen2_5_VLForConditionalGeneration the second.
    if path.startswith("model."):
        for level in ("", "model.", "model.language_model."):
            dotted = level + path.removeprefix("model.")
            names += [f"lora_{prefix}{dotted.replace('.', '_')}" for prefix in kohya]
            names.append(f"{diffusers}.{dotted}")
    return names


def assert_none_is_lost(listed: dict, table: dict) -> None:
    """What the host lists under a name is found under the name that a vector gives to it."""
    from lcm_lora.lora.formats.module_names import canonical_names

    for name, target in listed.items():
        if not name.endswith(".bias"):  # `X.bias.diff` is the diff_b of X
            (canonical,) = canonical_names([name]).values()
            assert table.get(canonical) == table[name] == target, name


@pytest.mark.parametrize("family", ENCODERS)
def test_every_weight_of_a_text_encoder_has_all_its_names(comfy, family):
    import comfy.lora
    from lcm_lora.lora.formats.key_endings import split_key
    from lcm_lora.lora.formats.module_names import canonical_names
    from lcm_lora.lora.formats.places import places

    model = text_model(family)
    listed = comfy.lora.model_lora_keys_clip(model, {})
    table = places(listed)
    assert_none_is_lost(listed, table)
    weights = [key for key in model.state_dict() if key.endswith(".weight")]
    assert len(weights) > 50
    for key in weights:
        encoder, _, path = key.removesuffix(".weight").partition(".transformer.")
        for name in spellings(encoder, path, family):
            module, _ = split_key(f"{name}.lora_up.weight")
            (canonical,) = canonical_names([module]).values()
            assert table.get(canonical) == key, name


@pytest.mark.parametrize("family", UNETS)
def test_every_weight_of_a_unet_has_all_its_names(comfy, family):
    """Each name is in its own file, so that only the model shows how its blocks are counted."""
    import comfy.lora
    from lcm_lora.lora.formats.key_endings import split_key
    from lcm_lora.lora.formats.module_names import canonical_names
    from lcm_lora.lora.formats.places import places

    model = patcher(UNETS[family], "meta").model
    listed = comfy.lora.model_lora_keys_unet(model, {})
    table = places(listed)
    assert_none_is_lost(listed, table)
    weights = [key for key in model.state_dict() if key.endswith(".weight")]
    assert len(weights) > 200
    for key in weights:
        path = key.removeprefix("diffusion_model.").removesuffix(".weight")
        names = [f"diffusion_model.{path}", f"model.diffusion_model.{path}", f"unet.{path}"]
        names += [f"unet.{wrapper}{path}" for wrapper in WRAPPERS]
        names += [f"lora_unet_{path.replace('.', '_')}"]
        names += [f"lora_unet_{wrapper}{path.replace('.', '_')}" for wrapper in FLAT_WRAPPERS]
        for name in names:
            module, _ = split_key(f"{name}.lora_up.weight")
            (canonical,) = canonical_names([module]).values()
            assert table.get(canonical) == key, name


@pytest.mark.parametrize("family", UNETS)
def test_a_part_of_a_native_file_never_names_another_layer(comfy, family):
    """Blocks get diffusers' numbers, or keep their own if these can mean two blocks."""
    import comfy.utils
    from lcm_lora.lora.formats.module_names import canonical_names

    paths = {
        f"diffusion_model.{native.removesuffix('.weight')}": path.removesuffix(".weight")
        for path, native in comfy.utils.unet_to_diffusers(UNETS[family]).items()
        if native.endswith(".weight") and not path.startswith("class_embedding")
    }
    chance = random.Random(family)
    blocks = sorted({native.rpartition(".")[0][:40] for native in paths})
    for _ in range(500):
        if chance.random() < 0.5:
            begin = chance.choice(blocks)
            part = [native for native in paths if native.startswith(begin)][:20]
        else:
            part = chance.sample(list(paths), chance.choice((1, 2, 3, 10)))
        for native, name in canonical_names(part).items():
            own = native.removeprefix("diffusion_model.")
            assert name in {f"lora_unet_{p.replace('.', '_')}" for p in (own, paths[native])}, part


def clip_of(shapes: dict[str, tuple[int, ...]]):
    """A CLIP of the host around text encoders of these weights."""
    import comfy.model_patcher

    root = torch.nn.Module()
    for key, shape in shapes.items():
        module, (*path, last) = root, key.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, torch.nn.Parameter(torch.zeros(shape)))

    class Clip:
        def __init__(self, patcher):
            self.cond_stage_model, self.patcher = root, patcher

        def clone(self):
            return Clip(self.patcher.clone())

        def add_patches(self, *arguments):
            return self.patcher.add_patches(*arguments)

    cpu = torch.device("cpu")
    return Clip(comfy.model_patcher.ModelPatcher(root, cpu, cpu))


E = "text_model.encoder.layers.0."
SMALL = {
    f"{E}mlp.fc1.weight": (12, 6), f"{E}layer_norm1.weight": (6,), f"{E}layer_norm1.bias": (6,),
    "text_model.embeddings.token_embedding.weight": (50, 6),
    "text_model.embeddings.position_embedding.weight": (7, 6),
    "text_model.final_layer_norm.weight": (6,), "text_projection.weight": (6, 6),
}  # fmt: skip


def test_norms_embeddings_and_projections_change_as_the_host_changes_them(comfy, tmp_path):
    """A file as ComfyUI's own Extract and Save Lora writes it from SDXL's CLIP."""
    import comfy.sd
    from lcm_lora.lora.formats.files import read, write
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.formats.wire import from_wire, to_wire
    from lcm_lora.lora.host import apply

    clip = clip_of({
        f"{encoder}.transformer.{path}": tuple(width * side for side in shape)
        for encoder, width in (("clip_l", 1), ("clip_g", 2)) for path, shape in SMALL.items()
    })  # fmt: skip
    generator, tensors = torch.Generator().manual_seed(0), {}
    for key, weight in clip.cond_stage_model.state_dict().items():
        module, _, part = key.rpartition(".")
        change = torch.randn(weight.shape, generator=generator)
        tensors[f"text_encoders.{module}.{'diff' if part == 'weight' else 'diff_b'}"] = change
    vector = parse(tensors, {}, "a")
    write(tmp_path / "b.safetensors", vector, "fp32", False)
    model = tiny_model()
    for lora in (vector, from_wire(to_wire(vector)), read(tmp_path / "b.safetensors")):
        _, ours, coverage = apply(model, clip, lora, 1.0, 0.5)
        assert coverage.taken == coverage.total == 12 and not coverage.left_over
        _, theirs = comfy.sd.load_lora_for_models(model, clip, tensors, 1.0, 0.5)
        changed, expected = patched_weights_of(ours), patched_weights_of(theirs)
        assert changed.keys() == expected.keys() and len(changed) == 14
        for key, weight in expected.items():
            torch.testing.assert_close(changed[key], weight)
    for lora in (to_wire(vector), load_file(tmp_path / "b.safetensors")):
        _, theirs = comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 0.5)
        assert patched_weights_of(theirs).keys() == expected.keys(), "the host's own loader"


def patched_weights_of(clip):
    clip.patcher.model = clip.cond_stage_model
    return patched_weights(clip.patcher)


def test_two_spellings_of_one_layer_in_a_vector_are_added(comfy):
    """A sum may contain both, because only the model shows how its blocks are counted."""
    from lcm_lora.lora.delta import Delta, Vector
    from lcm_lora.lora.host import apply

    model = tiny_model()
    weights = model.model.state_dict()
    inner = "transformer_blocks_0_attn1_to_q"
    key = "diffusion_model.output_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    up, down = torch.ones(320, 1), torch.ones(1, 320)
    names = {
        f"lora_unet_up_blocks_0_attentions_1_{inner}": 1.0,
        f"lora_unet_output_blocks_1_1_{inner}": 2.0,
        "diffusion_model.output_blocks.1.1.transformer_blocks.0.attn1.to_q": 4.0,
    }
    deltas = {name: Delta(up, down, None, scale) for name, scale in names.items()}
    full = {f"{name}.diff": torch.full((320, 320), 8 * scale) for name, scale in names.items()}
    patched, _, coverage = apply(model, None, Vector(deltas, full), 1.0, 0.0)
    assert coverage.taken == coverage.total == 1 and not coverage.left_over
    torch.testing.assert_close(patched_weights(patched)[key], weights[key] + 7 + 56)


def test_a_part_of_a_weight_is_patched_as_the_host_patches_it(comfy):
    """diffusers has three layers where Flux has one, and the host takes each for a part of it."""
    import comfy.lora
    import comfy.model_base
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.host import apply

    config = {
        "in_channels": 4, "out_channels": 4, "vec_in_dim": 8, "context_in_dim": 8,
        "hidden_size": 16, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1,
        "axes_dim": [2, 2, 4], "theta": 10000, "patch_size": 2, "qkv_bias": True,
        "guidance_embed": False, "image_model": "flux", "txt_ids_dims": [],
    }  # fmt: skip
    about = comfy.supported_models.Flux(config | {"dtype": torch.float32})
    about.manual_cast_dtype = None
    network = comfy.model_base.Flux(about, device=torch.device("cpu"))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(network, load_device=cpu, offload_device=cpu)
    tensors = {}
    for seed, layer in enumerate(("to_q", "to_k", "to_v")):
        name = f"transformer.transformer_blocks.0.attn.{layer}"
        generator = torch.Generator().manual_seed(seed)
        tensors[f"{name}.lora_B.weight"] = torch.randn(16, 2, generator=generator)
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, 16, generator=generator)
    ours, _, coverage = apply(model, None, parse(tensors, {}, "a"), 0.5, 0.0)
    assert coverage.taken == coverage.total == 3 and not coverage.left_over
    theirs, _ = comfy.sd.load_lora_for_models(model, None, tensors, 0.5, 0.0)
    changed, expected = patched_weights(ours), patched_weights(theirs)
    qkv = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    assert changed.keys() == expected.keys() == {qkv}
    for key, weight in expected.items():
        torch.testing.assert_close(changed[key], weight)
        assert not torch.equal(weight, network.state_dict()[key])


def test_two_spellings_of_a_layer_that_cannot_be_added_are_named(comfy):
    from lcm_lora.lora.delta import Delta, Opaque, Vector
    from lcm_lora.lora.host import apply

    model = tiny_model()
    name = "lora_unet_output_blocks_1_1_transformer_blocks_0_attn1_to_q"
    pair = {"lora_up.weight": torch.ones(320, 1), "lora_down.weight": torch.ones(1, 320)}
    dora = Opaque(pair | {"dora_scale": torch.ones(320, 1)}, (320, 320))
    plain = Delta(pair["lora_up.weight"], pair["lora_down.weight"])
    native = "diffusion_model.output_blocks.1.1.transformer_blocks.0.attn1.to_q"
    _, _, coverage = apply(model, None, Vector({native: plain}, opaque={name: dora}), 1.0, 0.0)
    assert coverage.taken == 1 and coverage.total == 2
    assert coverage.left_over == (f"{name} (the same layer as {native}, which is applied)",)
