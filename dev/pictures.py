"""`python3 dev pictures [NAME ...]`: redraws pictures of the documentation with the demo model.

Template cards, the gallery and the banner (cards.py); on the help pages a setting at several values
(strips.py). Pictures of the page and of wired nodes are screenshots taken by hand. The contact
sheet is a result of `python3 dev demo`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import cards, sheet, strips
from .demo import COMPARE, FIT, LIVE, WORKFLOWS, draw, toy_subject
from .environment import ROOT
from .server import Server, install
from .toy import assemble, stand_ins
from .toy.stand_ins import STROKES

PAGES, DOCS = ROOT / "web" / "docs", ROOT / "docs"
DRAWN = {"gallery": cards.gallery, "banner": cards.banner}
LIVE_FRAMES = "live-painting"


def main(arguments: list[str], host: Path, local: Path) -> int:
    available = [path.stem for path in WORKFLOWS.glob("*.json")]
    available = sorted([*available, *strips.STRIPS, *DRAWN, LIVE_FRAMES])
    parser = argparse.ArgumentParser(prog="python3 dev pictures", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(available)}; default: all")
    names = parser.parse_args(arguments).names or available
    if unknown := sorted(set(names) - set(available)):
        parser.error(f"unknown: {', '.join(unknown)}; expected some of {', '.join(available)}")
    server = Server(host, local)
    assemble.install(server.base)
    if FIT in names:
        fine_tuned = assemble.checkpoint(fine_tuned=cards.FINE_TUNED)
        install(fine_tuned, server.base / "models" / "checkpoints")
    stand_ins.lay_out(server.base)
    with server:
        client, subject = server.client(), toy_subject()

        def saved(title: str, prompt: dict) -> list[Path]:
            shown = draw(client, title, prompt)[0]  # in the order in which they ran
            return [path for node in sorted(shown, key=int) for path in shown[node]]

        for name in names:
            if name in strips.STRIPS:
                prompt, cells = strips.prompt(name, subject)
                files = sheet.gathered(cells, draw(client, name, prompt)[0])
                sheet.compose(files, tile=144).save(PAGES / f"{name}.jpg", quality=88)
            elif name == LIVE_FRAMES:
                frames = cards.strokes(read(LIVE), subject, saved, range(len(STROKES) + 1))
                frames[0].save(
                    DOCS / f"{name}.webp", save_all=True, append_images=frames[1:],
                    duration=[700] * (len(frames) - 1) + [2500], loop=0, quality=85,
                )  # fmt: skip
            elif name in DRAWN:
                DRAWN[name](subject, saved).save(DOCS / f"{name}.jpg", quality=85)
            else:
                card = cards.card(name, read(cards.drawn_by(name)), subject, saved)
                card.save(WORKFLOWS / f"{name}.jpg", quality=92)
                if name == COMPARE:  # its help page shows the same
                    card.save(PAGES / "LCMCompare.jpg", quality=88)
    return 0


def read(name: str) -> dict:
    """A shipped workflow."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
