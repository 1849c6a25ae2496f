"""The emoji world: captions say what scenes show, and packed weights come back as rounded."""

import pytest
import torch
from lcm_lora.dev.toy import planes, world


def sprites():
    """Squares of one colour in the middle of nothing, one for each kind."""
    made = torch.zeros(len(world.NAMES), 4, 32, 32, dtype=torch.uint8)
    made[:, :, 4:28, 4:28] = torch.tensor([20, 240, 20, 255], dtype=torch.uint8).view(1, 4, 1, 1)
    return made


def drawn(specs, hand="3d", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return world.scenes(sprites(), specs, generator, world.HANDS[hand])


@pytest.mark.parametrize(
    ("kinds", "colour", "pattern", "caption"),
    [
        ((0,), None, None, "a photo of a red apple"),
        ((0, 1), None, 3, "a photo of a red apple and a tangerine"),
        ((0,), 1, 0, "a photo of a red apple on an orange background"),
        ((0,), 5, 2, "a photo of a red apple on blue stripes"),
    ],
)
def test_a_caption_says_what_is_named(kinds, colour, pattern, caption):
    assert world.spec(kinds, colour, pattern, 0).caption == caption


def test_every_kind_has_a_name_of_its_own():
    assert len(set(world.NAMES)) == len(world.KINDS) >= 48


def test_a_named_backdrop_is_drawn_and_another_one_is_random():
    named = [world.spec((0,), 5, 2, 0)] * 6
    pictures, colours, patterns = drawn(named)
    assert pictures.shape == (6, 3, world.SIZE, world.SIZE)
    assert colours.tolist() == [5] * 6 and patterns.tolist() == [2] * 6
    assert 0 <= pictures.min() and pictures.max() <= 1
    _, colours, patterns = drawn([world.spec((0,), None, None, 0)] * 60)
    assert len(set(colours.tolist())) > 6 and set(patterns.tolist()) == set(range(5))


def test_one_object_stands_in_the_middle_and_two_stand_side_by_side():
    green = torch.tensor([20, 240, 20]).view(3, 1, 1) / 255
    grey = [world.spec(kinds, 9, 0, 0) for kinds in ((0,), (0, 1))]
    single, pair = (drawn([spec])[0][0] for spec in grey)
    seen = [((picture - green).abs().sum(0) < 0.1).float() for picture in (single, pair)]
    middle = slice(world.SIZE // 2 - 4, world.SIZE // 2 + 4)
    assert seen[0][:, middle].sum() > 100 > 5 > seen[1][:, middle].sum()
    assert seen[1][:, : world.SIZE // 2].sum() > 100 < seen[1][:, world.SIZE // 2 :].sum()


def test_the_same_generator_draws_the_same_scenes():
    specs = world.specs(4, torch.Generator().manual_seed(1))
    assert torch.equal(drawn(specs)[0], drawn(specs)[0])
    assert not torch.equal(drawn(specs)[0], drawn(specs, seed=1)[0])


def test_a_packed_lora_is_unpacked_as_it_was_but_for_rounding(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    state = {
        "a.lora_up.weight": torch.randn(320, 16, 1, 1),
        "a.lora_down.weight": torch.randn(16, 64, 3, 3),
        "a.alpha": torch.tensor(16.0),
        "b.lora_up.weight": torch.randn(4, 16), "b.lora_down.weight": torch.randn(16, 20),
    }  # fmt: skip
    save_file(state, tmp_path / "lora.safetensors", {"ss_output_name": "made"})
    planes.pack_lora(tmp_path / "lora.safetensors", tmp_path / "packed.safetensors", 6)
    planes.unpack_lora(tmp_path / "packed.safetensors", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == state.keys()
    for name, tensor in state.items():
        assert again[name].shape == tensor.shape
        assert (again[name].float() - tensor).norm() <= 0.04 * tensor.norm(), name
    with safe_open(tmp_path / "again.safetensors", framework="pt") as file:
        assert file.metadata() == {"ss_output_name": "made"}


@pytest.mark.parametrize(("bits", "error"), [(3, 0.25), (4, 0.13), (6, 0.04), (8, 0.01)])
def test_unpack_gives_the_rounded_weights(bits, error):
    torch.manual_seed(0)
    weights = {
        "matrix.weight": torch.randn(10, 64) * 0.05, "conv.weight": torch.randn(8, 64, 3, 3),
        "odd.weight": torch.randn(5, 4, 3, 3), "bias": torch.randn(10),
    }  # fmt: skip
    packed = planes.pack(weights, lambda _: bits)
    assert packed["conv.weight"].numel() * 8 == weights["conv.weight"].numel() * bits
    back = planes.unpack(packed, {name: tensor.shape for name, tensor in weights.items()})
    for name, tensor in weights.items():
        expected = planes.rounded(tensor, bits) if planes.packable(tensor) else tensor
        assert torch.allclose(back[name].float(), expected, rtol=1e-3, atol=1e-6), name
        assert (back[name].float() - tensor).norm() < error * tensor.norm(), name
