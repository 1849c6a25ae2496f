"""One delta: what it stands for, and which factors are refused."""

from __future__ import annotations

import pytest
import torch
from lcm_lora.lora.delta import Delta
from torch import nn


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_matrix_of_a_linear_layer_is_the_scaled_product():
    up, down = rand(6, 3), rand(3, 5)
    delta = Delta(up, down, alpha=1.5)
    assert delta.rank == 3 and delta.scale == 0.5 and delta.shape == (6, 5)
    torch.testing.assert_close(delta.matrix(), 0.5 * up @ down)


def test_scale_is_one_where_the_file_has_no_alpha():
    assert Delta(rand(6, 3), rand(3, 5)).scale == 1.0


@pytest.mark.parametrize("tucker", [False, True])
def test_matrix_of_a_convolution_does_what_the_chain_of_convolutions_does(tucker):
    image = rand(2, 5, 9, 9)
    if tucker:
        delta = Delta(rand(6, 3, 1, 1), rand(3, 5, 1, 1), rand(3, 3, 3, 3), alpha=6.0)
        hidden = nn.functional.conv2d(nn.functional.conv2d(image, delta.down), delta.mid)
    else:
        delta = Delta(rand(6, 3, 1, 1), rand(3, 5, 3, 3), alpha=6.0)
        hidden = nn.functional.conv2d(image, delta.down)
    chain = 2.0 * nn.functional.conv2d(hidden, delta.up)
    assert delta.shape == (6, 5, 3, 3)
    torch.testing.assert_close(
        nn.functional.conv2d(image, delta.matrix()), chain, rtol=1e-4, atol=1e-4
    )


def test_a_tucker_core_folds_into_the_down_factor():
    delta = Delta(rand(6, 3, 1, 1), rand(3, 5, 1, 1), rand(3, 3, 3, 3), alpha=2.0)
    plain = delta.plain()
    assert plain.mid is None and plain.rank == 3 and plain.shape == delta.shape
    torch.testing.assert_close(plain.matrix(), delta.matrix())


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ({"up": (6, 0), "down": (0, 5)}, "rank is 0"),
        ({"up": (6, 3), "down": (4, 5)}, r"do not multiply: up \[6, 3\], down \[4, 5\]"),
        ({"up": (6, 3, 3, 3), "down": (3, 5, 1, 1)}, "do not multiply"),
        ({"up": (6, 3, 1, 1), "down": (3, 5, 1, 1), "mid": (3, 4, 3, 3)}, r"mid \[3, 4, 3, 3\]"),
        ({"up": (6, 3, 1, 1), "down": (3, 5, 3, 3), "mid": (3, 3, 3, 3)}, "do not multiply"),
        ({"up": (6,), "down": (3, 5)}, "at least 2 dimensions"),
    ],
)
def test_factors_that_are_no_delta_are_refused(factors, words):
    with pytest.raises(ValueError, match=words):
        Delta(**{name: torch.zeros(shape) for name, shape in factors.items()})


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_refused(alpha):
    with pytest.raises(ValueError, match="its alpha is"):
        Delta(rand(6, 3), rand(3, 5), alpha=alpha)
