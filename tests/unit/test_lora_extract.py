"""Differences of models as LoRAs, against full decompositions."""

import pytest
import torch
from lcm_lora.lora.extract import extract
from lcm_lora.lora.nearest import nearest


def weight(*shape, seed=0, decay=0.9):
    """Random weights, with a spectrum that falls off."""
    generator = torch.Generator().manual_seed(seed)
    out, columns = shape[0], torch.Size(shape[1:]).numel()
    left, _, right = torch.linalg.svd(
        torch.randn(out, columns, generator=generator), full_matrices=False
    )
    return (left * decay ** torch.arange(left.shape[1]) @ right).reshape(shape)


@pytest.mark.parametrize("shape", [(200, 120), (120, 200), (96, 32, 3, 3), (64, 64, 1, 1), (10, 8)])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_rank_is_as_near_as_can_be(shape, rank):
    change = weight(*shape)
    delta, left_out = nearest(change, rank, 0)
    values = torch.linalg.svdvals(change.double().flatten(1))
    best = float(values[min(rank, len(values)) :].square().sum())
    error = float((delta.matrix().double() - change.double()).square().sum())
    assert delta.shape == change.shape and delta.rank == min(rank, *change.flatten(1).shape)
    assert error <= best * 1.02 + 1e-9
    assert left_out == pytest.approx(error, rel=1e-3, abs=1e-6)


def test_what_a_lora_changed_is_found_again():
    up, down = torch.randn(300, 4), torch.randn(4, 500)
    bias, norm = torch.randn(300), torch.randn(7)
    layers = [("a", up @ down, bias), ("norm", norm, None), ("same", torch.zeros(3, 3), None)]
    vector, report = extract(layers, 4, 0, "x")
    assert vector.deltas.keys() == {"a"} and vector.diffs.keys() == {"a.diff_b", "norm.diff"}
    torch.testing.assert_close(vector.deltas["a"].matrix(), up @ down, rtol=1e-4, atol=1e-4)
    assert vector.diffs["norm.diff"].equal(norm)
    assert "1 layers with rank 4 or less, 2 norms and biases" in report
    assert float(report.partition("relative error ")[2].partition(".\n")[0]) < 1e-5
    again, _ = extract(layers, 4, 0, "x")
    assert again.deltas["a"].up.equal(vector.deltas["a"].up)


@pytest.mark.parametrize(
    ("layers", "rank", "says"),
    [
        ([("a", torch.zeros(3, 3), None)], 4, "do not differ"),
        ([("a", torch.full((3, 3), torch.nan), None)], 4, "not finite"),
        ([("a", torch.ones(3, 3), None)], 0, "rank must be at least 1"),
    ],
)
def test_what_cannot_be_extracted_is_refused(layers, rank, says):
    with pytest.raises(ValueError, match=says):
        extract(layers, rank, 0, "x")
