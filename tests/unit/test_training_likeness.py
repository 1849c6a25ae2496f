"""The figures by which two sets of pictures are compared, against their owners'."""

import pytest
import torch
from lcm_lora.training.state.likeness import energy_distance, share_inside, summary


def normal(count, size, seed, mean=0.0):
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)) + mean


def test_the_energy_distance_is_scipys():
    """Which is the root of the same with the pairs of a number and itself, on one dimension."""
    stats = pytest.importorskip("scipy").stats
    a, b = normal(40, 1, 1), normal(30, 1, 2, 0.7)
    pairs = [torch.cdist(x, x).sum() / len(x) ** 2 / (len(x) - 1) for x in (a, b)]
    expected = stats.energy_distance(a[:, 0].numpy(), b[:, 0].numpy()) ** 2 - float(sum(pairs))
    assert energy_distance(a, b) == pytest.approx(expected, abs=1e-5)


def test_it_is_zero_on_average_for_one_distribution():
    values = [energy_distance(normal(20, 8, i), normal(20, 8, 100 + i)) for i in range(60)]
    assert abs(sum(values) / 60) < 0.01 < energy_distance(normal(20, 8, 1), normal(20, 8, 2, 0.5))


def test_recall_counts_real_pictures_within_the_third_neighbour_of_a_drawn_one():
    """The definition, written out pair by pair in float64."""
    real, drawn = normal(60, 5, 1).double(), normal(50, 5, 2).double() * 0.4
    radii = [sorted(float((x - y).norm()) for y in drawn)[3] for x in drawn]
    inside = [
        any(float((r - x).norm()) <= radius for x, radius in zip(drawn, radii, strict=True))
        for r in real
    ]
    assert share_inside(real, drawn) == pytest.approx(sum(inside) / 60) and 0 < sum(inside) < 30


def test_features_are_mean_and_deviation_of_each_channel_over_all_places():
    pictures, tokens = torch.randn(2, 3, 4, 5), torch.randn(2, 7, 3)
    expected = [pictures.mean((2, 3)), pictures.std((2, 3)), tokens.mean(1), tokens.std(1)]
    torch.testing.assert_close(summary((pictures, None, tokens)), torch.cat(expected, 1))
    video = pictures.unsqueeze(2)
    torch.testing.assert_close(summary(video), summary(pictures))
