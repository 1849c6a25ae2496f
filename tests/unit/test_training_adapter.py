"""The switchable adapter: nothing changes while it is off, the LoRA's delta is added while on."""

from contextlib import nullcontext

import pytest
import torch
from lcm_lora.training.adapter import Adapter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Block(nn.Module):
    """One layer of each sort, under the names a UNet gives them."""

    def __init__(self):
        super().__init__()
        self.proj_in = nn.Conv2d(4, 6, 1)
        self.in_layers = nn.Sequential(nn.SiLU(), nn.Identity(), nn.Conv2d(6, 5, 3, 2, 1))
        self.to_out = nn.Sequential(nn.Linear(5, 7))
        self.attn1 = nn.Module()
        self.attn1.to_q = nn.Linear(5, 7)
        self.norm = nn.GroupNorm(1, 5)

    def forward(self, x):
        x = self.norm(self.in_layers(self.proj_in(x)))
        return self.attn1.to_q(x.flatten(2).transpose(1, 2))


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block()


X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def moved(adapter):
    """An adapter with something learned: the fresh one is zero."""
    generator = torch.Generator().manual_seed(2)
    for layer in adapter.layers:
        nn.init.normal_(layer.up, std=0.1, generator=generator)
    return adapter


def test_a_fresh_adapter_changes_nothing(block):
    before = block(X)
    Adapter(block, rank=3)
    assert torch.allclose(block(X), before, atol=1e-6)


def test_off_is_the_plain_network_and_on_is_not(block):
    before = block(X)
    adapter = moved(Adapter(block, rank=3))
    assert (block(X) - before).abs().max() > 1e-3
    with adapter.off():
        assert torch.allclose(block(X), before, atol=1e-6)
    assert adapter.on


class Casts(TorchDispatchMode):
    """Counts the tensors that are cast one by one."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_that_are_cast_once_learn_the_same_bits(block, dtype):
    """Two parts of a batch; the first call of each needs no gradient, like the target's."""
    adapter, counts, learned = moved(Adapter(block.to(dtype), rank=3)), [], []
    parts = X.to(dtype).split(1)
    for inside in (nullcontext, lambda: adapter.cast(dtype)):
        adapter.zero_grad()
        with Casts() as casts:
            for part in parts:
                with inside():
                    with torch.no_grad():
                        target = 0.5 * block(part)
                    (block(part) - target).square().mean().backward()
        counts.append(casts.count)
        learned.append([p.grad for p in adapter.parameters()])
    assert all(torch.equal(*both) for both in zip(*learned, strict=True))
    assert all(p.grad.dtype == torch.float32 for p in adapter.parameters())
    one_by_one = 0 if dtype == torch.float32 else 6 * 2 * 3  # factors, parts, 2 calls and backward
    assert counts == [one_by_one, 0]


def test_a_cast_ends_when_the_body_raises(block):
    adapter = Adapter(block, rank=3)
    with pytest.raises(KeyError), adapter.cast(torch.bfloat16):
        raise KeyError
    assert all(layer.cast is None for layer in adapter.layers)


def test_off_ends_when_the_body_raises(block):
    adapter = Adapter(block, rank=3)
    with pytest.raises(KeyError), adapter.off():
        raise KeyError
    assert adapter.on


def test_the_layers_equal_the_delta_added_to_the_weights(block):
    adapter = moved(Adapter(block, rank=3, alpha=6.0))
    expected = block(X)
    adapter.detach()
    layers = dict(block.named_modules())
    with torch.no_grad():
        for name, up, down in adapter.tensors():
            delta = torch.einsum("or,r...->o...", up.flatten(1), down) * 6.0 / 3
            layers[name].weight += delta
    assert torch.allclose(block(X), expected, atol=1e-5)


def test_only_the_adapter_learns(block):
    adapter = moved(Adapter(block, rank=3))
    block(X).square().mean().backward()
    assert all(p.grad is None for p in block.parameters())
    assert all(p.grad.abs().sum() > 0 for p in adapter.parameters())


def test_it_takes_the_target_layers_only(block):
    assert Adapter(block, rank=3).names == ["proj_in", "in_layers.2", "attn1.to_q"]


def test_a_network_without_targets_is_refused():
    with pytest.raises(ValueError, match="Stable Diffusion"):
        Adapter(nn.Sequential(nn.Linear(3, 3)), rank=3)


def test_a_rank_of_zero_is_refused(block):
    with pytest.raises(ValueError, match="at least 1, found 0"):
        Adapter(block, rank=0)
