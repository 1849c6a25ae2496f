"""Where vectors support or fight each other: the numbers, and their picture."""

from __future__ import annotations

from dataclasses import replace

import torch
from lcm_lora.lora.combine import summed
from lcm_lora.lora.delta import Delta, Vector
from lcm_lora.nodes.overlap import FIGHT, SUPPORT, overlap
from PIL import ImageColor

FIRST = "lora_unet_down_blocks_0_attentions_0_"
LAST = "lora_unet_up_blocks_1_attentions_2_"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
MODULES = (f"{FIRST}proj_in", f"{FIRST}proj_out", f"{LAST}proj_in", TEXT)


def vector(seed: int, rank: int, modules: tuple[str, ...] = MODULES) -> Vector:
    draw = torch.Generator().manual_seed(seed)
    deltas = {}
    for name in modules:
        up, down = (
            torch.randn(12, rank, generator=draw),
            torch.randn(rank, 12, generator=draw),
        )
        deltas[name] = Delta(up, down, None, rank / 2)
    return Vector(deltas, source=f"{seed}.safetensors")


def test_inner_products_are_those_of_the_dense_changes_block_by_block():
    vectors, weights = [vector(1, 4), vector(2, 3, MODULES[1:]), vector(3, 2)], [1.0, -0.8, 0.0]
    grams = summed(vectors, weights)[2]
    blocks = {
        ("input", "down_blocks_0_attentions_0"): MODULES[:2],
        ("output", "up_blocks_1_attentions_2"): MODULES[2:3],
        ("text", "text"): MODULES[3:],
    }
    assert grams.by_block.keys() == blocks.keys()
    for part, modules in blocks.items():
        dense = torch.stack([
            torch.cat([
                weight * v.deltas[name].matrix() if name in v.deltas else torch.zeros(12, 12)
                for name in modules
            ]).double().flatten()
            for v, weight in zip(vectors[:2], weights, strict=False)
        ])  # fmt: skip
        torch.testing.assert_close(grams.by_block[part], dense @ dense.T, rtol=1e-5, atol=1e-5)


def test_blocks_of_transformers_have_their_authors_names():
    """A file of diffusers' names, whose parts of a layer are in one block with the whole layers."""
    sizes = {"transformer_blocks.0.attn.to_q": (3072, 3072), "transformer_blocks.0.ff.net.0.proj":
             (12288, 3072), "single_transformer_blocks.1.proj_mlp": (12288, 3072),
             "single_transformer_blocks.1.proj_out": (3072, 15360)}  # fmt: skip
    deltas = {
        f"transformer.{name}": Delta(torch.ones(out, 1), torch.ones(1, columns), None, 1.0)
        for name, (out, columns) in sizes.items()
    }
    flux = Vector(deltas, source="flux")
    blocks = summed([flux, flux], [1.0, 1.0])[2].by_block
    assert blocks.keys() == {
        ("double_blocks", "double_blocks_0"),
        ("single_blocks", "single_blocks_1"),
    }


def test_the_picture_shows_where_they_fight():
    """The style is the acceleration in the first block, and its opposite in the last."""
    fast = vector(1, 4, MODULES[:3])
    opposite = {n: d.scaled(-1.0 if n.startswith(LAST) else 1.0) for n, d in fast.deltas.items()}
    style = replace(fast, deltas=opposite, source="style.safetensors")
    picture = overlap(summed([fast, style], [1.0, 0.5])[2], ["fast", "style"])
    assert picture.shape[0] == 1 and picture.shape[-1] == 3
    places = {}
    for colour in (FIGHT, SUPPORT):
        wanted = torch.tensor(ImageColor.getrgb(colour)) / 255
        rows, columns = (picture[0] - wanted).abs().amax(-1).lt(1e-3).nonzero().T
        places[colour] = rows.float().mean(), columns.min(), columns.max()
    # Below the other, because its block is later; to the left, because its cosine is negative.
    assert places[FIGHT][0] > places[SUPPORT][0]
    assert places[FIGHT][2] <= places[SUPPORT][1] + 1
    # Both cosines are 1, so the bars are equally long.
    lengths = [places[colour][2] - places[colour][1] for colour in (FIGHT, SUPPORT)]
    assert abs(lengths[0] - lengths[1]) <= 1 < lengths[0]
