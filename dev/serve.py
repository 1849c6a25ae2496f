"""`python3 dev serve`: a server with the pack in it, for a browser; Ctrl-C ends it."""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

from .server import Server
from .toy import assemble, world

log = logging.getLogger("lcm_lora")


def main(arguments: list[str], host: Path, local: Path) -> int:
    parser = argparse.ArgumentParser(prog="python3 dev serve", description=__doc__)
    parser.add_argument("--port", type=int, default=8188)
    chosen = parser.parse_args(arguments)
    server = Server(host, local, chosen.port)
    assemble.install(server.base)
    with server:
        log.info("ComfyUI is at %s, its log is %s", server.url, server.log)
        log.info(
            "The demo model's files are %s (for %d pixels a side) and %s. "
            "It knows prompts such as 'a photo of a fox on a teal background'.",
            assemble.checkpoint().name, world.SIZE, assemble.LCM_LORA,
        )  # fmt: skip
        try:
            while server.alive():
                time.sleep(1)
        except KeyboardInterrupt:
            return 0
    log.error("The server ended by itself; see %s", server.log)
    return 1
