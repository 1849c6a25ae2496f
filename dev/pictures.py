"""`python3 dev pictures [NAME ...]`: what the toy draws for people to look at.

The .jpg beside each workflow, its own result (but for `Distil*`, whose picture is one of the page);
and for the help pages of nodes a setting at several values, or how nodes are wired.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from . import strips, wiring
from .demo import WORKFLOWS, draw, fitted, toy_subject
from .server import Server, install
from .toy import assemble, stand_ins

ENLARGED = 6  # times: 64 pixels become 384


def main(arguments: list[str], host: Path, local: Path) -> int:
    drawing = [path.stem for path in WORKFLOWS.glob("*.json") if not path.stem.startswith("Distil")]
    drawing += [*strips.STRIPS, *wiring.WIRINGS]
    parser = argparse.ArgumentParser(prog="python3 dev pictures", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(sorted(drawing))}; default: all")
    names = parser.parse_args(arguments).names or sorted(drawing)
    if unknown := sorted(set(names) - set(drawing)):
        parser.error(f"unknown: {', '.join(unknown)}; it draws {', '.join(sorted(drawing))}")
    server = Server(host, local)
    models = server.base / "models"
    checkpoint = assemble.checkpoint(local / "models")
    install(checkpoint, models / "checkpoints")
    for lora in (assemble.LCM_LORA, assemble.STYLE_LORA):
        install(lora, models / "loras")
    stand_ins.lay_out(server.base)
    with server:
        client, subject = server.client(), toy_subject(checkpoint)
        for name in names:
            if name in strips.STRIPS:
                prompt, cells = strips.prompt(name, subject)
                shown = draw(client, name, prompt)[0]
                strips.compose(name, {cell: shown[key][0] for key, cell in cells.items()})
                continue
            if name in wiring.WIRINGS:
                wiring.take(name, server.url, subject, strips.PAGES)
                continue
            path = WORKFLOWS / f"{name}.json"
            prompt = fitted(json.loads(path.read_text(encoding="utf-8")), subject)
            for node in prompt.values():
                if "seed" in node["inputs"]:
                    node["inputs"]["seed"] += 1  # as the demo's pictures have it
            ((drawn, *_),) = draw(client, name, prompt)[0].values()
            with Image.open(drawn) as picture:
                size = [side * ENLARGED for side in picture.size]
                large = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            large.save(path.with_suffix(".jpg"), quality=90)
    return 0
