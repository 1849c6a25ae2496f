"""The toy's packed weights: what git holds comes back as it was rounded."""

import pytest
import torch
from lcm_lora.dev.toy import pack, text


def state():
    torch.manual_seed(0)
    return {
        "matrix.weight": torch.randn(10, 64) * 0.05,
        "conv.weight": torch.randn(8, 32, 3, 3),
        "odd.weight": torch.randn(5, 4, 3, 3),
        "bias": torch.randn(10),
    }


@pytest.mark.parametrize(("bits", "error"), [(4, 0.12), (8, 0.01)])
def test_unpack_gives_the_rounded_weights(bits, error):
    weights = state()
    packed = pack.pack(weights, bits)
    back = pack.unpack(packed, {name: tensor.shape for name, tensor in weights.items()})
    for name, tensor in weights.items():
        wanted = pack.rounded(tensor, bits) if pack.packable(tensor) else tensor
        assert torch.allclose(back[name].float(), wanted, rtol=1e-3, atol=1e-6), name
        assert (back[name].float() - tensor).norm() < error * tensor.norm(), name


def test_four_bits_are_half_of_eight():
    weights = state()
    assert pack.pack(weights, 4)["conv.weight"].numel() * 2 == weights["conv.weight"].numel()


def test_a_run_of_zeros_survives():
    back = pack.unpack(pack.pack({"w": torch.zeros(2, 32)}, 4), {"w": torch.Size([2, 32])})
    assert back["w"].abs().max() < 1e-4


def test_rounding_passes_the_gradient_on():
    weight = torch.randn(4, 32, requires_grad=True)
    pack.rounded(weight, 4).sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_the_text_encoder_is_the_same_draw_everywhere():
    """The first numbers, by hand from PCG64's raw bits, which NumPy keeps stable."""
    drawn = text.state_dict()
    token = drawn["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]
    assert token.shape == (49408, 768)
    assert token.float().std() == pytest.approx(0.02, rel=1e-3)
    assert token[0, :4].tolist() == FIRST
    assert len(drawn) == 2 + 12 * 16 + 2


FIRST = [0.0160980224609375, 0.028594970703125, 0.01165008544921875, 0.0170135498046875]
