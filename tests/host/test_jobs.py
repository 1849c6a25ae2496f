"""The supervisor on real trainings of the toy: the queue, kills, pause and stop."""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lcm_lora.tests.host.queued import (
    PROMPTS,
    at_step,
    ended,
    gone,
    kill_supervisor,
    trainer,
    until,
)
from lcm_lora.tests.tally import half_files, orphans
from lcm_lora.training.jobs import processes, restart, supervisor
from lcm_lora.training.jobs.store import Store
from lcm_lora.training.spec import Data, StyleLoRA
from lcm_lora.training.state import checkpoints
from lcm_lora.training.state.checkpoints import Checkpoint
from safetensors.torch import save_file


@pytest.mark.faults
def test_the_queue_runs_in_order_and_everything_ends(store, job):
    first, _ = store.create(job("a"), "a")
    second, _ = store.create(job("b", seed=4), "b")
    third, _ = store.create(job("c", steps=2), "c")
    store.move(third, before=first)
    supervisor.ensure(store.folder)
    supervisor.ensure(store.folder)
    ended(store, second, "done")
    changed = {record.name: record.changed for record in store.jobs()}
    assert changed["c"] < changed["a"] < changed["b"]
    assert store.job(first).lora_name == "a.safetensors"
    gone(store)
    assert not processes.of_job(first)


def test_kills_of_trainer_and_supervisor_change_no_byte(store, job, unbroken):
    killed, _ = store.create(job("killed"), "killed")
    supervisor.ensure(store.folder)
    at_step(store, killed, 4)
    os.kill(trainer(store, killed), signal.SIGKILL)
    at_step(store, killed, 7)
    kill_supervisor(store)
    os.kill(trainer(store, killed), signal.SIGKILL)
    until(lambda: store.job(killed).state == "lost", "it is seen that nobody runs it")
    supervisor.ensure(store.folder)
    ended(store, killed, "done")
    output = json.loads((store.path(killed) / "spec.json").read_text())["output"]
    assert Path(output).read_bytes() == unbroken
    gone(store)


@pytest.mark.faults
def test_a_supervisor_that_died_alone_is_replaced_and_the_training_never_stopped(store, job):
    running, _ = store.create(job(), "a")
    supervisor.ensure(store.folder)
    at_step(store, running, 2)
    before = trainer(store, running)
    kill_supervisor(store)
    supervisor.ensure(store.folder)
    ended(store, running, "done")
    assert trainer(store, running) == before


@pytest.mark.faults
def test_pause_resume_stop_and_delete(store, job):
    running, _ = store.create(job(steps=500), "a")
    supervisor.ensure(store.folder)
    at_step(store, running, 2)
    store.ask(running, "pause")
    assert ended(store, running, "paused").step >= 2
    gone(store)
    store.ask(running, "")
    assert store.job(running).state == "queued"
    supervisor.ensure(store.folder)
    step = store.job(running).step
    at_step(store, running, step + 2)
    store.ask(running, "stop")
    ended(store, running, "paused")
    store.delete(running)
    assert not store.jobs()
    gone(store)


@pytest.mark.faults
def test_a_bad_job_fails_at_once_and_the_next_one_runs(store, job, tmp_path):
    bad, _ = store.create(job("bad", checkpoint=str(tmp_path / "none.safetensors")), "bad")
    good, _ = store.create(job("good", steps=2), "good")
    supervisor.ensure(store.folder)
    ended(store, good, "done")
    record = store.job(bad)
    assert record.state == "failed"
    assert "no checkpoint" in record.error


@pytest.mark.faults
def test_two_stores_share_a_device_one_job_after_the_other(store, job, tmp_path):
    other = Store(tmp_path / "other jobs")
    first, _ = store.create(job("a"), "a")
    second, _ = other.create(job("b", steps=1), "b")
    try:
        supervisor.ensure(store.folder)
        at_step(store, first, 1)
        supervisor.ensure(other.folder)
        until(lambda: "another ComfyUI" in other.job(second).message, "the second waits")
        assert store.job(first).state == "running"
        ended(other, second, "done")
        assert store.job(first).state == "done"
    finally:
        processes.end(second, kill=True)
        gone(other)


def test_a_stop_is_followed_while_the_bank_is_made(store, job, banks):
    many = Data(prompts=PROMPTS, count=4000, draw_steps=4)
    making, _ = store.create(job("a", data=many, resolution=64), "a")
    supervisor.ensure(store.folder)
    until(lambda: "rows" in store.job(making).message, "the bank is being made")
    store.ask(making, "stop")
    ended(store, making, "paused")
    assert "paused at rows" in store.job(making).message


def test_a_button_acts_on_a_job_as_it_is_then(comfy, store, job, monkeypatch):
    # The real one pulls in the whole web application, which only a server has.
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=None))
    from lcm_lora.training.jobs import host, routes

    pressed, _ = store.create(job(), "a")
    request = SimpleNamespace(match_info={"id": pressed})
    changing = store._changing

    def it_ends_meanwhile():
        (store.path(pressed) / "status.json").write_text('{"state": "done"}')
        return changing()

    monkeypatch.setattr(host, "store", lambda: store)
    assert routes.act("pause", request, {})["state"] == "paused"
    monkeypatch.setattr(store, "_changing", it_ends_meanwhile)
    with pytest.raises(ValueError, match="done already"):
        routes.act("stop", request, {})
    assert json.loads((store.path(pressed) / "control.json").read_text())["action"] == "pause"


@pytest.mark.parametrize(
    ("policy", "device", "times"),
    [("yield", "", 1), ("exclusive", "", 1), ("share", "", 0), ("yield", "ray", 0)],
)
def test_models_make_room_once_for_a_job_that_a_prompt_waits_for(
    comfy, store, job, monkeypatch, policy, device, times
):
    import comfy.model_management as management
    from lcm_lora.training.jobs import host

    waited, _ = store.create(job(), "a", device, policy=policy)
    calls = []

    def sleep(_):
        calls.append("look")
        if len(calls) > 5:
            (store.path(waited) / "status.json").write_text('{"state": "done"}')

    monkeypatch.setattr(host, "store", lambda: store)
    monkeypatch.setattr(host, "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(management, "unload_all_models", lambda: calls.append("unload"))
    assert host._done(store.job(waited), lambda _: None).state == "done"
    assert calls == ["unload"] * times + ["look"] * (6 - times)


def test_what_a_checkpoint_lacks_for_a_lora_is_said(comfy, store, job, tmp_path, monkeypatch):
    from lcm_lora.training.jobs import host

    name = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    factors = {f"{name}.up": torch.ones(320, 4), f"{name}.down": torch.ones(4, 768)}
    style = tmp_path / "style.safetensors"
    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
    up, down = torch.ones(320, 2), torch.ones(2, 320)
    save_file({f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}, style)
    styled, _ = store.create(job(loras=(StyleLoRA(str(style)),)), "a")
    for step in (1, 2):
        checkpoints.save(store.checkpoints(styled), Checkpoint(step, factors, {}, {}))
    damaged = store.checkpoints(styled) / "step-00000001" / "adapter.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4])
    monkeypatch.setattr(host, "store", lambda: store)
    monkeypatch.setattr(host, "_loras", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"step 1 is damaged: adapter.* Choose another one"):
        host.export(styled, 1)
    assert host.export(styled, 2) == "a-step-2.safetensors"
    (tmp_path / "a-step-2.safetensors").unlink()
    style.unlink()
    with pytest.raises(ValueError, match=r"style LoRA style.safetensors is gone"):
        host.export(styled, 2)
    assert not list(tmp_path.glob("*step*"))


@pytest.mark.parametrize(
    ("arguments", "flags"),
    [
        (["--directml", "--port", "8188"], ["--directml"]),
        (["--directml", "--lowvram"], ["--directml", "--lowvram"]),
        (["--directml"], ["--directml"]),
        (["--directml", "0", "--listen", "0.0.0.0"], ["--directml", "0"]),
        (["--reserve-vram", "1.5", "--cpu"], ["--reserve-vram", "1.5", "--cpu"]),
        (["--port", "1", "--default-device=1"], ["--default-device=1"]),
    ],
)
def test_a_job_gets_the_flags_that_decide_how_a_model_is_computed(
    comfy, monkeypatch, arguments, flags
):
    from comfy.cli_args import parser
    from lcm_lora.training.jobs import host

    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    assert host._flags() == tuple(flags)
    parser.parse_args(flags)  # ends the process if it does not know a flag


def test_a_job_looks_for_embeddings_where_the_host_does(comfy, tmp_path, monkeypatch):
    """There is a second folder, as extra_model_paths.yaml would add it."""
    import folder_paths
    from comfy.sd1_clip import load_embed
    from lcm_lora.training.jobs.host import _spec
    from lcm_lora.training.jobs.order import Order

    paths, suffixes = folder_paths.folder_names_and_paths["embeddings"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", ([*paths], suffixes))
    (comfy.checkpoints / "any.safetensors").write_bytes(b"x")
    save_file({"emb_params": torch.ones(2, 768)}, tmp_path / "badhands.safetensors")
    assert load_embed("badhands", folder_paths.get_folder_paths("embeddings"), 768) is None
    folder_paths.add_model_folder_path("embeddings", str(tmp_path))
    spec = _spec(Order(checkpoint="any.safetensors", name="x"), tmp_path)
    assert spec.embeddings == tuple(folder_paths.get_folder_paths("embeddings"))
    assert load_embed("badhands", spec.embeddings, 768).shape == (2, 768)


def test_the_nodes_order_what_the_page_orders_and_refuse_what_it_refuses(
    comfy, store, toy_checkpoint, monkeypatch
):
    import folder_paths
    from lcm_lora.nodes.distill import LCMDistill, LCMDistillData
    from lcm_lora.training.jobs import host

    monkeypatch.setattr(host, "store", lambda: store)
    monkeypatch.setattr(host, "work", lambda: None)
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda _: ["toy.safetensors"])
    monkeypatch.setattr(folder_paths, "get_full_path", lambda *_: str(toy_checkpoint))

    def ordered(prompts, name="made", **more):
        source = {"source": "prompts", "prompts": prompts, "count": 4, "draw_steps": 2}
        (data,) = LCMDistillData.execute(source, 64).args
        return LCMDistill.execute(
            data=data,
            style_lora="none",
            checkpoint="toy.safetensors",
            name=name,
            steps=2,
            **more,
        ).args[0]

    identifier = ordered("a bag\na dress")
    spec = json.loads((store.path(identifier) / "spec.json").read_text())
    assert spec["data"]["prompts"] == ["a bag", "a dress"] and spec["steps"] == 2
    assert "start_from" not in spec
    started = ordered("a bag", "started", start_from="toy.safetensors")
    spec = json.loads((store.path(started) / "spec.json").read_text())
    assert spec["start_from"] == str(toy_checkpoint)
    with pytest.raises(ValueError, match="lists no 'gone' among its loras"):
        ordered("a bag", "lost", start_from="gone")
    with pytest.raises(ValueError, match="length fit .* but start_from names none"):
        ordered("a bag", "fitted", length="fit", start_from="none")
    fitted = ordered("a bag", "fitted", length="fit", start_from="toy.safetensors")
    spec = json.loads((store.path(fitted) / "spec.json").read_text())
    assert (spec["steps"], spec["decay"], spec["data"]["count"]) == (150, "cosine", 4)
    with pytest.raises(ValueError, match="prompts contains half of a character .* in line 2"):
        ordered("a bag\na \ud83d")


def test_a_folder_of_pictures_may_be_a_link_in_the_input_folder(comfy, tmp_path, monkeypatch):
    import folder_paths
    from lcm_lora.training.jobs.host import _input

    input_folder, elsewhere = tmp_path / "input", tmp_path / "elsewhere"
    for folder in (input_folder, elsewhere):
        folder.mkdir()
    (input_folder / "linked").symlink_to(elsewhere)
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(input_folder))
    assert _input("linked") == str(input_folder / "linked")
    for name in ("linked/../../elsewhere", "../elsewhere", str(elsewhere), ".", "linked/..", ""):
        with pytest.raises(ValueError, match="is not inside ComfyUI's input folder"):
            _input(name)


def test_a_job_that_crashes_again_and_again_fails(store, job, monkeypatch, tmp_path):
    """The host's loader kills the process, as a driver may do."""
    host = tmp_path / "host"
    (host / "comfy").mkdir(parents=True)
    (host / "comfy" / "__init__.py").touch()
    (host / "comfy" / "sd.py").touch()
    (host / "comfy" / "options.py").write_text("import os, signal; os.kill(os.getpid(), 9)")
    monkeypatch.setattr(restart, "PAUSES", (0.1, 0.1, 0.1))
    bad, _ = store.create(job("bad", host=str(host)), "bad")
    assert supervisor.main(store.folder) == 0
    record = store.job(bad)
    assert record.state == "failed"
    assert "crashed 4 times" in record.error
    store.ask(bad, "")
    assert store.job(bad).state == "queued"


@pytest.mark.faults
@pytest.mark.parametrize("how", ["cut", "gone"])
@pytest.mark.parametrize(
    "name",
    ["spec.json", "control.json", "supervisor.json", "status.json", "metrics.jsonl", "checkpoints"],
)
def test_a_file_of_a_job_that_is_torn_or_gone(store, job, tally, tmp_path, name, how):
    """A crash may leave such a file; in the newest checkpoint it is the adapter."""
    hurt, _ = store.create(job("hurt"), "hurt")
    other, _ = store.create(job("other", steps=2), "other")
    supervisor.ensure(store.folder)
    at_step(store, hurt, 7)
    kill_supervisor(store)
    processes.end(hurt, kill=True)
    file = store.path(hurt) / name
    if name == "checkpoints":
        file = max(file.glob("step-*")) / "adapter.safetensors"
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    supervisor.ensure(store.folder)
    ended(store, other, "done")
    if spec_is_hurt := name == "spec.json":
        ended(store, hurt, "failed")
    else:
        ended(store, hurt, "done")
    gone(store)
    lost = spec_is_hurt == (tmp_path / "hurt" / "lcm.safetensors").exists()
    # The torn description stays as it is, so that a person can look at it.
    left = half_files(store.path(hurt)) - (spec_is_hurt and how == "cut")
    tally.add(f"{name} {how}", int(lost), orphans(store, hurt), left)
