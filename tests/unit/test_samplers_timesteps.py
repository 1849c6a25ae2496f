"""Timesteps against diffusers' LCMScheduler."""

from __future__ import annotations

import pytest
from diffusers import LCMScheduler
from lcm_lora.samplers.timesteps import grid, parse, timesteps

STRENGTHS = [i / 100 for i in range(5, 101, 5)] + [0.58, 0.99]


def test_grid_is_the_fifty_points_of_the_distillation():
    assert grid() == list(range(19, 1000, 20))
    assert grid(strength=0.5) == list(range(19, 500, 20))


@pytest.mark.parametrize("origin_steps", [*range(10, 101, 10), 33, 64, 77])
def test_equals_diffusers_wherever_it_accepts(origin_steps):
    scheduler = LCMScheduler()
    accepted = refused = 0
    for strength in STRENGTHS:
        for steps in range(1, 9):
            try:
                scheduler.set_timesteps(
                    steps, original_inference_steps=origin_steps, strength=strength
                )
            except ValueError:
                refused += 1
                with pytest.raises(ValueError, match="steps do not fit"):
                    timesteps(steps, strength, origin_steps)
            else:
                accepted += 1
                expected = scheduler.timesteps.tolist()
                assert timesteps(steps, strength, origin_steps) == expected, (steps, strength)
    assert accepted > 80
    assert refused > 0 or origin_steps == 100


def test_every_count_up_to_the_whole_grid():
    scheduler = LCMScheduler()
    for steps in range(1, 51):
        scheduler.set_timesteps(steps)
        assert timesteps(steps) == scheduler.timesteps.tolist()


def test_the_advice_of_an_error_works():
    with pytest.raises(ValueError, match="at most 5 steps or a strength .* at least 0.16"):
        timesteps(8, strength=0.1)
    assert len(timesteps(5, strength=0.1)) == 5
    assert len(timesteps(8, strength=0.16)) == 8
    # 50 * 0.58 is 28.999... in binary, so 29 steps need the next hundredth.
    with pytest.raises(ValueError, match="at least 0.59"):
        timesteps(29, strength=0.58)
    assert len(timesteps(29, strength=0.59)) == 29
    with pytest.raises(ValueError, match=r"only 0 of the 50 .* Use a strength"):
        timesteps(1, strength=0.01)
    with pytest.raises(ValueError, match="at most 50 steps"):
        timesteps(51)


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.01, float("nan")])
def test_strength_outside_its_range(strength):
    with pytest.raises(ValueError, match="strength"):
        timesteps(4, strength)


@pytest.mark.parametrize("origin_steps", [0, -1, 1001])
def test_origin_steps_outside_their_range(origin_steps):
    with pytest.raises(ValueError, match="origin_steps"):
        timesteps(1, origin_steps=origin_steps)


def test_steps_below_one():
    with pytest.raises(ValueError, match="at least 1, found 0"):
        timesteps(0)


@pytest.mark.parametrize("text", ["999, 749,499 ;249", " 999\n749 499 249 ", "999,749,499,249,"])
def test_a_list_of_ones_own(text):
    assert parse(text) == [999, 749, 499, 249]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("999, 1e2", "'1e2'"),
        ("999, -1", "'-1'"),
        ("1000, 500", "found 1000"),
        ("999, 500, 500", "found 500 after 500"),
        ("259, 499", "found 499 after 259"),
    ],
)
def test_a_wrong_list_names_the_entry(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)
