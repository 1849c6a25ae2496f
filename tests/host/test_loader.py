"""Load LCM-LoRA: the file on the model, the sampling set, and changed files noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
from lcm_lora.tests.host.tiny_lora import dialects, modules, tiny_model
from safetensors.torch import save_file

NAME = "lcm-lora-loader-test.safetensors"


@pytest.fixture(scope="module")
def model(comfy):
    return tiny_model()


@pytest.fixture
def path(comfy) -> Path:
    import folder_paths

    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    return folder / NAME


@pytest.mark.parametrize("family", ["auto", "lcm"])
def test_it_applies_the_whole_file_and_sets_the_sampling(model, path, family):
    from lcm_lora.nodes.loader import LCMLoRALoader

    save_file(dialects(model)["diffusers"], path)
    (loaded,) = LCMLoRALoader.execute(model, NAME, 1.0, family).result
    assert len(loaded.patches) == len(modules(model))
    sampling = loaded.get_model_object("model_sampling")
    assert type(sampling) is not type(model.get_model_object("model_sampling"))
    assert not model.patches and not model.object_patches


def test_a_bad_file_is_explained(model, path):
    from lcm_lora.nodes.loader import LCMLoRALoader

    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"{NAME} is empty"):
        LCMLoRALoader.execute(model, NAME, 1.0, "auto")


def test_an_overwritten_file_counts_as_changed(model, path):
    from lcm_lora.nodes.loader import LCMLoRALoader

    def fingerprint():
        # The host passes every input, and None for those that are linked.
        return LCMLoRALoader.fingerprint_inputs(
            model=None, lora_name=NAME, strength=1.0, family="auto"
        )

    save_file(dialects(model)["kohya"], path)
    before = fingerprint()
    assert fingerprint() == before
    save_file(dialects(model, seed=1)["kohya"], path)
    assert fingerprint() != before


def test_only_files_it_can_read_are_offered(comfy, model, path):
    from lcm_lora.nodes.loader import LCMLoRALoader

    save_file(dialects(model)["kohya"], path)
    path.with_suffix(".ckpt").write_bytes(b"")
    options = LCMLoRALoader.INPUT_TYPES()["required"]["lora_name"][1]["options"]
    assert NAME in options and not any(name.endswith(".ckpt") for name in options)
