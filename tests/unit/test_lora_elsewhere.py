"""Vectors with tensors on a device, as from the host's trainer, mixed with others."""

import pytest
import torch
from lcm_lora.lora.combine import elementwise, exact
from lcm_lora.lora.elementwise.table import RULES
from lcm_lora.lora.extract import extract
from lcm_lora.lora.formats.files import write
from lcm_lora.lora.formats.wire import from_wire
from lcm_lora.lora.protect import protected
from lcm_lora.lora.reduce import truncated
from lcm_lora.tests.unit.elsewhere import Elsewhere
from torch.overrides import TorchFunctionMode

Q, NORM = (f"lora_unet_down_blocks_0_attentions_0_{end}" for end in ("proj_in", "norm"))
THERE = torch.device("cpu", 0)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{Q}.lora_up.weight": torch.randn(20, 2, generator=generator),
        f"{Q}.lora_down.weight": torch.randn(2, 12, generator=generator),
        f"{NORM}.diff": torch.randn(20, generator=generator),
    }


def there(wire: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: Elsewhere(tensor) for key, tensor in wire.items()}


def test_the_device_of_these_tests_is_as_strict_as_a_real_one():
    one = Elsewhere(torch.ones(3))
    assert one.device.type == "mps" and torch.equal((one + one).cpu(), torch.full((3,), 2.0))
    with pytest.raises(TypeError, match="no float64"):
        one.double()
    with pytest.raises(RuntimeError, match="on MPS and on the CPU"):
        one + torch.ones(3)


def test_vectors_on_different_devices_combine_on_the_cpu(tmp_path):
    wires = there(tensors(0)), tensors(1)
    here = [from_wire(tensors(seed)) for seed in (0, 1)]
    both = [from_wire(wire) for wire in wires]
    results = []
    for vectors in (both, here):
        summed = exact(vectors, [1.0, 0.5])[0]
        ties = elementwise(vectors, [1.0, 0.5], RULES["ties"], 0.5, 0, 3, torch.device("cpu"))[0]
        results.append([summed, ties, truncated(summed, 2)[0], protected(*vectors, 0.5)[0]])
    for actual, expected in zip(*results, strict=True):
        for name, delta in expected.deltas.items():
            assert actual.deltas[name].up.device.type == "cpu"
            torch.testing.assert_close(actual.deltas[name].matrix(), delta.matrix())
        for key, diff in expected.diffs.items():
            torch.testing.assert_close(actual.diffs[key], diff)
    write(tmp_path / "a.safetensors", results[0][0], "fp32", False)
    assert all(isinstance(t, Elsewhere) for t in wires[0].values()), "the wire itself is left alone"


def test_a_parameter_that_is_being_trained_is_taken_without_its_gradient():
    wire = {key: torch.nn.Parameter(t) for key, t in tensors(0).items()}
    summed, _ = exact([from_wire(wire)], [2.0])
    assert not summed.deltas[Q].up.requires_grad


class Moves(TorchFunctionMode):
    """Notes how many numbers each tensor has that is moved to THERE: the CPU by another name."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.to and args[1:] == (THERE,):
            self.sizes.append(args[0].numel())
        return function(*args, **kwargs or {})


def test_only_factors_are_moved_to_the_device_of_a_merge():
    vectors = [from_wire(tensors(seed)) for seed in (0, 1)]
    with Moves() as moves:
        elementwise(vectors, [1.0, 0.5], RULES["ties"], 0.5, 0, 3, THERE)
    assert sorted(moves.sizes) == [24, 24, 40, 40]  # their products have 240 numbers


def test_differences_are_decomposed_on_the_device():
    with Moves() as moves:
        extract([(Q, torch.randn(30, 50), torch.randn(30))], 4, 0, "x", THERE)
    assert moves.sizes == [1500]


@pytest.mark.gpu
def test_vectors_on_a_gpu_combine_on_the_cpu():
    wires = {key: t.cuda() for key, t in tensors(0).items()}, tensors(1)
    summed, _ = exact([from_wire(wire) for wire in wires], [1.0, 0.5])
    assert summed.deltas[Q].up.device.type == "cpu"


@pytest.mark.gpu
def test_a_gpu_merges_and_extracts_what_the_cpu_does():
    vectors, change = [from_wire(tensors(seed)) for seed in (0, 1)], torch.randn(300, 40)
    results = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        merged = elementwise(vectors, [1.0, 0.5], RULES["ties"], 0.5, 0, 3, device)[0]
        results.append((merged, extract([(Q, change, None)], 4, 0, "x", device)[0]))
    for here, there in zip(*results, strict=True):
        assert there.deltas[Q].up.device.type == "cpu"
        torch.testing.assert_close(
            there.deltas[Q].matrix(), here.deltas[Q].matrix(), rtol=1e-3, atol=1e-3
        )
