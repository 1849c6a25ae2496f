"""Files of transformers at the sizes of published models, by their names and shapes alone."""

from __future__ import annotations

import pytest
import torch
from lcm_lora.lora.architecture import architecture_of
from lcm_lora.lora.combine import exact
from lcm_lora.lora.delta import Vector
from lcm_lora.lora.formats.parse import parse
from lcm_lora.lora.formats.transformers import TRANSFORMERS, Place, called, flat
from lcm_lora.lora.slices import in_whole, settled

Sizes = dict[str, tuple[int, int]]
JOINT = [f"attn.{n}" for n in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")]
JOINT += ["attn.to_out.0", "attn.to_add_out"]


def flux(h: int = 3072, doubles: int = 19, singles: int = 38, modulation: bool = True) -> Sizes:
    layers: Sizes = {}
    for side in ("img", "txt"):
        for b in range(doubles):
            at = f"double_blocks.{b}.{side}"
            layers |= {f"{at}_attn.qkv": (3 * h, h), f"{at}_attn.proj": (h, h)}
            layers |= {f"{at}_mlp.0": (4 * h, h), f"{at}_mlp.2": (h, 4 * h)}
            if modulation:
                layers[f"{at}_mod.lin"] = 6 * h, h
    for b in range(singles):
        at = f"single_blocks.{b}"
        layers |= {f"{at}.linear1": (7 * h, h), f"{at}.linear2": (h, 5 * h)}
    return layers


def flux_of_diffusers(h: int = 3072) -> Sizes:
    layers: Sizes = {}
    for b in range(19):
        at = f"transformer_blocks.{b}"
        layers |= {f"{at}.{name}": (h, h) for name in JOINT}
        for side in ("ff", "ff_context"):
            layers[f"{at}.{side}.net.0.proj"] = 4 * h, h
            layers[f"{at}.{side}.net.2"] = h, 4 * h
    for b in range(38):
        at = f"single_transformer_blocks.{b}"
        layers |= {f"{at}.attn.to_{part}": (h, h) for part in "qkv"}
        layers |= {f"{at}.proj_mlp": (4 * h, h), f"{at}.proj_out": (h, 5 * h)}
    return layers


def qwen(attention_only: bool = False, h: int = 3072) -> Sizes:
    layers: Sizes = {}
    for b in range(60):
        at = f"transformer_blocks.{b}"
        layers |= {f"{at}.{name}": (h, h) for name in JOINT}
        for side in ("img", "txt") if not attention_only else ():
            layers[f"{at}.{side}_mlp.net.0.proj"] = 4 * h, h
            layers[f"{at}.{side}_mlp.net.2"] = h, 4 * h
            layers[f"{at}.{side}_mod.1"] = 6 * h, h
    return layers


def z_image(h: int = 3840) -> Sizes:
    layers: Sizes = {}
    for b in range(30):
        layers |= {
            f"layers.{b}.attention.{n}": (h, h) for n in ("to_q", "to_k", "to_v", "to_out.0")
        }
        layers |= {f"layers.{b}.feed_forward.w{n}": (10240, h) for n in (1, 3)}
        layers[f"layers.{b}.feed_forward.w2"] = h, 10240
    return layers


def wan(h: int = 5120) -> Sizes:
    layers: Sizes = {}
    for b in range(40):
        for kind in ("self_attn", "cross_attn"):
            layers |= {f"blocks.{b}.{kind}.{part}": (h, h) for part in "qkvo"}
        layers |= {f"blocks.{b}.ffn.0": (13824, h), f"blocks.{b}.ffn.2": (h, 13824)}
    return layers


def read(layers: Sizes, prefix: str = "", is_flat: bool = False, source: str = "a file") -> Vector:
    tensors = {}
    for name, (out, columns) in layers.items():
        module = prefix + (name.replace(".", "_") if is_flat else name)
        tensors[f"{module}.lora_A.weight"] = torch.empty(4, columns, device="meta")
        tensors[f"{module}.lora_B.weight"] = torch.empty(out, 4, device="meta")
    return parse(tensors, {}, source)


@pytest.mark.parametrize(
    ("layers", "name", "width"),
    [
        (flux(), "Flux", 3072),
        (flux(modulation=False), "Flux or Chroma", 3072),
        (flux_of_diffusers(), "Flux or Chroma", 3072),
        (flux(doubles=20, singles=40), "HunyuanVideo", 3072),
        (flux(3584, 20, 40), "HunyuanImage", 3584),
        (qwen(), "Qwen-Image", 3072),
        (qwen(attention_only=True), "Qwen-Image", 3072),
        (z_image(), "Z-Image", 3840),
        (wan(), "Wan", 5120),
        (wan(1536), "Wan", 1536),
    ],
)
def test_a_file_shows_what_it_was_made_for(layers, name, width):
    for prefix, is_flat in (("lora_unet_", True), ("diffusion_model.", False), ("", False)):
        made_for = architecture_of(read(layers, prefix, is_flat).shapes)
        assert (made_for.name, made_for.width) == (name, width), prefix


def test_every_dialect_gets_the_same_names():
    for layers in (flux_of_diffusers(), qwen(), z_image(), wan()):
        names = {
            frozenset(read(layers, prefix, is_flat).deltas)
            for prefix, is_flat in (
                ("transformer.", False), ("diffusion_model.", False), ("", False),
                ("base_model.model.", False), ("lora_transformer_", True), ("lycoris_", True),
                ("lora_unet_", True),
            )
        }  # fmt: skip
        assert len(names) == 1


def test_a_part_that_shows_no_architecture_is_read_with_the_other_files():
    """The first blocks' attention may be Flux' or Qwen-Image's, so it keeps its own names."""
    some = {name: size for name, size in flux_of_diffusers().items() if name.startswith("trans")}
    some = {name: size for name, size in some.items() if ".1.attn." in name}
    part = read(some, source="part")
    assert set(part.deltas) == set(some)
    made_for = architecture_of(part.shapes)
    assert "Flux" in made_for.name and "Qwen-Image" in made_for.name
    ours, _ = settled([part, read(flux(), "lora_unet_", True)])
    assert ours.deltas["lora_unet_double_blocks_1_img_attn_qkv"].rank == 3 * 4
    ours, _ = settled([part, read(qwen(), "transformer.")])
    assert "lora_unet_transformer_blocks_1_attn_to_q" in ours.deltas
    # Two such files still name the same layers.
    both = settled([part, read(some, "transformer.")])
    assert both[0].deltas.keys() == both[1].deltas.keys()
    assert all(name.startswith("transformer.") for name in both[0].deltas)


def test_files_for_two_architectures_are_not_added():
    with pytest.raises(ValueError, match="Flux .* Qwen-Image .* same architecture"):
        exact([read(flux()), read(qwen())], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"Wan \(width 5120\) .* Wan \(width 1536\)"):
        exact([read(wan()), read(wan(1536))], [1.0, 1.0])


def test_two_names_of_one_layer_in_a_file_are_added():
    small = {"double_blocks.0.img_attn.proj": (128, 128), "single_blocks.0.linear1": (896, 128)}
    file = {}
    for module, (out, columns) in small.items():
        file[f"diffusion_model.{module}.lora_down.weight"] = torch.randn(2, columns)
        file[f"diffusion_model.{module}.lora_up.weight"] = torch.randn(out, 2)
    alias = "transformer.transformer_blocks.0.attn.to_out.0"
    file[f"{alias}.lora_A.weight"], file[f"{alias}.lora_B.weight"] = (
        torch.randn(3, 128), torch.randn(128, 3)
    )  # fmt: skip
    vector = parse(file, {}, "both")
    delta = vector.deltas["lora_unet_double_blocks_0_img_attn_proj"]
    name = "diffusion_model.double_blocks.0.img_attn.proj"
    expected = file[f"{name}.lora_up.weight"] @ file[f"{name}.lora_down.weight"]
    expected = expected + file[f"{alias}.lora_B.weight"] @ file[f"{alias}.lora_A.weight"]
    assert delta.rank == 5 and torch.allclose(delta.matrix(), expected, atol=1e-5)
    assert settled([vector])[0].deltas.keys() == vector.deltas.keys()


def test_the_rows_of_a_part_are_put_into_the_whole():
    change = torch.arange(1.0, 5.0)[:, None]
    assert in_whole(change, Place("x", (2, 4, 8))).flatten().tolist() == [0, 0, 1, 2, 3, 4, 0, 0]
    assert in_whole(change, Place("x", swapped=True)).flatten().tolist() == [3, 4, 1, 2]


def test_parts_need_rows_that_can_be_split():
    flux_kind = next(kind for kind in TRANSFORMERS if kind.name == "Flux")
    path = flat("transformer.single_transformer_blocks.3.proj_mlp")
    assert flux_kind.place(path, (512, 128)).rows == (384, 512, 896)
    assert flux_kind.place(path, (511, 128)) is None
    assert flux_kind.place("blocks_0_self_attn_q", (128, 128)) is None


def native_file(layers: Sizes) -> dict[str, torch.Tensor]:
    """A LoRA with the authors' names."""
    generator, file = torch.Generator().manual_seed(5), {}
    for module, (out, columns) in layers.items():
        name = f"diffusion_model.{module}"
        file[f"{name}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        file[f"{name}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
    return file


def tencents(key: str) -> str:
    """ComfyUI's name of a key of HunyuanVideo -> Tencent's, which diffusers converts."""
    for ours, theirs in {
        "img_attn.": "img_attn_", "txt_attn.": "txt_attn_", "self_attn.": "self_attn_",
        "_mod.lin.": "_mod.linear.", "modulation.lin.": "modulation.linear.",
        "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2", "time_in.in_layer": "time_in.mlp.0",
        "time_in.out_layer": "time_in.mlp.2",
        "t_embedder.in_layer": "t_embedder.mlp.0", "t_embedder.out_layer": "t_embedder.mlp.2",
        "c_embedder.in_layer": "c_embedder.linear_1", "c_embedder.out_layer": "c_embedder.linear_2",
    }.items():  # fmt: skip
        key = key.replace(ours, theirs)
    return key.replace("img_mlp.0", "img_mlp.fc1").replace("img_mlp.2", "img_mlp.fc2")


OF_DIFFUSERS = {
    "Wan": ("_convert_non_diffusers_wan_lora_to_diffusers", lambda key: key, {
        **{
            f"blocks.1.{kind}_attn.{part}": (64, 64)
            for kind in ("self", "cross") for part in ("q", "k", "v", "o")
        },
        "blocks.1.cross_attn.k_img": (64, 64), "blocks.1.cross_attn.v_img": (64, 64),
        "blocks.1.ffn.0": (128, 64), "blocks.1.ffn.2": (64, 128),
        "text_embedding.0": (64, 48), "text_embedding.2": (64, 64), "time_embedding.0": (64, 16),
        "time_embedding.2": (64, 64), "time_projection.1": (384, 64), "head.head": (32, 64),
        "img_emb.proj.1": (40, 40), "img_emb.proj.3": (64, 40),
    }),
    # The converters of these two have the widths of the published models in them.
    "Lumina2": ("_convert_non_diffusers_lumina2_lora_to_diffusers", lambda key: key, {
        f"{block}.0.{layer}": size
        for block in ("layers", "noise_refiner", "context_refiner")
        for layer, size in {
            "attention.qkv": (3840, 2304), "attention.out": (2304, 2304),
            "feed_forward.w1": (96, 2304), "feed_forward.w2": (2304, 96),
            "feed_forward.w3": (96, 2304), "adaLN_modulation.1": (96, 48),
        }.items()
        if (block, layer) != ("context_refiner", "adaLN_modulation.1")
    }),
    "HunyuanVideo": ("_convert_hunyuan_video_lora_to_diffusers", tencents, {
        **{
            f"double_blocks.1.{side}_{layer}": size
            for side in ("img", "txt")
            for layer, size in {
                "attn.qkv": (192, 64), "attn.proj": (64, 64), "mlp.0": (256, 64),
                "mlp.2": (64, 256), "mod.lin": (384, 64),
            }.items()
        },
        "single_blocks.1.linear1": (7 * 3072, 3072), "single_blocks.1.linear2": (64, 320),
        "single_blocks.1.modulation.lin": (192, 64),
        "vector_in.in_layer": (64, 32), "vector_in.out_layer": (64, 64),
        "time_in.in_layer": (64, 32), "time_in.out_layer": (64, 64), "final_layer.linear": (32, 64),
        "txt_in.input_embedder": (64, 48), "txt_in.t_embedder.in_layer": (64, 32),
        "txt_in.t_embedder.out_layer": (64, 64), "txt_in.c_embedder.in_layer": (64, 48),
        "txt_in.c_embedder.out_layer": (64, 64),
        "txt_in.individual_token_refiner.blocks.1.self_attn.proj": (64, 64),
        "txt_in.individual_token_refiner.blocks.1.mlp.0": (256, 64),
        "txt_in.individual_token_refiner.blocks.1.mlp.2": (64, 256),
        "txt_in.individual_token_refiner.blocks.1.adaLN_modulation.1": (128, 64),
    }),
}  # fmt: skip


@pytest.mark.parametrize("kind", OF_DIFFUSERS)
def test_diffusers_names_are_those_that_diffusers_itself_gives(kind):
    """diffusers converts a file with the authors' names; we read both, and get one change."""
    from diffusers.loaders import lora_conversion_utils

    converter, spelled, layers = OF_DIFFUSERS[kind]
    file = native_file(layers)
    theirs = {spelled(key): tensor for key, tensor in file.items()}
    theirs = getattr(lora_conversion_utils, converter)(theirs)
    assert all(key.startswith("transformer.") for key in theirs)
    kinds = called(kind)
    (right,), (found,) = (settled([parse(one, {}, kind)], kinds) for one in (file, theirs))
    assert found.deltas.keys() == right.deltas.keys()
    assert len(right.deltas) == len(layers)
    for name, delta in right.deltas.items():
        difference = found.deltas[name].inner(found.deltas[name]) + delta.inner(delta)
        difference -= 2 * delta.inner(found.deltas[name])
        assert abs(difference) <= 1e-5 * delta.inner(delta), name


def test_a_lokr_of_projections_that_diffusers_fuses():
    """ai-toolkit's LoKr for Flux2, as diffusers converts it."""
    from diffusers.loaders import lora_conversion_utils

    generator, file = torch.Generator().manual_seed(5), {}
    layers = {
        f"double_blocks.1.{side}_{layer}": size
        for side in ("img", "txt")
        for layer, size in {
            "attn.qkv": (192, 64), "attn.proj": (64, 64), "mlp.0": (384, 64), "mlp.2": (64, 192),
        }.items()
    } | {"single_blocks.0.linear1": (576, 64), "single_blocks.0.linear2": (64, 256)}  # fmt: skip
    for module, (out, columns) in layers.items():
        name = f"diffusion_model.{module}"
        file[f"{name}.lokr_w1"] = torch.randn(4, 4, generator=generator)
        file[f"{name}.lokr_w2"] = torch.randn(out // 4, columns // 4, generator=generator)
        file[f"{name}.alpha"] = torch.tensor(1e10)  # without factors, it counts for nothing
    theirs = lora_conversion_utils._convert_non_diffusers_flux2_lokr_to_diffusers(dict(file))
    assert any("to_qkv.lokr_w1" in key for key in theirs)
    right, found = (
        settled([parse(one, {}, "LoKr")], called("Flux2"))[0].deltas for one in (file, theirs)
    )
    assert found.keys() == right.keys() and len(right) == len(layers)
    for name, delta in right.items():
        assert torch.equal(found[name].matrix(), delta.matrix()), name


def test_the_file_of_a_wan_with_a_change_of_its_modulation_is_recognised():
    file = native_file(wan(1536))
    file["diffusion_model.blocks.0.diff_m"] = torch.randn(1, 6, 1536)
    made_for = architecture_of(parse(file, {}, "wan").shapes)
    assert (made_for.name, made_for.width) == ("Wan", 1536)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_a_change_under_two_names_in_one_file_counts_once(kind):
    """As in Z-Image-Fun's distilled LoRAs: the parts, and beside them what is made of them."""
    generator, file, right = torch.Generator().manual_seed(3), {}, {}
    for b in range(2):
        at = f"lora_unet__layers_{b}_attention"
        ups = [torch.randn(96, 4, generator=generator).to(kind) for _ in "qkv"]
        downs = [torch.randn(4, 96, generator=generator).to(kind) for _ in "qkv"]
        for part, up, down in zip("qkv", ups, downs, strict=True):
            file[f"{at}_to_{part}.lora_up.weight"], file[f"{at}_to_{part}.lora_down.weight"] = (
                up,
                down,
            )
            file[f"{at}_to_{part}.alpha"] = torch.tensor(2.0)
        whole = {
            # Scaled in another way, as a tool may do it.
            f"{at}_qkv.lora_up.weight": (torch.block_diag(*[up.float() for up in ups]) / 3).to(
                kind
            ),
            f"{at}_qkv.lora_down.weight": (torch.cat(downs).float() * 1.5).to(kind),
        }
        out = {
            f"{at}_out.lora_up.weight": torch.randn(96, 4, generator=generator).to(kind),
            f"{at}_out.lora_down.weight": torch.randn(4, 96, generator=generator).to(kind),
        }
        file |= whole | out | {k.replace("_out.", "_to_out_0."): t for k, t in out.items()}
        right |= whole | out
    found, expected = parse(file, {}, "both"), parse(right, {}, "whole")
    assert found.deltas.keys() == expected.deltas.keys()
    for name, delta in expected.deltas.items():
        assert torch.equal(found.deltas[name].matrix(), delta.matrix())
    # What is not the same change is added.
    file["lora_unet__layers_0_attention_to_q.alpha"] = torch.tensor(2.1)
    assert parse(file, {}, "more").deltas["lora_unet_layers_0_attention_qkv"].rank > 12
