"""Truncation against a full SVD of the dense deltas."""

import pytest
import torch
from lcm_lora.lora.delta import Delta, Vector
from lcm_lora.lora.reduce import truncated


def delta(out, columns, rank, seed=0, kernel=(), alpha=None, decay=0.7):
    """Random, with singular values that fall off, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    fall = decay ** torch.arange(rank)
    up = torch.randn(out, rank, generator=generator) * fall
    down = torch.randn(rank, columns, *kernel, generator=generator)
    return Delta(up.reshape(out, rank, *[1] * len(kernel)), down, None, alpha)


VECTOR = Vector(
    {
        "tall": delta(300, 40, 12, 1, alpha=3.0),
        "wide": delta(20, 200, 12, 2),
        "conv": delta(32, 16, 12, 3, kernel=(3, 3), alpha=12.0),
        "more ranks than rows": delta(8, 30, 20, 4),
    },
    {"norm.diff": torch.ones(3)},
)


def dense(delta: Delta) -> torch.Tensor:
    return delta.matrix().double().flatten(1)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_rank_is_the_best_there_is(rank):
    reduced, truncation = truncated(VECTOR, rank=rank)
    lost = total = 0.0
    for name, old in VECTOR.deltas.items():
        left, values, right = torch.linalg.svd(dense(old), full_matrices=False)
        best = left[:, :rank] * values[:rank] @ right[:rank]
        new = reduced.deltas[name]
        assert truncation.ranks[name] == (old.rank, rank) and new.rank == rank
        assert new.shape == old.shape
        assert (dense(new) - best).norm() <= 2e-6 * best.norm()
        lost += float(values[rank:].square().sum())
        total += float(values.square().sum())
    assert truncation.energy == pytest.approx(1 - lost / total, abs=1e-6)
    assert truncation.error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert reduced.diffs is VECTOR.diffs


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_share_of_the_energy_is_reached_with_the_fewest_ranks(share):
    _, kept = truncated(VECTOR, keep_energy=share)
    values = torch.cat([torch.linalg.svdvals(dense(d)) for d in VECTOR.deltas.values()])
    energy = values.sort(descending=True).values.square().cumsum(0)
    fewest = int((energy < share * energy[-1]).sum()) + 1
    assert kept.energy >= share - 1e-6
    # A module keeps one rank even where none is needed.
    ranks = sum(after for _, after in kept.ranks.values())
    assert fewest <= ranks <= fewest + len(VECTOR.deltas)


def test_nothing_is_lost_where_nothing_is_to_be_lost():
    twice = VECTOR.deltas["wide"]
    stacked = Delta(torch.cat([twice.up, twice.up], 1), torch.cat([twice.down, twice.down], 0))
    reduced, truncation = truncated(Vector({"twice": stacked, **VECTOR.deltas}))
    assert truncation.energy == pytest.approx(1.0, abs=1e-9)
    assert truncation.ranks["twice"] == (24, 12)
    assert truncation.ranks["more ranks than rows"] == (20, 8)
    for name, old in {"twice": stacked, **VECTOR.deltas}.items():
        assert (dense(reduced.deltas[name]) - dense(old)).norm() <= 2e-6 * dense(old).norm()


def test_equal_singular_values_are_enough_for_a_share():
    same = Delta(torch.eye(64)[:, :16].contiguous(), torch.eye(48)[:16].contiguous())
    reduced, truncation = truncated(Vector({"same": same}), keep_energy=0.9)
    assert truncation.energy >= 0.9 and reduced.deltas["same"].rank >= 15


def test_small_values_of_a_wide_layer_are_no_rounding():
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(10240, 32, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(1280, 32, generator=generator)).Q
    values = torch.full((32,), 1e-3)
    values[0] = 1
    wide = Vector({"wide": Delta(left * values, right.T.contiguous())})
    reduced, truncation = truncated(wide)
    assert reduced.deltas["wide"].rank == 32 and truncation.error < 1e-6
    _, truncation = truncated(wide, keep_energy=1 - 1e-3**2)
    assert truncation.error <= 1e-3


def test_a_vector_of_zeros_stays_one():
    zero = Delta(torch.zeros(4, 2), torch.ones(2, 5))
    reduced, truncation = truncated(Vector({"zero": zero}), rank=1)
    assert not reduced.deltas["zero"].matrix().any() and truncation.energy == 1.0


@pytest.mark.parametrize(("rank", "energy"), [(-1, 1.0), (0, 0.0), (0, 1.5), (0, float("nan"))])
def test_limits_out_of_range_are_refused(rank, energy):
    with pytest.raises(ValueError, match="keep_energy above 0"):
        truncated(VECTOR, rank, energy)
