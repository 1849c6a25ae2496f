"""Model files that the developer's commands put in place, and names that they refuse."""

import os
from pathlib import Path

import pytest
from lcm_lora.dev import demo
from lcm_lora.dev.server import install


@pytest.fixture
def two(tmp_path) -> list[Path]:
    """Two files of one name and one size."""
    made = []
    for folder, content in (("a", b"one"), ("b", b"two")):
        (tmp_path / folder).mkdir()
        made.append(tmp_path / folder / "x.safetensors")
        made[-1].write_bytes(content)
    return made


def test_the_file_that_was_named_is_there_whatever_was_before(two, tmp_path):
    there = tmp_path / "models"
    for source in (*two, two[0]):
        install(source, there)
        assert (there / source.name).read_bytes() == source.read_bytes()


def test_a_copy_stays_where_it_is_the_same_and_goes_where_it_is_not(two, tmp_path):
    there = tmp_path / "models" / two[0].name
    there.parent.mkdir()
    there.write_bytes(two[0].read_bytes())
    install(two[0], there.parent)
    assert not there.is_symlink()
    install(two[1], there.parent)
    assert there.read_bytes() == two[1].read_bytes()


def test_a_link_to_nothing_is_made_anew(two, tmp_path):
    there = tmp_path / "models" / two[0].name
    there.parent.mkdir()
    os.symlink(tmp_path / "gone", there)
    install(two[0], there.parent)
    assert there.read_bytes() == two[0].read_bytes()


def test_two_loras_of_one_name_are_refused(two, capsys):
    one, other = map(str, two)
    with pytest.raises(SystemExit):
        demo.options(["--checkpoint", one, "--lcm-lora", one, "--style-lora", other])
    assert "both LoRAs are called x.safetensors" in capsys.readouterr().err
