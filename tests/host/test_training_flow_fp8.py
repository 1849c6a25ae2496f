"""A flow model whose weights are stored in fp8: frozen as they are, with the same numbers."""

import json
import re

import pytest
import torch
from lcm_lora.tests.host import sd3_file
from lcm_lora.training.adapter import OF_BLOCKS, Adapter
from lcm_lora.training.data.bank import together
from safetensors.torch import load_file, save_file

NETWORK = "model.diffusion_model."


@pytest.fixture(scope="module")
def halves(comfy, tmp_path_factory):
    """The state of a small SD3, float16, and a folder for other files of it."""
    folder = tmp_path_factory.mktemp("fp8")
    return load_file(sd3_file.write(folder / "half.safetensors")), folder


@pytest.fixture(autouse=True)
def _training_flag(comfy, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "in_training", False)


def is_linear(key, weight):
    return weight.dim() == 2 and re.search(OF_BLOCKS, key.removeprefix(NETWORK)) is not None


def plain(halves):
    """All weights of the network as float8_e4m3fn, as many files of Flux have them."""
    state, folder = halves
    small = {
        key: weight.to(torch.float8_e4m3fn) if key.startswith(NETWORK) else weight
        for key, weight in state.items()
    }
    save_file(small, folder / "plain.safetensors")
    return folder / "plain.safetensors"


def packed(halves, kind):
    """The linear layers of the blocks in one of ComfyUI's packed formats; -> the file, and one of
    the numbers that these stand for."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    state, folder = halves
    layout, made, same = QUANT_ALGOS[kind]["comfy_tensor_layout"], {}, {}
    options = {"scale": "recalculate"} if kind.startswith("float8") else {}
    for key, weight in state.items():
        made[key] = same[key] = weight
        if key.startswith(NETWORK) and is_linear(key, weight):
            base = key.removesuffix("weight")
            tensor = QuantizedTensor.from_float(weight.float(), layout, **options)
            del made[key]
            made |= tensor.state_dict(key)
            about = json.dumps({"format": kind}).encode()
            made[f"{base}comfy_quant"] = torch.tensor(list(about), dtype=torch.uint8)
            same[key] = tensor.dequantize().float().contiguous()
    paths = folder / f"{kind}.safetensors", folder / f"{kind}-same.safetensors"
    for path, content in zip(paths, (made, same), strict=True):
        save_file(content, path)
    return paths


def answer(teacher):
    z = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    texts = together([teacher.text("a red fox"), teacher.text("a car")])
    with torch.no_grad():
        cond, _ = teacher.conditions(texts, torch.zeros(2, 6))
        return teacher(z, torch.tensor([839, 385]), **cond)


def checked(teacher):
    from lcm_lora.training.gradient_check import gradient_error, require_right_gradients

    adapter = Adapter(teacher.network, 2, 2.0, 0, teacher.targets)
    try:
        assert len(adapter.names) == 17
        require_right_gradients(teacher, adapter)
        assert gradient_error(teacher, adapter) < 1e-3
    finally:
        adapter.detach()


def test_plain_fp8_stays_fp8_and_has_the_same_numbers(halves):
    from lcm_lora.training.host import load_teacher

    file = plain(halves)
    small, wide = load_teacher(file), load_teacher(file, "fp32")
    layer = "joint_blocks.0.x_block.mlp.fc1"
    assert small.network.get_submodule(layer).weight.dtype == torch.float8_e4m3fn
    assert wide.network.get_submodule(layer).weight.dtype == torch.float32
    assert small.weight_bytes < 0.3 * wide.weight_bytes
    assert (small.dtype, wide.dtype) == (torch.float32, torch.float32)
    assert torch.equal(answer(small), answer(wide))
    assert torch.equal(answer(load_teacher(file, offload="on")), answer(wide))
    checked(small)


def test_scaled_fp8_is_trained_on_as_the_numbers_that_it_stands_for(halves):
    from lcm_lora.training.host import load_teacher

    file, same = packed(halves, "float8_e4m3fn")
    small, wide = load_teacher(file), load_teacher(same, "fp32")
    assert small.weight_bytes < wide.weight_bytes
    torch.testing.assert_close(answer(small), answer(wide), rtol=1e-4, atol=1e-4)
    lent = load_teacher(file, offload="on")
    assert torch.equal(answer(lent), answer(small))
    checked(lent)
    checked(small)
    # ComfyUI's own way, where it multiplies in fp8, would round what the layers are given.
    layers = [m for m in small.network.modules() if getattr(m, "quant_format", None)]
    assert len(layers) == 17
    for layer in layers:
        layer._full_precision_mm = False
    torch.testing.assert_close(answer(small), answer(wide), rtol=1e-4, atol=1e-4)
    for layer in layers:
        layer.comfy_force_cast_weights = False
    assert (answer(small) - answer(wide)).abs().max() > 1e-3


def test_other_packed_weights_are_refused(halves):
    from comfy.quant_ops import QUANT_ALGOS
    from lcm_lora.training.host import load_teacher

    others = [kind for kind in QUANT_ALGOS if kind in ("int8_tensorwise", "mxfp8")]
    if not others:
        pytest.skip("this ComfyUI has no other format that a small network fits")
    for kind in others:
        with pytest.raises(ValueError, match=f"packed as {kind}, which .* or the fp8 file"):
            load_teacher(packed(halves, kind)[0])


def test_a_job_computes_in_the_precision_that_it_asks_for(halves):
    """ComfyUI itself would compute in float32 on a CPU."""
    from lcm_lora.training.host import load_teacher

    teacher = load_teacher(halves[1] / "half.safetensors", "bf16")
    assert teacher.dtype == torch.bfloat16
    seen = []
    layer = teacher.network.get_submodule("joint_blocks.0.x_block.mlp.fc1")
    hook = layer.register_forward_hook(lambda _layer, _inputs, output: seen.append(output.dtype))
    answer(teacher)
    hook.remove()
    assert set(seen) == {torch.bfloat16}
