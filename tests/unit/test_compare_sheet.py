"""The labelled sheet of Compare Settings, and the words of its axes and settings."""

from __future__ import annotations

import numpy as np
import pytest
from lcm_lora.nodes.compare.axes import ALONE, of_files, of_numbers, of_prompts, of_settings
from lcm_lora.nodes.compare.settings import read, written
from lcm_lora.nodes.compare.sheet import EMPTY, MOST_PIXELS, Sheet, joined
from PIL import Image, ImageColor


def values(name, text):
    return [next(iter(point.changes.values())) for point in of_numbers(name, text).points]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1, 2 4;8", [1, 2, 4, 8]),
        ("1:4", [1, 2, 3, 4]),
        ("2:9:3, 20", [2, 5, 8, 20]),
        (" 1 : 3 ", [1, 2, 3]),
    ],
)
def test_lists_and_ranges(text, expected):
    assert values("steps", text) == expected
    assert all(isinstance(value, int) for value in values("steps", text))


def test_ranges_are_as_exact_as_typed_numbers():
    assert values("cfg", "0:1:0.1") == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert [point.label for point in of_numbers("cfg", "0:1:0.5").points] == ["0", "0.5", "1"]
    assert values("seed", "18446744073709551614:18446744073709551615")[1] == 2**64 - 1


def test_patterns_stand_for_files_in_the_order_of_their_numbers():
    names = ["style-10.safetensors", "sub/style-9.safetensors", "style-9.safetensors", "other.bin"]
    axis = of_files("other.bin\nstyle-*", names, 2)
    assert [point.label for point in axis.points] == ["other.bin", "style-9", "style-10"]
    assert axis.points[1].changes == {"lora_2": "style-9.safetensors"}
    with pytest.raises(ValueError, match="'styl-9'.*Similar names: .*style-9"):
        of_files("styl-9", names, 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 4, "cfg": 1.5, "eta": -1, "seed": 2**64 - 1},
        {
            "weight_1": 0.1,
            "weight_2": -0.30000000000000004,
            "lora_2": 'a, b=c/d \\ "e".safetensors',
        },
        {"checkpoint_1": "0f8c/200", "prompt": '여우, 숲 = "snow"\\'},
    ],
)
def test_settings_read_as_they_were_written(settings):
    assert read(written(settings)) == settings


def test_labels_of_settings_show_what_differs():
    lines = "steps=4, cfg=1, weight_2=0.4\nsteps=4, cfg=1.5, weight_2=0.8"
    assert [point.label for point in of_settings(lines).points] == [
        "cfg 1, weight_2 0.4", "cfg 1.5, weight_2 0.8",
    ]  # fmt: skip


def test_settings_that_a_person_writes():
    assert read(" steps = 4,cfg=2 ,prompt=a fox, seed=3,") == {
        "steps": 4, "cfg": 2, "prompt": "a fox", "seed": 3,
    }  # fmt: skip
    axis = of_settings('steps=4, lora_2="x/style.safetensors"\nprompt="a fox"')
    assert [point.label for point in axis.points] == ["steps 4, lora_2 style", "a fox"]
    with pytest.raises(ValueError, match="steps appears twice"):
        read("steps=4, steps=5")
    for line in ("steps=many", "steps=51", "weight_x=1", "weight=1", "=4", "cfg=nan"):
        with pytest.raises(ValueError, match="expected"):
            read(line)


def pixels(image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("rows", [ALONE, of_prompts("a fox\na very long prompt " + 30 * "again ")])
def test_pictures_lie_where_their_labels_say(rows):
    columns = of_numbers("steps", "1, 2, 4")
    sheet = Sheet(columns, rows, "seed 7", (96, 64))
    empty = (pixels(sheet.image) == ImageColor.getrgb(EMPTY)).all(-1)
    area = len(columns.points) * len(rows.points) * 96 * 64
    assert area <= empty.sum() < area + 200  # letters have a few such pixels too
    sheet.put(1, Image.new("RGB", (96, 64), "red"))
    red = np.argwhere((pixels(sheet.image) == (255, 0, 0)).all(-1))
    assert len(red) == 96 * 64
    (top, left), (bottom, right) = red.min(0), red.max(0)
    assert (bottom - top + 1, right - left + 1) == (64, 96)
    above = pixels(sheet.image)[:top, left : right + 1]
    assert (above < 120).any(), "a label stands above it"
    clear = pixels(sheet.image)
    assert (clear[:, :2] == 255).all() and (clear[:, -2:] == 255).all(), "nothing is cut"
    assert (clear[:2] == 255).all() and (clear[-2:] == 255).all()


def test_large_pictures_are_made_smaller():
    sheet = Sheet(of_numbers("seed", "1:16"), ALONE, "", (1024, 512))
    assert sheet.image.size[0] < 1.2 * MOST_PIXELS
    sheet.put(3, Image.new("RGB", (1024, 512), "red"))
    red = (pixels(sheet.image) == (255, 0, 0)).all(-1)
    assert red.sum() == 256 * 128


def test_text_that_the_font_cannot_draw_becomes_a_number():
    sheet, other = (
        Sheet(of_prompts(text), ALONE, "", (96, 96)) for text in ("여우\n판다", "#1\n#2")
    )
    assert pixels(sheet.image).shape == pixels(other.image).shape
    assert (pixels(sheet.image) == pixels(other.image)).all()


def test_pictures_of_one_cell():
    four = joined([Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue", "white")])
    assert four.size == (16, 16) and four.getpixel((12, 4)) == (0, 255, 0)
    assert joined([Image.new("RGB", (8, 8))] * 2).size == (16, 8)
    assert joined([Image.new("RGB", (8, 8))] * 5).size == (24, 16)
