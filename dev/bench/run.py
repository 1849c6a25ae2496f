"""`python3 dev bench AREA [--json FILE] [--device cpu|NUMBER]`: runs one benchmark and prints its
table. Without --device, it runs on the GPU if there is one."""

from __future__ import annotations

import argparse
import importlib
import logging
import time
from pathlib import Path

AREAS = (
    "quality", "sampling", "distill", "fullsize", "jobs", "merge", "paper", "live", "weights",
    "flow",
)  # fmt: skip
log = logging.getLogger("lcm_lora")


def main(arguments: list[str], _host: Path, local: Path) -> int:
    """Exit status 0 if every bar holds, else 1. Needs ComfyUI on the import path."""
    area = next((word for word in arguments if word in AREAS), None)
    parser = argparse.ArgumentParser(prog="python3 dev bench", description=__doc__)
    parser.add_argument("area", choices=AREAS)
    parser.add_argument("--json", type=Path, metavar="FILE")
    if area is None:
        parser.parse_args(arguments)
    import comfy.utils

    from ..toy import assemble

    comfy.utils.set_progress_bar_enabled(False)
    module = importlib.import_module(f".{area}", __package__)
    module.options(parser)
    chosen = parser.parse_args(arguments)
    begun = time.monotonic()
    report = module.run(chosen, assemble.checkpoint())
    log.info("%s: %.0f s", area, time.monotonic() - begun)
    print(f"on {report.machine['gpu'] or 'the CPU'}\n{report.table()}")  # noqa: T201 (the table is this command's result)
    if chosen.json:
        report.write(chosen.json)
    return 0 if all(bar["holds"] for bar in report.bars) else 1
