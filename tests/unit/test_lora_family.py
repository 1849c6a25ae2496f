"""Which acceleration a LoRA file is, by metadata and by name."""

from __future__ import annotations

import pytest
from lcm_lora.lora.family import (
    CFG,
    FAMILY,
    IN_METADATA,
    IN_NAME,
    STEPS,
    WEIGHT,
    family_named,
    few_step_model,
    forgotten,
    joined,
    made_for,
    recorded,
    scaled,
)
from lcm_lora.samplers.families import FAMILIES
from lcm_lora.training.objectives.table import OBJECTIVES
from lcm_lora.training.schema import declared
from lcm_lora.training.spec import Spec

NAMES = {
    "lcm-lora-sdv1-5.safetensors": "lcm",
    "LCM_LoRA_Weights_SD15.safetensors": "lcm",
    "lcm-lora-sdxl/pytorch_lora_weights.safetensors": "lcm",
    "fast\\lcm\\weights.safetensors": "lcm",
    "pcm_sd15_lcmlike_lora_converted.safetensors": "lcm",
    "tcd-sdxl-lora.safetensors": "tcd",
    "SDXL_TCD_LoRA.safetensors": "tcd",
    "dmd2_sdxl_4step_lora_fp16.safetensors": "dmd2",
    "lcm/dmd2-lcm-sampler.safetensors": "dmd2",
    "Hyper-SDXL-4steps-lora.safetensors": "hyper-sd",
    "Hyper-SD15-12steps-CFG-lora.safetensors": "hyper-sd",
    "Hyper-SD15-1step-lora.safetensors": "hyper-sd-1step",
    "hyper_sdxl_1_step.safetensors": "hyper-sd-1step",
    "pcm_sdxl_normalcfg_8step_converted.safetensors": "pcm",
    "sdxl_lightning_4step_lora.safetensors": "lightning",
    "lightning-8steps.safetensors": "lightning",
    "Qwen-Image-Lightning-4steps-V1.0.safetensors": "qwen-lightning",
    "Qwen-Image-Edit-2509-Lightning-8steps-V1.0-bf16.safetensors": "qwen-lightning",
    "Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16.safetensors": "qwen-turbo",
    "Flux_2-Turbo-LoRA_comfyui.safetensors": "flux2-turbo",
    "flux.2-turbo-lora.safetensors": "flux2-turbo",
    "FLUX.1-Turbo-Alpha.safetensors": "flux-turbo",
    "FLUX.1-Turbo-Alpha/diffusion_pytorch_model.safetensors": "flux-turbo",
    "Hyper-FLUX.1-dev-8steps-lora.safetensors": "hyper-flux",
    "Hyper-SD3-4steps-CFG-lora.safetensors": "hyper-sd3",
    "pcm_deterministic_4step_shift3.safetensors": "pcm-sd3",
    "pcm_deterministic_2step_shift1.safetensors": "pcm-sd3-shift1",
    "pdm_stochastic_shift3.safetensors": "pcm-sd3-stochastic",
    "pcm_stochastic_shift3.safetensors": "pcm-sd3-stochastic",
    "sd3_tdm_lora.safetensors": "tdm-sd3",
    "Wan2.2-Lightning_T2V-v1.1-A14B-4steps-lora_HIGH_fp16.safetensors": "wan-lightning",
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors": "wan-lightning",
    "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors": "wan-lightning",
    "Wan_2_1_T2V_14B_480p_rCM_lora_average_rank_83_bf16.safetensors": "rcm",
    "flux_scfm_8step.safetensors": "scfm",
    "swan lightning strikes.safetensors": "",
    "qwen_anime_style.safetensors": "",
    "flux2_turbulence_16.safetensors": "",
    "pytorch_lora_weights.safetensors": "",
    "lightning strikes.safetensors": "",
    "hyper-detail.safetensors": "",
    "hyperrealism.safetensors": "",
    "halcmorphic_utcd_ldmd2x.safetensors": "",
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name):
    family, why = family_named({}, name)
    assert family == NAMES[name]
    assert not family or family in FAMILIES
    assert bool(why[0]) == bool(family)


def test_metadata_goes_before_the_name_and_our_own_before_others():
    name = "sdxl_lightning_4step_lora.safetensors"
    title = {"modelspec.title": "TCD-SDXL-LoRA", "ss_output_name": "my pcm"}
    assert family_named(title, name) == ("tcd", (IN_METADATA, "modelspec.title"))
    ours = title | {FAMILY: "phased"}
    assert family_named(ours, name) == ("phased", (IN_METADATA, FAMILY))
    assert family_named({"ss_output_name": "style"}, name)[0] == "lightning"
    assert family_named({}, f"lcm/{name}") == ("lightning", (IN_NAME, name))


def test_a_name_of_two_is_neither():
    assert family_named({}, "tcd-and-pcm.safetensors")[0] == "tcd + pcm"


@pytest.mark.parametrize(
    ("name", "steps", "cfg"),
    [
        ("lcm-lora-sdv1-5.safetensors", (), False),
        ("dmd2_sdxl_4step_lora_fp16.safetensors", (4,), False),
        ("Hyper-SD15-12steps-CFG-lora.safetensors", (12,), True),
        ("Hyper-SDXL-1step-lora.safetensors", (), False),  # it is for 1 to 8
        ("pcm_sdxl_normalcfg_8step_converted.safetensors", (8,), True),
        ("pcm_sd15_smallcfg_2step_converted.safetensors", (2,), False),
        ("lcm/my_lcm-000500-steps.safetensors", (), False),  # of training
        ("sdxl_lightning_4step/lora.safetensors", (4,), False),
        ("Qwen-Image-Edit-2509-Lightning-8steps-V1.0-bf16.safetensors", (8,), False),
        ("Hyper-SD3-4steps-CFG-lora.safetensors", (4,), True),
        ("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors", (), False),
    ],
)
def test_what_a_name_says_of_steps_and_cfg(name, steps, cfg):
    made = made_for({}, name)
    assert (made.steps, made.cfg) == (steps, cfg)
    assert recorded(made.metadata()) == made
    assert made_for(made.metadata(), "another.safetensors") == made


def test_the_weight_of_an_acceleration_in_a_sum():
    hyper = {FAMILY: "hyper-flux", STEPS: "8"}
    part = scaled(hyper | {"ss_tag": "x"}, 0.125)
    assert part == hyper | {"ss_tag": "x", WEIGHT: "0.125"}
    assert recorded(scaled(part, 8.0)) == recorded(hyper)
    assert scaled({"ss_tag": "x"}, 0.5) == {"ss_tag": "x"}
    assert joined([part, {"ss_tag": "x"}]) == hyper | {WEIGHT: "0.125"}
    assert WEIGHT not in joined([part, hyper])  # no strength is right for both
    for written in ("half", "-1", "0", "nan", "inf"):  # by another program
        assert recorded(hyper | {WEIGHT: written}).weight == 1
    assert forgotten(part) == {"ss_tag": "x"}


def test_metadata_names_the_steps_before_the_name():
    assert made_for({FAMILY: "phased", STEPS: "2, 4"}, "lcm_8step.safetensors").steps == (2, 4)
    assert made_for({}, "style_4step.safetensors") is None
    assert made_for({}, "style_4step.safetensors", "dmd2").steps == (4,)
    assert recorded({"modelspec.title": "TCD"}) is None


def test_a_sum_says_what_its_accelerations_were_made_for():
    hyper = {FAMILY: "hyper-sd", STEPS: "8", CFG: "1"}
    assert joined([hyper, {"ss_tag": "x"}]) == hyper
    assert joined([hyper, hyper | {STEPS: "4"}])[STEPS] == "4, 8"


@pytest.mark.parametrize(
    ("families", "expected"),
    [
        ([None, None], None),
        ([None, "tcd"], "tcd"),
        (["lcm", "lcm"], "lcm"),
        (["tcd", None, "lcm"], "lcm + tcd"),
        (["lcm + tcd", "lcm"], "lcm + tcd"),
    ],
)
def test_what_a_sum_says(families, expected):
    metadata = [{FAMILY: family} if family else {"ss_tag": "x"} for family in families]
    assert joined(metadata) == ({FAMILY: expected} if expected else {})


@pytest.mark.parametrize(
    ("name", "few"),
    [
        ("z_image_turbo_bf16.safetensors", True),
        ("flux1-schnell-fp8.safetensors", True),
        ("flux-2-klein-4b-fp8.safetensors", True),
        ("hidream_i1_fast_fp8.safetensors", True),
        ("dreamshaper_8LCM.safetensors", False),
        ("dmd2_sdxl_4step_unet.safetensors", True),
        ("qwen_image_fp8_e4m3fn.safetensors", False),
        ("breakfast_v1.safetensors", False),
    ],
)
def test_full_models_of_a_few_steps(name, few):
    assert few_step_model(name) == few


def test_what_we_distil_is_known():
    assert set(declared(Spec)["objective"].setting.choices) == OBJECTIVES.keys()
    assert {objective.family for objective in OBJECTIVES.values()} <= FAMILIES.keys()
