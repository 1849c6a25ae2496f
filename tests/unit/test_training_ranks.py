"""Which backend the processes of a job use to communicate."""

import json

import pytest
import torch
from lcm_lora.training import run
from lcm_lora.training.ranks import Ranks


@pytest.mark.parametrize(
    ("cuda", "nccl", "on_cpu", "backend", "device"),
    [
        (True, True, False, "cpu:gloo,cuda:nccl", [1]), (True, True, True, "gloo", []),
        (True, False, False, "gloo", [1]), (False, False, False, "gloo", []),
    ],
)  # fmt: skip
def test_tensors_of_either_kind_have_a_way(monkeypatch, cuda, nccl, on_cpu, backend, device):
    chosen, devices = [], []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: nccl)
    joined = lambda kind, **_: chosen.append(kind)  # noqa: E731
    monkeypatch.setattr(torch.distributed, "init_process_group", joined)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert Ranks.join(on_cpu) == Ranks(1, 2)
    assert (chosen, devices) == ([backend], device)


@pytest.mark.parametrize(("flags", "on_cpu"), [(["--cpu"], True), ([], False), (None, False)])
def test_a_job_on_the_processor_says_so_before_it_joins(tmp_path, monkeypatch, flags, on_cpu):
    asked = []

    def join(where=False):
        asked.append(where)
        return Ranks()

    monkeypatch.setattr(Ranks, "join", join)
    (tmp_path / "spec.json").write_text(json.dumps({"host_flags": flags}))
    assert run.main([str(tmp_path / "spec.json")]) == 1  # the rest of the description is missing
    assert asked == [on_cpu]
