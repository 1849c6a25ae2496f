"""Files of every dialect: made by the library that owns it, applied here, against its own merge;
and LCM-LoRA-shaped files on the real families' shapes, whole in every dialect."""

import pytest
import torch
from lcm_lora.dev.bench.networks import ARCHITECTURES, RECIPE, SMALL, SMALL_DIFFUSERS
from lcm_lora.tests.host.tiny_lora import dialects_of, patched_weights

diffusers = pytest.importorskip("diffusers", reason="diffusers is a developer's package")
peft = pytest.importorskip("peft", reason="peft is a developer's package")
COUNTS = {"SD1.5": 278, "SSD-1B": 423, "SDXL": 788}


def patcher(config: dict, device: str):
    """A MODEL of the host with a network of this shape."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    kind = comfy.supported_models.SDXL if "num_classes" in config else comfy.supported_models.SD15
    about = kind(config | {"dtype": torch.float32})
    about.manual_cast_dtype = None
    # SDXL's own class differs only in the conditioning, which needs buffers on a real device.
    model = comfy.model_base.BaseModel(about, device=torch.device(device))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


@pytest.fixture(scope="module")
def model(comfy):
    return patcher(SMALL, "cpu")


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**SMALL_DIFFUSERS)


def paths_of(model) -> dict[str, str]:
    """The host's names of the weights, by diffusers' paths."""
    import comfy.utils

    there = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    return {path: f"diffusion_model.{native}" for path, native in there.items()}


def same_merge(model, unet, merged: dict[str, torch.Tensor], file, taken: int) -> None:
    """Applies a file to the host's model with unet's weights, and compares with `merged`."""
    from lcm_lora.lora.formats.files import read
    from lcm_lora.lora.host import apply

    before, keys = unet.state_dict(), paths_of(model)
    state = model.model.state_dict()
    for path, tensor in before.items():
        if keys.get(path) in state:
            state[keys[path]].copy_(tensor)
    patched, _, coverage = apply(model, None, read(file), 1.0, 0.0)
    assert coverage.taken == coverage.total == taken and not coverage.left_over
    weights, changed = patched_weights(patched), set()
    for path, expected in merged.items():
        weight = weights.get(keys.get(path), before[path])
        assert (weight - expected).norm() <= 1e-5 * expected.norm(), path
        if not torch.equal(expected, before[path]):
            changed.add(path.rpartition(".")[0])
    assert len(changed) == taken


@pytest.mark.parametrize("dialect", ["peft", "diffusers", "diffusers with alpha", "kohya"])
def test_a_file_of_peft_and_diffusers_does_what_their_merge_does(model, unet, dialect, tmp_path):
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
    from safetensors.torch import save_file

    # Files of the other dialects have no alpha, or use it as the rank.
    alpha = 6 if dialect == "diffusers with alpha" else 4
    unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=alpha, **RECIPE))
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    state = {k: v.contiguous() for k, v in peft.get_peft_model_state_dict(unet).items()}
    file = tmp_path / "pytorch_lora_weights.safetensors"
    if dialect == "peft":
        save_file({f"base_model.model.{key}": value for key, value in state.items()}, file)
    elif dialect == "kohya":
        prefixed = {f"unet.{key}": value for key, value in state.items()}
        save_file(convert_state_dict_to_kohya(prefixed), file)
    else:
        about = {}
        if alpha != 4:
            about = {"unet_lora_adapter_metadata": unet.peft_config["default"].to_dict()}
        diffusers.StableDiffusionPipeline.save_lora_weights(
            tmp_path, unet_lora_layers=convert_state_dict_to_diffusers(state), **about
        )
    plain = diffusers.UNet2DConditionModel(**SMALL_DIFFUSERS)
    base = {name.replace(".base_layer", ""): tensor for name, tensor in unet.state_dict().items()}
    plain.load_state_dict({name: t for name, t in base.items() if "lora_" not in name})
    layers = {name: m for name, m in unet.named_modules() if hasattr(m, "lora_A")}
    for layer in layers.values():
        layer.merge()
    merged = plain.state_dict() | {f"{n}.weight": m.base_layer.weight for n, m in layers.items()}
    same_merge(model, plain, merged, file, len(layers))
    assert len(layers) > 20


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr", "full"])
def test_a_network_of_lycoris_does_what_its_merge_does(model, unet, algorithm, tmp_path):
    lycoris = pytest.importorskip("lycoris", reason="lycoris-lora is a developer's package")
    from safetensors.torch import save_file

    lycoris.LycorisNetwork.apply_preset({
        "enable_conv": True, "unet_target_module": ["Transformer2DModel", "ResnetBlock2D"],
        "target_module": ["Transformer2DModel", "ResnetBlock2D"], "target_name": [],
    })  # fmt: skip
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    network = lycoris.create_lycoris(
        unet, 1.0, linear_dim=4, linear_alpha=4, conv_dim=4, conv_alpha=4, algo=algorithm,
        use_tucker=True, factor=4,
    )  # fmt: skip
    network.apply_to()
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.1)
    file = tmp_path / "lycoris.safetensors"
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, file)
    count = len(network.loras)
    network.restore()
    network.merge_to(1.0)
    merged = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    assert count > 20
    unet.load_state_dict(before)
    same_merge(model, unet, merged, file, count)


@pytest.fixture(scope="module", params=COUNTS)
def family_and_model(comfy, request):
    """(family, a model of its shapes without numbers)"""
    return request.param, patcher(ARCHITECTURES[request.param], "meta")


def test_lcm_loras_are_taken_completely_in_every_dialect(family_and_model):
    """Factors without numbers, of the shapes of the official files."""
    from lcm_lora.lora.formats.parse import parse
    from lcm_lora.lora.host import apply
    from lcm_lora.training.adapter import Adapter

    family, model = family_and_model
    network = model.model.diffusion_model
    weights = {name.removesuffix(".weight"): p.shape for name, p in network.named_parameters()}
    adapted = set(Adapter(network, 1, 1.0).names)
    native, pairs = {}, {}
    for path, key in paths_of(model).items():
        name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        if name in adapted and key.endswith(".weight"):
            path = path.removesuffix(".weight")
            out, columns, *kernel = weights[name]
            native[path] = name
            pairs[path] = (
                torch.empty(out, 64, *[1] * len(kernel), device="meta"),
                torch.empty(64, columns, *kernel, device="meta"),
            )
    files = dialects_of(pairs, native)
    assert len(files) == 6
    for dialect, tensors in files.items():
        patched, _, coverage = apply(model, None, parse(tensors, {}, dialect), 1.0, 0.0)
        assert coverage.taken == coverage.total == COUNTS[family], (dialect, str(coverage))
        assert len(patched.patches) == COUNTS[family] and not coverage.left_over
