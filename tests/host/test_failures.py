"""Failures are reported truthfully: what the host says about a file, what the machine reports."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from lcm_lora.tests.conftest import ROOT
from safetensors.torch import save_file


def no_checkpoint(kind, good):
    """The bytes of a file that is no checkpoint."""
    return {
        "empty": b"", "zeros": b"\0" * 1000, "page": b"<html>not found</html>" * 50,
        "cut": good.read_bytes()[:100_000],
    }[kind]  # fmt: skip


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kind", ["empty", "zeros", "page", "cut"])
def test_a_file_that_is_no_checkpoint_is_called_so(comfy, toy_checkpoint, tmp_path, kind, suffix):
    from lcm_lora.training.host import load_teacher

    file = tmp_path / f"a{suffix}"
    file.write_bytes(no_checkpoint(kind, toy_checkpoint))
    with pytest.raises(ValueError, match=f"a{suffix} is not a checkpoint that ComfyUI can load"):
        load_teacher(file)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_tensors_of_something_else_are_no_checkpoint(comfy, tmp_path, suffix):
    from lcm_lora.training.host import load_teacher

    file, tensors = tmp_path / f"a{suffix}", {"a": torch.zeros(3)}
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    with pytest.raises(ValueError, match="is not a checkpoint that ComfyUI can load"):
        load_teacher(file)


class SafetensorError(Exception):
    """Like the library's error, which has no constructor of its own."""


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("MPS backend out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: device-side assert triggered"),
        MemoryError(),
        OSError(5, "Input/output error"),
        SafetensorError("I/O error: Cannot allocate memory (os error 12)"),
        SafetensorError("I/O error: Input/output error (os error 5)"),
        AttributeError("module 'comfy.model_management' has no attribute 'get_torch_device'"),
    ],
)
def test_what_the_machine_or_the_host_does_is_not_the_files_fault(
    comfy, toy_checkpoint, monkeypatch, error
):
    import comfy.sd
    from lcm_lora.training.host import load_teacher

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(comfy.sd, "load_checkpoint_guess_config", fails)
    with pytest.raises(type(error)) as raised:
        load_teacher(toy_checkpoint)
    assert raised.value is error


def test_a_host_whose_loader_has_changed_is_not_the_files_fault(comfy, toy_checkpoint, monkeypatch):
    import comfy.sd
    from lcm_lora.training.host import load_teacher

    def renamed(ckpt_path, embedding_directory=None, model_options=None, no_dynamic=False):
        pass

    monkeypatch.setattr(comfy.sd, "load_checkpoint_guess_config", renamed)
    with pytest.raises(TypeError, match="disable_dynamic"):
        load_teacher(toy_checkpoint)


ENTERED = """
import json, sys, types
from pathlib import Path
package = sys.modules["lcm_lora"] = types.ModuleType("lcm_lora")
package.__path__ = [sys.argv[1]]
from lcm_lora.training.host import enter
enter(Path(sys.argv[2]), tuple(sys.argv[3:]))
from comfy.cli_args import args
print(json.dumps([args.cpu, args.directml, sorted(map(str, args.fast)), args.force_fp32]))
"""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--directml", "0", "--lowvram"], [False, 0, [], False]),
        (["--fast", "fp16_accumulation", "cublas_ops", "--force-fp32"], [True, None, [], True]),
    ],
)
def test_a_teacher_is_loaded_without_what_only_sampling_can_use(host_folder, flags, expected):
    """No device is visible here, so the CPU is chosen, unless DirectML is asked for."""
    entered = subprocess.run(
        [sys.executable, "-c", ENTERED, str(ROOT), str(host_folder), *flags], text=True,
        capture_output=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert entered.returncode == 0, entered.stderr
    assert json.loads(entered.stdout.splitlines()[-1]) == expected


@pytest.fixture
def routes(comfy, monkeypatch, store):
    # The real one pulls in the whole web application, which only a server has.
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=None))
    from lcm_lora.training.jobs import host, routes

    monkeypatch.setattr(host, "store", lambda: store)
    return routes


def answer(routes, handler, request=None):
    response = routes._response(request or SimpleNamespace(match_info={}), handler)
    return response.status, json.loads(response.text)["error"]


def test_a_fault_of_ours_is_reported_as_one(routes, caplog):
    def faulty():
        return {}["rows"]

    status, sentence = answer(routes, faulty)
    assert status == 500 and "fault of this pack: KeyError" in sentence
    assert "There is no job" not in sentence
    assert "rows" in caplog.text


def test_a_job_that_is_not_there_is_named(routes, store):
    identifier = "00000000-0000-4000-8000-000000000000"
    request = SimpleNamespace(match_info={"id": identifier, "name": "step-1.png"})
    for read in (routes.job, routes.job_log, routes.samples):
        if read is routes.job_log:
            request.query = {}
        assert answer(routes, lambda read=read: read(request), request) == (
            404,
            f"There is no job {identifier}.",
        )
    gone = FileNotFoundError(2, "No such file", str(store.folder / identifier / "log.txt"))

    def deleted_meanwhile():
        raise gone

    assert answer(routes, deleted_meanwhile, request)[0] == 404


def test_a_lock_that_is_held_says_to_try_again(routes, store, job, monkeypatch):
    from lcm_lora.training.jobs import store as module

    identifier, _ = store.create(job(), "a")
    monkeypatch.setattr(module, "LONGEST", 0.05)
    request = SimpleNamespace(match_info={"id": identifier})
    with FileLock(store.folder / ".changing.lock"):
        status, sentence = answer(routes, lambda: routes.act("pause", request, {}), request)
    assert status == 503 and "Try again" in sentence and "/" not in sentence


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (OSError(28, "No space left on device", "/home/me/x"), 507, "disk is full"),
        (PermissionError(13, "Permission denied", "/home/me/x"), 500, "Permission denied"),
        (FileNotFoundError(2, "No such file or directory", "/home/me/x"), 500, "No such file"),
    ],
)
def test_a_disk_that_fails_is_reported_without_a_path(routes, error, status, words):
    def fails():
        raise error

    code, sentence = answer(routes, fails)
    assert code == status and words in sentence and "/home" not in sentence


@pytest.fixture
def server(comfy, monkeypatch, tmp_path):
    """server(count, visible, *flags) sets up a machine whose PyTorch sees `count` devices."""
    from lcm_lora.training.jobs import host

    def machine(count, visible=None, *flags):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(sys, "argv", ["main.py", *flags])
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    def devices(word):
        device, processes = host._devices(word, tmp_path / "ray.json")
        return device, processes, host._visible(device)

    machine.devices = devices
    return machine


@pytest.mark.parametrize(
    ("count", "visible", "word", "expected", "flags"),
    [
        (2, None, "", ("", 1, "0"), ()), (2, None, "1", ("1", 1, "1"), ()),
        (2, None, "001", ("1", 1, "1"), ()), (2, None, "1,0", ("1,0", 2, "1,0"), ()),
        # As ComfyUI's --cuda-device 3 sets it: the first is the same, named or not.
        (1, "3", "", ("", 1, "3"), ()), (1, "3", "0", ("0", 1, "3"), ()),
        (1, "3", "00", ("0", 1, "3"), ()), (2, "5,2", "1", ("1", 1, "2"), ()),
        (1, "GPU-8f2a", "0", ("0", 1, "GPU-8f2a"), ()),
        (2, "1,0,9", "1", ("1", 1, "0"), ()),  # the driver stops at an unknown device
        (2, None, "0", ("0", 1, ""), ("--cpu",)), (0, None, "0", ("0", 1, ""), ("--directml", "0")),
        (2, None, "1", ("1", 1, "1"), ("--cpu-vae",)), (0, None, "", ("", 1, ""), ()),
    ],
)  # fmt: skip
def test_a_device_is_the_one_that_the_server_calls_so(
    server, count, visible, word, expected, flags
):
    server(count, visible, *flags)
    assert server.devices(word) == expected


@pytest.mark.parametrize(
    ("count", "visible", "flags", "word"),
    [
        (1, None, (), "1"), (1, None, (), "01"), (1, None, (), "001"), (1, None, (), "0,1"),
        (1, None, (), "99"), (2, None, (), "0,2"), (1, "3", (), "3"), (1, "3", (), "1"),
        (2, "0,7", (), "7"), (0, None, (), "1"), (0, None, (), "0"), (0, "7", (), "0"),
        (0, None, ("--cpu",), "1"),
        (4, None, ("--cpu",), "1"), (1, "3", ("--cuda-device", "3"), "3"),
    ],
)  # fmt: skip
def test_a_device_that_is_not_there_is_refused_however_it_is_spelled(
    server, count, visible, flags, word
):
    server(count, visible, *flags)
    with pytest.raises(ValueError, match="There is no device [0-9]+: "):
        server.devices(word)


@pytest.mark.parametrize("word", ["0,0", "0,00", "1,0,1"])
def test_a_device_is_not_named_twice(server, word):
    server(2)
    with pytest.raises(ValueError, match="names one device twice"):
        server.devices(word)


def test_the_trainer_sees_the_device_and_jobs_of_other_devices_run_beside(store, job, monkeypatch):
    from lcm_lora.training.jobs import processes, supervisor

    first, _ = store.create(job("a"), "a", "0", visible="3")
    other, _ = store.create(job("b"), "b", "", visible="3")
    third, _ = store.create(job("c"), "c", "0", visible="1")
    started = {}

    def start(command, log, mark, **environment):
        started[mark] = environment
        return SimpleNamespace(pid=1)

    monkeypatch.setattr(processes, "start", start)
    monkeypatch.setattr(processes, "end", lambda *_, **__: None)
    supervisor.Supervisor(store)._round()
    assert started.keys() == {first, third}
    assert started[first]["CUDA_VISIBLE_DEVICES"] == started[first]["HIP_VISIBLE_DEVICES"] == "3"
    assert store.job(other).public().keys() == store.job(first).public().keys()
    assert "visible" not in store.job(first).public()
