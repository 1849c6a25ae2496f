"""Runs a command inside the environment."""

from __future__ import annotations

import importlib
import logging
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

    in_process.enter(folder, LOCAL / "in-process")
    module = importlib.import_module(f".{MODULES[verb]}", __package__)
    return module.main(arguments, folder, LOCAL)
