"""`python3 dev pictures [NAME ...]`: redraws pictures of the documentation on the toy.

Beside each workflow a .jpg of its own result; on the help pages a setting at several values
(strips.py). Pictures of the page and of wired nodes are screenshots taken by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from . import sheet, strips
from .demo import WORKFLOWS, draw, fitted, reseed, toy_subject
from .environment import ROOT
from .server import Server
from .toy import assemble, stand_ins

PAGES = ROOT / "web" / "docs"
ENLARGED = 3  # times: 128 pixels become 384


def main(arguments: list[str], host: Path, local: Path) -> int:
    available = [
        path.stem for path in WORKFLOWS.glob("*.json") if not path.stem.startswith("Distil")
    ]
    available = sorted([*available, *strips.STRIPS])
    parser = argparse.ArgumentParser(prog="python3 dev pictures", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(available)}; default: all")
    names = parser.parse_args(arguments).names or available
    if unknown := sorted(set(names) - set(available)):
        parser.error(f"unknown: {', '.join(unknown)}; expected some of {', '.join(available)}")
    server = Server(host, local)
    assemble.install(server.base)
    stand_ins.lay_out(server.base)
    with server:
        client, subject = server.client(), toy_subject()
        for name in names:
            if name in strips.STRIPS:
                prompt, cells = strips.prompt(name, subject)
                files = sheet.gathered(cells, draw(client, name, prompt)[0])
                sheet.compose(files, tile=144).save(PAGES / f"{name}.jpg", quality=88)
            else:
                path = WORKFLOWS / f"{name}.json"
                prompt = fitted(json.loads(path.read_text(encoding="utf-8")), subject)
                reseed(prompt)
                ((picture, *_),) = draw(client, name, prompt)[0].values()
                enlarge(picture, path.with_suffix(".jpg"))
    return 0


def enlarge(picture: Path, file: Path) -> None:
    with Image.open(picture) as small:
        size = [side * ENLARGED for side in small.size]
        large = small.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    large.save(file, quality=90)
