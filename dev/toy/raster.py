"""Draws every .svg of a folder as a .png next to it. Runs where resvg-py is installed."""

import sys
from pathlib import Path

import resvg_py

for path in Path(sys.argv[1]).glob("*.svg"):
    drawn = resvg_py.svg_to_bytes(svg_string=path.read_text(encoding="utf-8"))
    path.with_suffix(".png").write_bytes(bytes(drawn))
