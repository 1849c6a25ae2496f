"""A picture and a ControlNet for the demo model, under the names in the shipped workflows."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw
from safetensors.torch import save_file

from . import world

DRAWN = Path(__file__).parents[2] / "workflows" / "LCM-LoRA_text_to_image.jpg"
PICTURE = "example.png"
CONTROL = "control_v11p_sd15_canny_fp16.safetensors"
HOLE = (36, 8, 92, 60)  # left, top, right, bottom: the head


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
    with Image.open(DRAWN) as drawn:
        small = drawn.convert("RGBA").resize((world.SIZE, world.SIZE), Image.Resampling.LANCZOS)
    alpha = Image.new("L", small.size, 255)
    ImageDraw.Draw(alpha).rectangle(HOLE, fill=0)
    small.putalpha(alpha)
    small.save(path)
