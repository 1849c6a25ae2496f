"""Load LCM-LoRA: the file on the model, the sampling set, and changed files noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lcm_lora.tests.host.tiny_lora import UNET, dialects, modules, tiny_model
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


def shown_lines(output) -> list[str]:
    """The lines that a node's output has for the page."""
    return [text.format(**values) for text, values, _ in output.ui["lcm_lora_text"]]


def family_of(model) -> str:
    return model.get_model_object("model_sampling").family.name


@pytest.mark.parametrize("family", ["auto", "lcm"])
def test_it_applies_the_whole_file_and_sets_the_sampling(model, path, family):
    from lcm_lora.nodes.loader import LCMLoRALoader

    save_file(dialects(model)["diffusers"], path)
    (loaded,) = LCMLoRALoader.execute(model, NAME, 1.0, family).result
    assert len(loaded.patches) == len(modules(model))
    sampling = loaded.get_model_object("model_sampling")
    assert type(sampling) is not type(model.get_model_object("model_sampling"))
    assert not model.patches and not model.object_patches


@pytest.mark.parametrize(
    ("name", "metadata", "chosen", "family", "why"),
    [
        (NAME, {}, "auto", "lcm", "from the name lcm-lora-loader-test"),
        (NAME, {"lcm_lora.family": "phased"}, "auto", "phased", "from the file's metadata, lcm_l"),
        (NAME, {"lcm_lora.family": "phased"}, "tcd", "tcd", "chosen on this node"),
        ("Hyper-SD15-1step.safetensors", {}, "auto", "hyper-sd-1step", "from the name Hyper-SD15"),
        ("some.safetensors", {"modelspec.title": "DMD2"}, "auto", "dmd2", "modelspec.title"),
        ("some.safetensors", {}, "auto", "lcm", "neither the file's metadata nor"),
    ],
)
def test_it_finds_the_family_and_says_why(model, path, name, metadata, chosen, family, why):
    from lcm_lora.nodes.loader import LCMLoRALoader

    save_file(dialects(model)["kohya"], path.with_name(name), metadata or None)
    output = LCMLoRALoader.execute(model, name, 1.0, chosen)
    (loaded,) = output.result
    assert family_of(loaded) == family
    verdict, reason = shown_lines(output)
    count = len(modules(model))
    assert verdict == f"{family}: {count} of {count} modules applied" and why in reason


def test_a_combined_file_is_sampled_as_its_acceleration_or_asks(model, path):
    from lcm_lora.nodes.combine import LCMLoRACombine
    from lcm_lora.nodes.loader import LCMLoRALoader
    from lcm_lora.nodes.vectors import (
        LCMLoRAApply,
        LCMLoRASave,
        LCMLoRAVectorLoader,
    )

    names = ["tcd-sd15.safetensors", "style.safetensors", "pcm_sd15_4step.safetensors"]
    vectors = []
    for seed, name in enumerate(names):
        save_file(dialects(model, seed=seed)["kohya"], path.with_name(name))
        vectors.append(LCMLoRAVectorLoader.execute(name).result[0])
    (style,) = shown_lines(LCMLoRAApply.execute(model, vectors[1], 1.0, 1.0))
    (fast,) = shown_lines(LCMLoRAApply.execute(model, vectors[0], 1.0, 1.0))
    assert fast == f"tcd: {style}"

    def saved(style_or_other) -> str:
        rows = {"count": "2", "vector_1": vectors[0], "vector_2": style_or_other}
        summed = LCMLoRACombine.execute(
            rows | {"weight_1": 1.0, "weight_2": 0.8}, "exact", 0, 1.0
        ).result[0]
        return LCMLoRASave.execute(summed, "combined", "fp32", True).result[0]

    (loaded,) = LCMLoRALoader.execute(model, saved(vectors[1]), 1.0, "auto").result
    assert family_of(loaded) == "tcd"
    with pytest.raises(ValueError, match=r"as 'pcm \+ tcd'.*Choose the family"):
        LCMLoRALoader.execute(model, saved(vectors[2]), 1.0, "auto")
    (loaded,) = LCMLoRALoader.execute(model, "combined.safetensors", 1.0, "pcm").result
    assert family_of(loaded) == "pcm"


def applied(model, path, name, strength=1.0, metadata=None, seed=0):
    """The MODEL from Apply LoRA Vector with the file of this name."""
    from lcm_lora.nodes.vectors import LCMLoRAApply, LCMLoRAVectorLoader

    save_file(dialects(model, seed=seed)["kohya"], path.with_name(name), metadata)
    (vector, _) = LCMLoRAVectorLoader.execute(name).result
    return LCMLoRAApply.execute(model, vector, strength, 1.0).result[0]


def test_apply_hands_the_family_to_auto_and_to_the_samplers(model, path):
    from lcm_lora.nodes.sampling import LCMModelSampling
    from lcm_lora.samplers.host import auto_family, family_for

    hyper = applied(model, path, "Hyper-SD15-8steps-CFG-lora.safetensors")
    assert family_for(hyper).name == "hyper-sd" and family_for(model).name == "lcm"
    output = LCMModelSampling.execute(hyper, "auto")
    assert family_of(output.result[0]) == "hyper-sd"
    assert shown_lines(output) == ["hyper-sd, from Hyper-SD15-8steps-CFG-lora"]
    # A style after it, and a clone by any other node, leave it as it is.
    styled = applied(hyper, path, "style.safetensors", seed=1).clone()
    assert auto_family(styled) == "hyper-sd"
    # What the user chose stays, with a word about it.
    output = LCMModelSampling.execute(hyper, "lcm")
    assert family_of(output.result[0]) == "lcm"
    (doubt,) = shown_lines(output)
    assert doubt == "Hyper-SD15-8steps-CFG-lora is hyper-sd, not lcm: choose auto."
    output = LCMModelSampling.execute(model, "auto")
    assert family_of(output.result[0]) == "lcm"
    assert shown_lines(output) == ["lcm: no LoRA on the MODEL sets a family"]
    chosen = LCMModelSampling.execute(model, "tcd").result[0]  # a full model
    assert auto_family(chosen) == "tcd"
    assert auto_family(applied(model, path, "tcd.safetensors", strength=0.0)) == "lcm"
    both = applied(hyper, path, "tcd.safetensors", seed=1)
    with pytest.raises(ValueError, match=r"'hyper-sd \+ tcd'.*Choose the family in LCM Model"):
        LCMModelSampling.execute(both, "auto")


def test_the_sampler_knows_what_is_on_its_model(model, path):
    from lcm_lora.nodes.loader import LCMLoRALoader
    from lcm_lora.samplers.host import Run, report

    def told(model, steps=4, cfg=1.0, **known):
        *found, _ = report(model, Run(0, steps, cfg), **known)
        return [str(line).split(":")[0] for line in found]

    missing = ["No acceleration LoRA on the MODEL"]
    assert told(model) == missing
    assert told(model, fast=True) == []
    assert told(applied(model, path, "style.safetensors")) == missing
    save_file(dialects(model)["kohya"], path.with_name("Hyper-SD15-8steps-CFG-lora.safetensors"))
    loaded = LCMLoRALoader.execute(model, "Hyper-SD15-8steps-CFG-lora.safetensors", 1.0, "auto")
    assert told(loaded.result[0], 8, 7.0) == []
    assert told(loaded.result[0], 4) == ["Hyper-SD15-8steps-CFG-lora is made for 8 steps"]
    foreign = model.clone()  # another pack's loader, whose LoRA may be an LCM-LoRA
    key = next(iter(loaded.result[0].patches))
    foreign.add_patches({key: ("diff", (torch.zeros(1),))})
    assert told(foreign) == []
    assert told(foreign, cfg=7.0) == ["cfg 7 burns the colours"]


def test_a_full_lcm_with_a_guidance_embedding_is_refused(comfy, path):
    """The host loads it and says nothing; our nodes say why they will not sample it."""
    import comfy.ops
    import comfy.sd
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from lcm_lora.nodes.sampling import LCMKSampler, LCMModelSampling, LCMSchedule
    from lcm_lora.training.host import load_teacher

    unet = UNetModel(**UNET, dtype=torch.float16, operations=comfy.ops.disable_weight_init)
    weights = {
        f"model.diffusion_model.{key}": torch.zeros_like(tensor)
        for key, tensor in unet.state_dict().items()
    }

    def load(name: str, more: dict):
        file = path.with_name(name)
        save_file(weights | more, file)
        return file, comfy.sd.load_checkpoint_guess_config(str(file), False, False)[0]

    _, plain = load("plain.safetensors", {})
    LCMModelSampling.execute(plain)
    projection = {"model.diffusion_model.time_embed.cond_proj.weight": torch.zeros(320, 256)}
    file, full = load("full.safetensors", projection)
    assert not any("cond_proj" in key for key in full.model.state_dict())
    for call in (
        lambda: LCMModelSampling.execute(full.clone()),
        lambda: LCMKSampler.execute(full, 0, 4, 1.0, [], [], {}, 1.0),
        lambda: LCMSchedule.execute(full, 4, 1.0, 50),
        lambda: load_teacher(file),
    ):
        with pytest.raises(ValueError, match=r"full.safetensors is a full LCM .*cond_proj"):
            call()
    broken = path.with_name("broken.safetensors")
    broken.write_bytes(b"\xff" * 1000)
    with pytest.raises(ValueError, match="broken.safetensors is not a checkpoint"):
        load_teacher(broken)


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
