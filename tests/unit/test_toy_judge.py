"""The judge: the Frechet distance against closed forms and SciPy."""

import numpy as np
import pytest
import torch
from lcm_lora.dev.toy.judge import frechet, moments, unbiased


def sample(seed, n=500, d=6):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator)
    return torch.randn(n, d, generator=generator) @ mix + torch.randn(d, generator=generator)


def test_a_distribution_is_at_no_distance_from_itself():
    a = moments(sample(0))
    assert frechet(a, a) == pytest.approx(0, abs=1e-8)


def test_a_shift_counts_its_squared_length():
    a = sample(0)
    assert frechet(moments(a), moments(a + 2.0)) == pytest.approx(4.0 * a.shape[1], rel=1e-6)


def test_it_is_the_textbook_formula():
    linalg = pytest.importorskip("scipy.linalg", reason="SciPy comes with ComfyUI")
    (mean_a, a), (mean_b, b) = (moments(sample(seed)) for seed in (1, 2))
    root = np.real(linalg.sqrtm(a.numpy() @ b.numpy()))
    expected = (mean_a - mean_b).square().sum() + np.trace(a + b - 2 * root)
    assert frechet((mean_a, a), (mean_b, b)) == pytest.approx(float(expected), rel=1e-6)


def test_few_pictures_are_judged_as_many_would_be():
    """Two normal distributions a known distance apart, 100 samples where 10,000 would be needed."""
    generator = torch.Generator().manual_seed(3)
    real = torch.zeros(24), torch.eye(24).double()
    few = torch.randn(20, 100, 24, generator=generator) * 1.2 + 0.1
    expected = 24 * 0.1**2 + 24 * 0.2**2
    plain = [frechet(moments(part), real) for part in few]
    better = [unbiased(part, real) for part in few]
    assert sum(plain) / 20 > 2.5 * expected
    assert sum(better) / 20 == pytest.approx(expected, rel=0.25)
