"""Vectors with tensors on a device, as from the host's trainer, mixed with others."""

import pytest
import torch
from lcm_lora.lora.combine import elementwise, exact
from lcm_lora.lora.elementwise.table import RULES
from lcm_lora.lora.formats.files import write
from lcm_lora.lora.formats.wire import from_wire
from lcm_lora.lora.protect import protected
from lcm_lora.lora.reduce import truncated
from lcm_lora.tests.unit.elsewhere import Elsewhere

Q, NORM = (f"lora_unet_down_blocks_0_attentions_0_{end}" for end in ("proj_in", "norm"))


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


@pytest.mark.gpu
def test_vectors_on_a_gpu_combine_on_the_cpu():
    wires = {key: t.cuda() for key, t in tensors(0).items()}, tensors(1)
    summed, _ = exact([from_wire(wire) for wire in wires], [1.0, 0.5])
    assert summed.deltas[Q].up.device.type == "cpu"
