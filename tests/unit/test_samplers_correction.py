"""The correction of a single step: what it makes equal, and what is taken for one."""

import pytest
import torch
from lcm_lora.samplers.correction import Correction, fitted, parse


def latents(mean: float, deviation: float, seed: int, *shapes: tuple[int, int]):
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(4.0).view(4, 1, 1)
    return [
        torch.randn(2, 4, *shape, generator=generator) * deviation + mean + offsets
        for shape in shapes
    ]


def test_it_gives_the_mean_and_deviation_of_each_channel_over_all_pictures():
    found = latents(0.3, 0.5, 0, (8, 8), (4, 12))
    wanted = latents(-1.0, 0.9, 1, (8, 8), (12, 4), (8, 8))
    correction = parse(str(fitted(found, wanted)))
    moved, goal = (
        torch.cat([each.transpose(0, 1).flatten(1) for each in group], 1)
        for group in ([correction(each) for each in found], wanted)
    )
    torch.testing.assert_close(moved.mean(1), goal.mean(1))
    torch.testing.assert_close(moved.std(1), goal.std(1))
    # For all pictures alike, so that what is between them stays in proportion.
    one, other = correction(found[0])
    torch.testing.assert_close(
        (one - other), (found[0][0] - found[0][1]) * torch.tensor(correction.scale).view(4, 1, 1)
    )


def test_a_video_is_moved_channel_by_channel_too():
    video = torch.ones(1, 2, 3, 4, 4)
    moved = Correction((2.0, 3.0), (0.0, 1.0))(video)
    assert moved.shape == video.shape
    assert moved[0, 0].unique().tolist() == [2.0] and moved[0, 1].unique().tolist() == [4.0]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"scale": [1], "shift": []}', '{"scale": [], "shift": []}',
     '{"scale": [0], "shift": [0]}', '{"scale": [NaN], "shift": [0]}',
     '{"scale": [1], "shift": [1e999]}', '{"scale": ["a"], "shift": [0]}',
     '{"scale": 1, "shift": 0}', "[" * 100_000],
)  # fmt: skip
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="expected|as many positive scales"):
        parse(text)


def test_nothing_fits_pictures_without_deviation():
    with pytest.raises(ValueError, match="found"):
        fitted([torch.zeros(1, 4, 8, 8)], latents(0, 1, 0, (8, 8)))
