"""A job's description: what is wrong in it is said before anything is loaded."""

import json

import pytest
from lcm_lora.training.spec import Data, Spec, StyleLoRA, read

GOOD = {"host": "/h", "checkpoint": "/c.safetensors", "output": "/o.safetensors", "banks": "/b"}


def written(tmp_path, **changes):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(GOOD | changes), encoding="utf-8")
    return path


def test_it_comes_back_from_its_own_json(tmp_path):
    spec = Spec(
        **GOOD, data=Data("pictures", "/pictures", crops=2), loras=(StyleLoRA("/s", 0.8),),
        guidance=(3.0, 8.0), sample_prompts=("ein Bär",),
    )  # fmt: skip
    path = tmp_path / "spec.json"
    path.write_text(spec.to_json(), encoding="utf-8")
    assert read(path) == spec


def test_paths_may_hold_bytes_that_are_no_unicode(tmp_path):
    spec = Spec(**GOOD | {"checkpoint": "/caf\udce9.safetensors"}, embeddings=("/\udce9",))
    path = tmp_path / "spec.json"
    path.write_text(spec.to_json(), encoding="utf-8")
    assert read(path) == spec


def test_the_one_folder_of_embeddings_of_an_older_job_is_read(tmp_path):
    assert read(written(tmp_path, embeddings="/e")).embeddings == ("/e",)
    assert read(written(tmp_path, embeddings="")).embeddings == ()


def test_only_the_paths_are_needed(tmp_path):
    spec = read(written(tmp_path, guidance=4))
    assert spec.guidance == (4.0,)
    assert spec.lora_alpha == spec.rank == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, found 0"),
        ({"steps": 2.5}, "steps must be a whole number, found 2.5"),
        ({"steps": True}, "steps must be a whole number, found True"),
        ({"rank": "8"}, "rank must be a whole number, found '8'"),
        ({"lr": 0}, "lr must be above 0"),
        ({"guidance": [8, 3]}, "guidance must be one number from 1 to 30"),
        ({"guidance": []}, "guidance must be one number from 1 to 30"),
        ({"guidance": 0.5}, "guidance must be one number from 1 to 30"),
        ({"objective": "gan"}, "objective must be one of lcm, phased, found 'gan'"),
        ({"resolution": 100}, "resolution must be 64 to 4096, by 8"),
        ({"output": "/o.pt"}, "output must end in .safetensors"),
        ({"output": "o.safetensors"}, "output must be an absolute path"),
        ({"stepz": 3}, "unknown settings: stepz"),
        ({"data": {"kind": "video"}}, "data.kind must be one of prompts, pictures"),
        ({"data": {"kind": "pictures"}}, "data.path is empty"),
        ({"data": {"count": 0}}, "data.count must be at least 1"),
        ({"loras": [{"strength": 1.0}]}, "lacks path"),
        ({"sample_prompts": "a bag"}, "sample_prompts must be a list"),
        ({"data": {"prompts": ["a", "b\n\ud800"]}}, "prompts contains half .*in line 2"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read(written(tmp_path, **changes))


def test_a_file_that_is_missing_or_no_json(tmp_path):
    with pytest.raises(ValueError, match="no job description"):
        read(tmp_path / "spec.json")
    path = tmp_path / "broken.json"
    path.write_text('{"host": ', encoding="utf-8")
    with pytest.raises(ValueError, match="is not JSON"):
        read(path)
    path.write_text("[1]", encoding="utf-8")
    with pytest.raises(ValueError, match="must be a JSON object"):
        read(path)
