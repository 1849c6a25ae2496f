"""A job's description: its errors are reported before anything is loaded."""

import hashlib
import json
from dataclasses import asdict, replace

import pytest
from lcm_lora.training.jobs.order import LENGTHS, DataOrder, Order, again
from lcm_lora.training.schema import build, declared, schema, shared
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
        ({"lr": 0}, "lr must be above 0 and at most 1"),
        ({"guidance": [8, 3]}, "guidance must be one number from 1 to 30"),
        ({"guidance": []}, "guidance must be one number from 1 to 30"),
        ({"guidance": 0.5}, "guidance must be one number from 1 to 30"),
        ({"objective": "gan"}, "objective must be one of lcm, phased, dmd, found 'gan'"),
        ({"resolution": 100}, "resolution must be from 64 to 4096 and a multiple of 8"),
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


def test_settings_written_earlier_keep_their_text():
    """A job is found again by the hash of this text."""
    spec = Spec(
        **GOOD,
        host_flags=("--cpu",),
        loras=(StyleLoRA("/s", 0.5),),
        embeddings=("/e",),
        data=Data("pictures", "/p"),
        guidance=(4.0,),
    )
    digest = hashlib.sha256(spec.to_json().encode()).hexdigest()
    assert digest == "86518c80aa31c9e60d2144bb512bf39061ed511486de09fd32ccdaf76c59031a"


def test_an_order_takes_over_every_setting_that_it_shares():
    order = Order(checkpoint="c", name="n", steps=7, guidance=4.0, passes=3)
    taken = shared(order, Spec)
    assert (taken["steps"], taken["guidance"], taken["passes"]) == (7, 4.0, 3)
    assert "checkpoint" not in taken and "name" not in taken
    assert shared(order.data, Spec) == {"resolution": 512}
    assert shared(order.data, Data).keys() == {"count", "draw_steps", "crops", "flip"}


def test_the_schema_of_an_order_has_the_limits_of_its_settings():
    properties = schema(Order)["properties"]
    assert properties["steps"].items() >= {"type": "integer", "minimum": 1, "default": 1000}.items()
    assert properties["lr"]["exclusiveMinimum"] == 0 and properties["lr"]["maximum"] == 1
    assert properties["objective"]["enum"] == ["lcm", "phased", "dmd"]
    assert properties["data"]["$ref"] == "#/components/schemas/DataOrder"
    assert schema(Order)["required"] == ["checkpoint", "name"]
    assert schema(DataOrder)["properties"]["resolution"]["multipleOf"] == 8


def test_a_length_sets_the_steps_and_limits_what_is_drawn():
    order = Order(checkpoint="c", name="n", steps=7, data=DataOrder(count=600))
    assert order.with_length() == order  # custom, as orders were before there were lengths
    tried = replace(order, length="try").with_length()
    assert (tried.steps, tried.data.count, tried.length) == (200, 250, "custom")
    few = replace(order, length="try", data=DataOrder(count=8)).with_length()
    assert few.data.count == 8
    best = replace(order, length="best").with_length()
    assert (best.steps, best.data.count) == (4000, 600)


def test_an_order_comes_back_with_the_steps_that_its_job_has_now():
    order = asdict(Order(checkpoint="a.safetensors", name="b", steps=7, length="try"))
    assert again(order, 200) == order
    longer = again(order, 300)  # it was trained on
    assert (longer["length"], longer["steps"], longer["data"]["count"]) == ("custom", 300, 250)
    old = {name: value for name, value in order.items() if name != "length"}
    assert again(old, 9) == old | {"steps": 9}
    # Of a version without decay, which a length may set.
    old = {name: value for name, value in order.items() if name != "decay"}
    assert again(old, 300) == longer
    fitted = order | {"length": "fit", "start_from": "lcm.safetensors"}
    assert again(fitted, 300)["decay"] == "cosine"


def test_the_help_of_length_tells_what_each_sets():
    words = declared(Order)["length"].setting.help
    for name, length in LENGTHS.items():
        assert f"{name}: {length.steps} steps" in words
        assert length.drawn is None or f"at most {length.drawn} drawn" in words


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"length": "forever"},
            "length must be one of custom, try, good, best, fit, found 'forever'",
        ),
        ({"policy": "rude"}, "policy must be one of yield, exclusive, share, found 'rude'"),
        ({"device": "0; rm"}, 'device must be empty, numbers of devices such as "0"'),
        ({"device": "0\n"}, "device must be"),
        ({"guidance": 0.5}, "guidance must be one number from 1 to 30"),
        ({"data": {"kind": "video"}}, "data.kind must be one of prompts, prompt file, pictures"),
        ({"data": {"count": 0}}, "data.count must be at least 1"),
        ({"style_lora": "\ud800"}, None),  # the name of a file may look like this
        ({"name": "\ud800"}, "name contains half of a character"),
    ],
)
def test_an_order_is_checked(changes, message):
    content = {"checkpoint": "c", "name": "n"} | changes
    if message is None:
        assert build(Order, content, "the request").style_lora == changes["style_lora"]
        return
    with pytest.raises(ValueError, match=message):
        build(Order, content, "the request")
