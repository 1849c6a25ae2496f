"""Files of a job on a disk that is slow, full, shared or broken."""

import json
import os
import shutil
import time

import pytest
from lcm_lora.lora import atomic
from lcm_lora.training import disk, run


def in_use(number, message="The process cannot access the file"):
    """What Windows raises for a file that another process has open."""
    error = PermissionError(13, message)
    error.winerror = number
    return error


@pytest.mark.parametrize("number", [5, 32, 33])
def test_a_file_that_is_open_elsewhere_for_a_moment_is_replaced(tmp_path, monkeypatch, number):
    replace, refused = os.replace, []

    def busy(*paths):
        refused.append(paths)
        if len(refused) < 4:
            raise in_use(number)
        replace(*paths)

    monkeypatch.setattr(os, "replace", busy)
    disk.replace(tmp_path / "a.json", "{}")
    assert (tmp_path / "a.json").read_text() == "{}" and len(refused) == 4
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(("number", "seconds"), [(32, 0.2), (112, 0.0), (None, 0.0)])
def test_it_is_not_tried_for_ever_nor_where_the_disk_says_something_else(
    tmp_path, monkeypatch, number, seconds
):
    def never(*_):
        raise in_use(number) if number else PermissionError(13, "Permission denied")

    monkeypatch.setattr(atomic, "PATIENCE", seconds)
    monkeypatch.setattr(os, "replace", never)
    begun = time.monotonic()
    with pytest.raises(PermissionError):
        disk.replace(tmp_path / "a.json", "{}")
    assert seconds <= time.monotonic() - begun < 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["rename", "unlink", "rmtree", "read_text"])
def test_folders_and_files_that_go_are_waited_for_too(tmp_path, monkeypatch, name):
    from lcm_lora.training.state import checkpoints

    places = {"rename": os, "rmtree": shutil}
    place = places.get(name, type(tmp_path))
    call, refused = getattr(place, name), []

    def busy(*arguments, **options):
        if not options.get("ignore_errors"):
            refused.append(arguments)
            if len(refused) == 1:
                raise in_use(32)
        return call(*arguments, **options)

    monkeypatch.setattr(place, name, busy)
    for step in (1, 2):
        checkpoints.save(tmp_path, checkpoints.Checkpoint(step, {}, {}, {}))
    checkpoints.prune(tmp_path, 1, None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    assert disk.read_object(tmp_path / "step-00000002" / "manifest.json")
    assert refused


def test_what_cannot_be_read_is_not_taken_for_torn(tmp_path, monkeypatch):
    """The newest checkpoint would be ignored, and a complete bank called incomplete."""
    from lcm_lora.training.data import bank
    from lcm_lora.training.state import checkpoints

    for step in (1, 2):
        checkpoints.save(tmp_path, checkpoints.Checkpoint(step, {}, {}, {}))
    (tmp_path / bank.INDEX).write_text("{}")

    def fails(*_, **__):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "read_text", fails)
        for read in (checkpoints.newest, bank.Bank):
            with pytest.raises(OSError, match="Input/output"):
                read(tmp_path)
        assert disk.read_json(tmp_path / bank.INDEX) is None
    assert checkpoints.newest(tmp_path).step == 2


def test_what_no_encoder_takes_is_written_as_json_has_it(tmp_path):
    disk.replace(tmp_path / "a.json", json.dumps({"name": "caf\udce9"}, ensure_ascii=False))
    assert disk.read_json(tmp_path / "a.json") == {"name": "caf\udce9"}
    assert disk.shown("caf\udce9") == "caf\\xe9"


def test_a_disk_that_fails_is_a_crash_that_is_tried_again(tmp_path):
    (tmp_path / "a file").touch()
    settings = {
        "host": "/h", "checkpoint": "/c", "output": str(tmp_path / "o.safetensors"),
        "banks": str(tmp_path / "a file" / "banks"),
    }  # fmt: skip
    (tmp_path / "spec.json").write_text(json.dumps(settings))
    with pytest.raises(OSError) as error:
        run.main([str(tmp_path / "spec.json")])
    status = disk.read_object(tmp_path / "status.json")
    assert status["state"] == "failed" and status["crash"] is True
    assert status["message"].startswith(f"{type(error.value).__name__}: ")
