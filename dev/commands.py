"""Runs a command inside the environment. `local` is what belongs to this checkout alone: .dev/."""

from __future__ import annotations

import logging
from pathlib import Path

from . import environment

LOCAL = environment.ROOT / ".dev"
FAULTS = ["-m", "faults", "--times", "20"]


def run(verb: str, arguments: list[str], host: str) -> int:
    """The command's exit status; host is the folder of ComfyUI."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lcm_lora").setLevel(logging.INFO)
    folder = Path(host)
    LOCAL.mkdir(exist_ok=True)
    # Imported where they are used: each needs another part of the environment.
    if verb in ("test", "faults"):
        from . import test

        return test.main([*(FAULTS if verb == "faults" else []), *arguments], folder)
    from . import in_process

    in_process.enter(folder, LOCAL / "in-process")
    if verb == "demo":
        from . import demo

        return demo.main(arguments, folder, LOCAL)
    if verb == "serve":
        from . import serve

        return serve.main(arguments, folder, LOCAL)
    if verb == "pictures":
        from . import pictures

        return pictures.main(arguments, folder, LOCAL)
    if verb == "bench":
        from .bench import run as bench

        return bench.main(arguments, LOCAL)
    from .toy import command

    return command.main(arguments, environment.cache(), LOCAL)
