"""Load LCM-LoRA and the Few-step LoRA Stack on a flow model: the family, and what the node says."""

from __future__ import annotations

import pytest
import torch
from lcm_lora.tests.host import random_unet
from lcm_lora.tests.host.reference import assert_same
from lcm_lora.tests.host.tiny_flow import build, conditioning, empty, ours
from safetensors.torch import save_file

QKV = "double_blocks.0.img_attn.qkv"


@pytest.fixture
def saved(comfy):
    """saved(name) -> a LoRA for the small Flux's first layer, in the loras folder; made once."""
    made = set()

    def save(name: str, metadata=None):
        out, inside = build("Flux").model.diffusion_model.get_parameter(f"{QKV}.weight").shape
        generator = torch.Generator().manual_seed(5)
        module = f"lora_unet_{QKV.replace('.', '_')}"
        file = comfy.loras / name
        save_file(
            {
                f"{module}.lora_up.weight": torch.randn(out, 4, generator=generator) * 0.3,
                f"{module}.lora_down.weight": torch.randn(4, inside, generator=generator) * 0.3,
                f"{module}.alpha": torch.tensor(4.0),
            },
            file, metadata,
        )  # fmt: skip
        made.add(file)
        return name

    yield save
    for file in made:
        file.unlink()


def load(model, name, strength=1.0, family="auto"):
    """(MODEL, lines) of LCMLoRALoader."""
    from lcm_lora.nodes.loader import LCMLoRALoader

    output = LCMLoRALoader.execute(model, name, strength, family)
    lines = [text.format(**values) for text, values, _ in output.ui["lcm_lora_text"]]
    return output.result[0], lines


@pytest.mark.parametrize(
    ("name", "family", "sigmas"),
    [
        (
            "Qwen-Image-Lightning-4steps-V1.0",
            "qwen-lightning",
            "shift 3, as the LoRA's authors use it",
        ),
        ("Flux_2-Turbo-LoRA", "flux2-turbo", "at 8 steps, the sigmas that the LoRA's authors give"),
        ("my flux lcm", "lcm", "the model's own shift: lcm sets none"),
    ],
)
def test_the_name_decides(saved, name, family, sigmas):
    loaded, lines = load(build("Flux"), saved(f"{name}.safetensors"))
    assert lines == [
        f"{family}: 1 of 1 modules applied", f"from the name {name}.safetensors", sigmas
    ]  # fmt: skip
    assert loaded.get_model_object("model_sampling").family.name == family
    # The LoRA has its effect, and the family's sigmas are those of the run.
    assert (ours(loaded, empty("Flux")) - ours(build("Flux"), empty("Flux"))).norm() > 0.1


def test_a_name_that_says_nothing_is_sampled_as_the_model_is(saved):
    loaded, lines = load(build("Flux"), saved("fast.safetensors"))
    assert lines == [
        "flow: 1 of 1 modules applied",
        "the default: neither the file's metadata nor its name gives a family",
        "the model's own shift: flow sets none",
    ]
    by_hand, _ = load(build("Flux"), "fast.safetensors", family="lcm")
    assert_same(
        ours(by_hand, empty("Flux")), ours(loaded, empty("Flux"), eta=1.0).double(), 1e-6
    )  # fmt: skip


def test_metadata_goes_before_the_name(saved):
    from lcm_lora.lora.family import FAMILY

    name = saved("Qwen-Image-Lightning-4steps.safetensors", {FAMILY: "rcm"})
    _, lines = load(build("Flux"), name)
    assert lines[:2] == ["rcm: 1 of 1 modules applied", f"from the file's metadata, {FAMILY}"]


def test_another_strength_than_it_is_made_for_is_named(saved):
    from lcm_lora.nodes.rows import LCMLoRAStack

    name = saved("Hyper-FLUX.1-dev-8steps-lora.safetensors")
    warning = "hyper-flux is made for strength 0.125: change strength."
    assert load(build("Flux"), name)[1][-1] == warning
    assert load(build("Flux"), name, 0.125)[1][-1] == "the model's own shift: hyper-flux sets none"
    stack = LCMLoRAStack.execute(build("Flux"), name, 1.0, "auto", {"count": "0"})
    assert stack.ui["lcm_lora_text"][-1][0].format(family="hyper-flux", weight="0.125") == warning


def test_the_run_warns_of_steps_that_it_is_not_made_for(saved):
    from lcm_lora.nodes.sampling import LCMKSampler

    def told(name, steps, cfg=1.0):
        loaded, _ = load(build("Flux"), saved(name), 1.0)
        output = LCMKSampler.execute(
            loaded, 1, steps, cfg, conditioning(1), conditioning(2), empty("Flux"), 1.0
        )
        return [text.format(**values) for text, values, _ in output.ui["lcm_lora_text"]]

    assert told("FLUX.1-Turbo-Alpha.safetensors", 4)[0] == (
        "FLUX.1-Turbo-Alpha is made for 8 steps: change steps."
    )
    assert told("Flux_2-Turbo-LoRA.safetensors", 8) == [
        "flux2-turbo, 8 steps: 1 0.651 0.437 0.293 0.189 0.111 0.0495 0.00031; cfg 1, negative "
        "prompt unused"
    ]
    assert len(told("Hyper-SD3-4steps-CFG-lora.safetensors", 4, 3.0)) == 1
    assert told("Flux_2-Turbo-LoRA.safetensors", 8, 3.0)[0].startswith("cfg 3 burns the colours")


def test_the_other_kind_is_refused_by_both_names(saved):
    name = saved("sdxl_lightning_4step_lora.safetensors")
    with pytest.raises(
        ValueError,
        match=rf"{name} on a flow model \(Flux\) cannot be sampled as 'lightning', which comes",
    ):
        load(build("Flux"), name)
    with pytest.raises(ValueError, match=r"'tcd' is for Stable Diffusion models, and this MODEL"):
        load(build("Flux"), name, family="tcd")
    name = saved("Qwen-Image-Lightning-4steps.safetensors")
    with pytest.raises(
        ValueError, match=r"on a Stable Diffusion model \(BaseModel\) cannot be .*'qwen-lightning'"
    ):
        load(random_unet.build(), name)
