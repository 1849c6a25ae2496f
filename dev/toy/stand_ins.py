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
# A fox in a few strokes: shape, corners, colour.
BACKDROP = "#2f8f8f"
STROKES = (
    ("ellipse", (26, 40, 102, 108), "#f08a34"), ("polygon", (30, 58, 36, 16, 60, 44), "#f08a34"),
    ("polygon", (98, 58, 92, 16, 68, 44), "#f08a34"), ("ellipse", (44, 76, 84, 108), "#f7e7d8"),
    ("ellipse", (48, 60, 56, 70), "#222222"), ("ellipse", (72, 60, 80, 70), "#222222"),
    ("ellipse", (59, 74, 69, 82), "#222222"),
)  # fmt: skip
HOLE = (14, 10, 114, 118)  # left, top, right, bottom: the animal


def lay_out(base: Path) -> None:
    """Puts both into a server's base folder. Needs the host on the import path."""
    from . import networks

    inputs, controls = base / "input", base / "models" / "controlnet"
    for folder in (inputs, controls):
        folder.mkdir(parents=True, exist_ok=True)
    picture(inputs / PICTURE)
    for strokes in range(len(STROKES) + 1):
        painting(strokes).save(inputs / painted(strokes))
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


def painted(strokes: int) -> str:
    """The name of the painting with so many strokes."""
    return f"painting-{strokes}.png"


def painting(strokes: int) -> Image.Image:
    """A fox as someone would paint it with the Painter node."""
    image = Image.new("RGB", (SIDE, SIDE), BACKDROP)
    pen = ImageDraw.Draw(image)
    for shape, corners, colour in STROKES[:strokes]:
        getattr(pen, shape)(corners, fill=colour)
    return image
