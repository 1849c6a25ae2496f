"""What the header of a checkpoint tells."""

import pytest
import torch
from lcm_lora.training.checkpoint_file import NETWORK, CheckpointFile
from safetensors.torch import save_file

ATTENTION = "transformer_blocks.{}.attn2.to_k.weight"


def written(path, weights):
    save_file({f"{NETWORK}{name}": tensor for name, tensor in weights.items()}, path)
    return path


def made(path, width, depths, more=None):
    """A checkpoint whose down blocks have so many transformer blocks, by their place."""
    weights = {
        f"input_blocks.{place}.1.{ATTENTION.format(block)}": torch.zeros(8, width)
        for place, depth in depths.items()
        for block in range(depth)
    }
    return written(path, weights | (more or {}))


BIAS = "output_blocks.11.1.transformer_blocks.0.norm1.bias"


@pytest.mark.parametrize(
    ("width", "depths", "more", "expected"),
    [
        (768, {1: 1, 8: 1}, {}, ("SD1.5", 512)),
        (1024, {1: 1}, {BIAS: torch.linspace(-1, 1, 320)}, ("SD2", 768)),
        (1024, {1: 1}, {BIAS: torch.linspace(-0.01, 0.01, 320)}, ("SD2", 512)),
        (2048, {4: 2, 5: 2, 7: 10, 8: 10}, {}, ("SDXL", 1024)),
        (2048, {4: 2, 7: 4, 8: 4}, {}, ("SSD-1B", 1024)),
    ],
)
def test_architecture_and_its_resolution(tmp_path, width, depths, more, expected):
    file = CheckpointFile.read(made(tmp_path / "c.safetensors", width, depths, more))
    assert (file.architecture, file.resolution) == expected
    assert file.width == width


def test_what_is_no_such_checkpoint_is_said(tmp_path):
    other = written(tmp_path / "other.safetensors", {"double_blocks.0.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"architecture of other.safetensors is not known"):
        CheckpointFile.read(other)
    broken = tmp_path / "old.ckpt"
    broken.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match=r"old.ckpt is not a complete safetensors file"):
        CheckpointFile.read(broken)
