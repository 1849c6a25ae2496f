"""Merging by rules: against peft's own, and against what the papers promise."""

import pytest
import torch
from lcm_lora.lora.combine import elementwise, exact
from lcm_lora.lora.delta import Delta, Vector
from lcm_lora.lora.elementwise.table import RULES
from peft.utils import merge_utils

CPU = torch.device("cpu")
LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def changes(count=3, shape=(40, 30), seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize(("name", "theirs"), [("ties", "ties"), ("magnitude", "magnitude_prune")])
def test_rules_that_draw_nothing_equal_pefts(name, theirs, density):
    # For TIES, peft weighs after the vote, which is the same if all weights are equal.
    weights = torch.full((3,), 0.7) if name == "ties" else torch.tensor([1.0, -0.8, 0.5])
    stacked = changes()
    weighted = stacked * weights.view(-1, 1, 1)
    merged = RULES[name].merge(weighted, density, generator())
    expected = getattr(merge_utils, theirs)(list(stacked), weights, density)
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["dare", "magnitude"])
def test_all_numbers_kept_give_the_sum(name):
    stacked = changes()
    torch.testing.assert_close(RULES[name].merge(stacked, 1.0, generator()), stacked.sum(0))


def test_dare_is_the_sum_on_average():
    stacked, rule = changes(2, (20, 10)), RULES["dare"]
    mean = torch.stack([rule.merge(stacked, 0.5, generator(i)) for i in range(3000)]).mean(0)
    assert (mean - stacked.sum(0)).abs().max() < 0.25
    once = rule.merge(stacked[:1], 0.25, generator())
    nonzero = once != 0
    torch.testing.assert_close(once[nonzero], 4 * stacked[0][nonzero])
    assert 0.1 < nonzero.float().mean() < 0.4


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_della_keeps_large_numbers_rather_and_each_as_it_is_on_average(density):
    one, rule = changes(1, (4, 50)), RULES["della"]
    draws = torch.stack([rule.merge(one, density, generator(i)) for i in range(2000)])
    shares = (draws != 0).float().mean(0)
    assert abs(float(shares.mean()) - density) < 0.01
    order = one[0].abs().argsort(1)
    rates = shares.gather(1, order)
    spread = min(0.3, 2 * density, 2 * (1 - density))
    apart = float(rates[:, -5:].mean() - rates[:, :5].mean())
    assert apart == pytest.approx(0.9 * spread, abs=0.03)
    torch.testing.assert_close(draws.mean(0), one[0], rtol=0.2, atol=0.3)


def test_signs_that_lose_the_vote_are_left_out():
    stacked = torch.tensor([[[3.0, 1.0, 0.0]], [[-1.0, 2.0, -4.0]]])
    expected = torch.tensor([[3.0, 1.5, -4.0]])
    for name in ("ties", "della"):
        assert RULES[name].merge(stacked, 1.0, generator()).equal(expected)


def delta(rank, kernel=(), seed=0) -> Delta:
    draw = generator(seed)
    up = torch.randn(24, rank, *[1] * len(kernel), generator=draw)
    return Delta(up, torch.randn(rank, 16, *kernel, generator=draw), None, 2.0)


def vectors():
    return [
        Vector({LINEAR: delta(4), CONV: delta(4, (3, 3))}, source="one"),
        Vector({LINEAR: delta(3, seed=1)}, {"norm.diff": torch.ones(2)}, source="two"),
    ]


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_merge_has_the_rank_asked_and_reports_its_error(name):
    merged, report = elementwise(vectors(), [1.0, 0.8], RULES[name], 0.5, 6, 3, CPU)
    again, _ = elementwise(vectors(), [1.0, 0.8], RULES[name], 0.5, 6, 3, CPU)
    full_rank, _ = elementwise(vectors(), [1.0, 0.8], RULES[name], 0.5, 24, 3, CPU)
    assert {d.rank for d in merged.deltas.values()} == {6}
    lost = total = 0.0
    for module, module_delta in merged.deltas.items():
        assert module_delta.matrix().equal(again.deltas[module].matrix())
        dense = full_rank.deltas[module].matrix()  # has full rank, so it is the merge itself
        lost += float((module_delta.matrix() - dense).square().sum())
        total += float(dense.square().sum())
    assert f"relative error {(lost / total) ** 0.5:.2e}" in report
    assert merged.diffs["norm.diff"].equal(torch.full((2,), 0.8))
    assert name in merged.metadata["lcm_lora_method"]


def test_other_seeds_draw_otherwise():
    one, two = (elementwise(vectors(), [1, 1], RULES["dare"], 0.5, 8, s, CPU)[0] for s in (0, 1))
    assert not one.deltas[LINEAR].matrix().equal(two.deltas[LINEAR].matrix())


def test_everything_kept_is_the_exact_sum():
    merged, _ = elementwise(vectors(), [1.0, -0.8], RULES["magnitude"], 1.0, 0, 0, CPU)
    expected, _ = exact(vectors(), [1.0, -0.8])
    for name, summed in expected.deltas.items():
        assert merged.deltas[name].rank == summed.rank
        matrix = merged.deltas[name].matrix()
        torch.testing.assert_close(matrix, summed.matrix(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("density", "rank"), [(0.0, 4), (1.1, 4), (float("nan"), 4), (0.5, -1)])
def test_settings_out_of_range(density, rank):
    with pytest.raises(ValueError, match="density must be above 0"):
        elementwise(vectors(), [1, 1], RULES["ties"], density, rank, 0, CPU)
