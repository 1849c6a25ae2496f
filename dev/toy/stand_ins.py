"""A picture and a ControlNet for the demo model, under the names in the shipped workflows."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw
from safetensors.torch import save_file

from . import world

SIDE = world.SIZE
EXAMPLE = Path(__file__).with_name("example.png")  # drawn by the demo model in four steps
PICTURE = "example.png"
CONTROL = "control_v11p_sd15_canny_fp16.safetensors"
HOLE = (14, 10, 114, 118)  # left, top, right, bottom: the animal


def lay_out(base: Path) -> None:
    """Puts both into a server's base folder. Needs the host on the import path."""
    from . import networks

    inputs, controls = base / "input", base / "models" / "controlnet"
    for folder in (inputs, controls):
        folder.mkdir(parents=True, exist_ok=True)
    picture(inputs / PICTURE)
    control = networks.control_net()
    networks.initialise(control, seed=1)
    save_file(control.state_dict(), controls / CONTROL)


def picture(path: Path) -> None:
    """A drawn picture with a hole in its alpha, where the front end's mask editor leaves it."""
    with Image.open(EXAMPLE) as drawn:
        small = drawn.convert("RGBA")
    alpha = Image.new("L", small.size, 255)
    ImageDraw.Draw(alpha).rectangle(HOLE, fill=0)
    small.putalpha(alpha)
    small.save(path)
