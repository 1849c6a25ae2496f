"""Runs a command inside the environment."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
from pathlib import Path

from . import environment

LOCAL = environment.ROOT / ".dev"  # the files of this checkout alone
FAULTS = ["-m", "faults", "--times", "20"]
# Each has a function main(arguments, folder of ComfyUI, LOCAL), and is imported when it is needed,
# because importing some takes seconds.
MODULES = {
    "demo": "demo", "serve": "serve", "pictures": "pictures", "bench": "bench.run",
    "toy": "toy.command", "gpu": "gpu.measure",
}  # fmt: skip


def run(verb: str, arguments: list[str], host: str) -> int:
    """The command's exit status; host is the folder of ComfyUI."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lcm_lora").setLevel(logging.INFO)
    folder = Path(host)
    LOCAL.mkdir(exist_ok=True)
    if verb in ("test", "faults"):
        from . import test

        return test.main([*(FAULTS if verb == "faults" else []), *arguments], folder)
    from . import in_process

    arguments = choose_device(arguments)
    in_process.enter(folder, LOCAL / "in-process")
    module = importlib.import_module(f".{MODULES[verb]}", __package__)
    return module.main(arguments, folder, LOCAL)


def choose_device(arguments: list[str]) -> list[str]:
    """Takes `--device cpu` or `--device NUMBER` from the arguments. Hides every other GPU from
    PyTorch, here and in the processes that this one starts. Without the option, PyTorch sees all
    of them. Ends the program if there is no such GPU."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device")
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.device is None:
        return rest
    if chosen.device != "cpu" and not chosen.device.isdecimal():
        raise SystemExit(f"--device: expected cpu or the number of a GPU, found {chosen.device}.")
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if chosen.device == "cpu" else chosen.device
    import torch

    if chosen.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"--device: PyTorch sees no GPU {chosen.device}. Try --device cpu.")
    return rest
