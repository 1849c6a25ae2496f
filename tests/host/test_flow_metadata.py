"""What files of flow models say of themselves: merged, extracted, saved, and loaded again."""

from __future__ import annotations

import pytest
import torch
from lcm_lora.tests.host.flow_models import dialects, file_of, flow_model
from lcm_lora.tests.host.tiny_lora import patched_weights
from safetensors import safe_open
from safetensors.torch import save_file

HYPER, STYLE = "Hyper-FLUX.1-dev-8steps-lora.safetensors", "style of flux.safetensors"


@pytest.fixture
def flux(comfy):
    """A small Flux, with a few-step LoRA and a style for it in the loras folder."""
    model = flow_model("Flux")
    names = dialects(model)
    files = {HYPER: names["diffusers"], STYLE: names["kohya"]}
    own = {"modelspec.architecture": "flux-1-dev/lora", "ss_base_model_version": "flux1"}
    for seed, (name, keys) in enumerate(files.items()):
        save_file(file_of(model, keys, seed=seed), comfy.loras / name, own)
    yield model
    for path in comfy.loras.glob("*.safetensors"):
        path.unlink()


def metadata_of(path) -> dict:
    with safe_open(path, "pt") as file:
        return file.metadata()


def saved(vector, name: str) -> str:
    from lcm_lora.nodes.vectors import LCMLoRASave

    return LCMLoRASave.execute(vector, name, "fp32", True).result[0]


def loaded(model, name: str, strength: float):
    """(MODEL, lines) of Load LCM-LoRA with the family `auto`."""
    from lcm_lora.nodes.loader import LCMLoRALoader

    output = LCMLoRALoader.execute(model, name, strength, "auto")
    return output.result[0], [text.format(**v) for text, v, _ in output.ui["lcm_lora_text"]]


def vector(name: str):
    from lcm_lora.nodes.vectors import LCMLoRAVectorLoader

    return LCMLoRAVectorLoader.execute(name).result[0]


@pytest.mark.parametrize("method", ["exact", "svd", "ties"])
def test_a_merged_file_carries_recipe_family_and_sampling(flux, comfy, method):
    from lcm_lora.lora.formats.wire import from_wire, to_wire
    from lcm_lora.lora.methods import Settings, combine

    parts = [from_wire(vector(name)) for name in (HYPER, STYLE)]
    total, *_ = combine(parts, [0.125, 0.8], Settings(method, rank=16 * (method != "exact")),
                       torch.device("cpu"))  # fmt: skip
    name = saved(to_wire(total), "merged")
    said = metadata_of(comfy.loras / name)
    assert said["modelspec.architecture"] == "flux-1-dev/lora"
    assert said["ss_base_model_version"] == "flux1"
    assert said["lcm_lora.family"] == "hyper-flux"
    assert said["lcm_lora.made_for_steps"] == "8"
    assert said["lcm_lora.acceleration_weight"] == "0.125"
    assert HYPER in said["lcm_lora_recipe"] and STYLE in said["lcm_lora_recipe"]
    # It has the weight in it, so it is loaded with strength 1.
    _, lines = loaded(flux, name, 1.0)
    assert lines[1:] == [
        "from the file's metadata, lcm_lora.family",
        "the model's own shift: hyper-flux sets none",
    ]
    assert loaded(flux, name, 0.125)[1][-1] == "hyper-flux is made for strength 1: change strength."


def test_the_sum_of_a_stack_is_loaded_as_the_stack_is(flux):
    from lcm_lora.nodes.rows import LCMLoRAStack

    row = {"count": "1", "on_1": True, "lora_1": STYLE, "weight_1": 0.8, "text_weight_1": 0.8}
    stacked, _, total, _ = LCMLoRAStack.execute(flux, HYPER, 0.125, "auto", row).result
    model, lines = loaded(flux, saved(total, "stacked"), 1.0)
    assert len(lines) == 3 and lines[1] == "from the file's metadata, lcm_lora.family"
    one, other = patched_weights(model), patched_weights(stacked)
    assert one.keys() == other.keys() and one
    for key, weight in one.items():
        assert (weight - other[key]).norm() <= 1e-5 * other[key].norm()
    sampling = (m.get_model_object("model_sampling") for m in (model, stacked))
    assert len({each.family.name for each in sampling}) == 1


def test_a_sum_of_sums_multiplies_the_weights(flux, comfy):
    from lcm_lora.nodes.combine import LCMLoRACombine

    def combined(*parts):
        count = {"count": str(len(parts))}
        for number, (part, weight) in enumerate(parts, 1):
            count |= {f"vector_{number}": part, f"weight_{number}": weight}
        return LCMLoRACombine.execute(count, "exact", 0, 1.0).result[0]

    half = combined((vector(HYPER), 0.5), (vector(STYLE), 1.0))
    name = saved(combined((half, 0.25), (vector(STYLE), -0.2)), "twice")
    assert metadata_of(comfy.loras / name)["lcm_lora.acceleration_weight"] == "0.125"


def test_an_extracted_file_names_the_architecture_and_how_it_was_made(flux, comfy):
    from lcm_lora.nodes.extract import LCMLoRAExtract

    fast, _ = loaded(flux, HYPER, 0.125)
    name = saved(LCMLoRAExtract.execute(fast, flux, 8).result[0], "extracted Hyper-FLUX")
    said = metadata_of(comfy.loras / name)
    assert said["modelspec.architecture"] == "flux-1/lora"
    assert said["lcm_lora_method"].startswith("extracted, rank 8")


@pytest.mark.parametrize(
    ("kind", "written"),
    [("SD3", "stable-diffusion-3"), ("QwenImage", "Qwen-Image"), ("WAN21_T2V", "wan2.1"),
     ("ZImage", "Z-Image"), ("Chroma", "chroma"), ("Krea2", "krea2"), ("Flux2", "flux-2")],
)  # fmt: skip
def test_each_file_names_its_architecture(comfy, tmp_path, kind, written):
    from lcm_lora.lora.formats.files import read, write
    from lcm_lora.lora.formats.parse import parse

    model = flow_model(kind)
    # A small Z-Image has the native names of a small Lumina2.
    tensors = file_of(model, dialects(model)["diffusers" if kind == "ZImage" else "native"])
    own = {
        "": f"{written}/lora",
        "stable-diffusion-xl-v1-base/lora": f"{written}/lora",
        f"{written.upper()}-variant/lora": f"{written.upper()}-variant/lora",
    }
    for named, expected in own.items():
        metadata = {"modelspec.architecture": named} if named else {}
        write(tmp_path / "a.safetensors", parse(tensors, metadata, "a"), "fp32", True)
        again = read(tmp_path / "a.safetensors")
        assert again.metadata["modelspec.architecture"] == expected
