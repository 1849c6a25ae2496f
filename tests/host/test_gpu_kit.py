"""`python3 dev gpu` on a CPU, with small networks: all that these parts call is there."""

import importlib
import json
import os
import subprocess
import sys

import pytest
from lcm_lora.dev.environment import ROOT

pytest.importorskip("diffusers", reason="diffusers is a developer's package")
pytest.importorskip("peft", reason="peft is a developer's package")


def test_what_all_parts_import_is_there(comfy):
    from lcm_lora.dev.gpu import measure

    for module, *_ in measure.PARTS.values():
        importlib.import_module(f"lcm_lora.dev.gpu.{module}")


def test_parts_run_in_the_order_they_are_given(host_folder, tmp_path):
    parts = {"merge": "exact", "distill": "recipe", "sampling": "LCMKSampler"}
    words = ["--tiny", "--parts", ",".join(parts), "--budget", "600", "--out", tmp_path / "out"]
    run = subprocess.run(
        [sys.executable, ROOT / "dev", "gpu", *words, "--work", tmp_path / "work"],
        env=os.environ | {"LCM_LORA_DEV_HOST": str(host_folder)}, capture_output=True, text=True,
    )  # fmt: skip
    output = run.stdout + run.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]
    assert list(found) == list(parts), output
    for name, subject in parts.items():
        part = found[name]
        assert part["state"] == "done", output
        assert not [note for note in part["notes"] if "FAILED" in note], output
        assert any(subject in row["subject"] for row in part["rows"])
    assert run.returncode == 0, output
