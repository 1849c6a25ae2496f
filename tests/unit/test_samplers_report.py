"""What LCM KSampler says about a run, and what it warns of."""

from __future__ import annotations

import pytest
from lcm_lora.samplers.families import FAMILIES
from lcm_lora.samplers.report import Acceleration, Applied, ran, warnings

LCM = Acceleration("lcm-lora-sdv1-5", ("lcm",))
HYPER = Acceleration("Hyper-SD15-8steps-CFG", ("hyper-sd",), (8,), cfg=True)
NO_LORA = "No acceleration LoRA on the MODEL: add Load LCM-LoRA after the checkpoint."


@pytest.mark.parametrize(
    ("steps", "cfg", "text"),
    [
        (4, 1.0, "lcm, 4 steps: 999 759 499 259; cfg 1, negative prompt unused"),
        (2, 1.5, "lcm, 2 steps: 999 499; cfg 1.5"),
        (1, 1.0, "lcm, 1 step: 999; cfg 1, negative prompt unused"),
        (1, 2.0, "lcm, 1 step: 999; cfg 2"),
        (50, 1.5, "lcm, 50 steps: 999 979 959 939 … 79 59 39 19; cfg 1.5"),
    ],
)
def test_what_a_run_did(steps, cfg, text):
    assert str(ran("lcm", FAMILIES["lcm"].timesteps(steps), cfg)) == text


@pytest.mark.parametrize(
    ("accelerations", "others", "steps", "cfg", "expected"),
    [
        ((LCM,), False, 4, 2.0, []),
        ((LCM,), False, 4, 7.0, ["cfg 7 burns the colours: use 1 to 2."]),
        ((LCM,), False, 20, 1.0, ["More than 8 steps hardly help a few-step LoRA: use 1 to 8."]),
        ((HYPER,), False, 8, 7.0, []),
        ((HYPER, LCM), False, 8, 7.0, []),
        (
            (HYPER,),
            False,
            4,
            5.0,
            ["Hyper-SD15-8steps-CFG is made for 8 steps: change steps."],
        ),
        ((), False, 4, 1.0, [NO_LORA]),
        ((), False, 20, 1.0, [NO_LORA]),
        ((), True, 4, 1.0, []),
        ((), True, 4, 3.0, ["cfg 3 burns the colours: use 1 to 2."]),
    ],
)
def test_warnings_name_the_remedy(accelerations, others, steps, cfg, expected):
    found = warnings(Applied(accelerations), others, steps, cfg)
    assert list(map(str, found)) == expected
    assert all(line.warning for line in found)


def test_several_families_are_asked_about():
    both = Applied((LCM, Acceleration("TCD-SD15", ("tcd",))))
    with pytest.raises(ValueError, match=r"'lcm \+ tcd'.*TCD-SD15.*LCM Model Sampling"):
        both.family()
    assert Applied((LCM,)).family() == Applied().family() == "lcm"
