"""The loss curve on Distillation Job Status."""

from __future__ import annotations

import numpy as np
import pytest
from lcm_lora.nodes.chart import EDGE, LINE, SIZE, chart
from PIL import ImageColor


def line(points) -> np.ndarray:
    """(x, y) of the pixels in the line's own colour."""
    pixels = np.asarray(chart(points, "loss"))
    rows, columns = np.nonzero((pixels == ImageColor.getrgb(LINE)).all(-1))
    return np.stack([columns, rows], 1)


def test_the_line_fills_the_frame_and_bends_where_the_values_do():
    pixels = line([(0, 1.0), (50, 0.1), (100, 0.01)])  # straight on a logarithmic scale
    assert pixels.min(0) == pytest.approx([EDGE, EDGE], abs=2)
    assert pixels.max(0) == pytest.approx([SIZE[0] - EDGE, SIZE[1] - EDGE], abs=2)
    middle = pixels[np.abs(pixels[:, 0] - SIZE[0] // 2) <= 1]
    assert middle[:, 1] == pytest.approx(np.full(len(middle), SIZE[1] / 2), abs=3)


def test_equal_values_are_a_level_line():
    pixels = line([(1, 0.5), (2, 0.5)])
    assert np.ptp(pixels[:, 1]) <= 2 and abs(pixels[:, 1].mean() - SIZE[1] / 2) <= 2


@pytest.mark.parametrize("points", [[(1, 0.5)], [(1, None), (2, 0.0), (3, 0.5)]])
def test_a_single_value_is_a_dot_in_the_middle(points):
    pixels = line(points)
    assert pixels.mean(0) == pytest.approx([SIZE[0] / 2, SIZE[1] / 2], abs=1)
    assert pixels.max(0) - pixels.min(0) == pytest.approx([8, 8], abs=1)


@pytest.mark.parametrize("points", [[], [(1, None), (2, 0.0)]])
def test_without_a_value_there_is_no_line(points):
    assert not len(line(points))
