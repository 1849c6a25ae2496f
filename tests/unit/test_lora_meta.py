"""LoRA algebra where its factors lie: on the meta device a tensor left on the CPU is an error."""

import pytest
import torch
from lcm_lora.lora.addition import stacked
from lcm_lora.lora.compare import Grams
from lcm_lora.lora.delta import Delta
from lcm_lora.lora.elementwise.table import RULES
from lcm_lora.lora.reduce import decomposed

META = torch.device("meta")


def delta(rank=4, kernel=(), tucker=False) -> Delta:
    ones = [1] * len(kernel)
    mid = torch.empty(rank, rank, *kernel, device=META) if tucker else None
    down = torch.empty(rank, 12, *(ones if tucker else kernel), device=META, dtype=torch.float16)
    return Delta(torch.empty(20, rank, *ones, device=META, dtype=torch.float16), down, mid, 2.0)


@pytest.mark.parametrize(
    "change", [delta(), delta(kernel=(3, 3)), delta(kernel=(3, 3), tucker=True)]
)
def test_deltas_are_made_of_their_factors_there(change):
    assert change.matrix().is_meta and change.matrix().shape == change.shape
    assert change.scaled(0.5).matrix().is_meta
    total = stacked([(change, 0.5), (change, -1.0)])
    assert total.up.is_meta and total.down.is_meta and total.rank == 8
    grams = Grams(2)
    grams.add("lora_unet_down_blocks_0_attentions_0_x", total, [0, 1], [4, 4])
    assert grams.by_place["input"].is_meta
    parts = decomposed(change)
    assert parts.values.is_meta and parts.cut(3).down.is_meta


@pytest.mark.parametrize("name", sorted(RULES))
def test_rules_merge_there(name):
    changes = torch.empty(2, 20, 12, device=META)
    merged = RULES[name].merge(changes, 0.5, torch.Generator().manual_seed(0))
    assert merged.is_meta and merged.shape == (20, 12)
