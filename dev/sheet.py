"""The contact sheet: one API prompt that draws every cell, and the picture made of the results."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

STEPS = (1, 2, 4, 8)
COLUMNS = (
    "base, DDIM", "base, DPM++ 2M", "base, LCM sampler", "LCM-LoRA", "LCM-LoRA + style",
)  # fmt: skip
TEACHER = "base, DDIM 50 steps"


@dataclass(frozen=True)
class Subject:
    """What is drawn with: file names as the host lists them, captions, and the base's guidance."""

    checkpoint: str
    lcm_lora: str
    style_lora: str | None
    captions: tuple[str, ...]
    guidance: float
    size: int
    seed: int = 7


@dataclass
class Graph:
    """An API prompt being put together."""

    nodes: dict[str, dict] = field(default_factory=dict)

    def add(self, kind: str, **inputs) -> str:
        key = str(len(self.nodes) + 1)
        self.nodes[key] = {"class_type": kind, "inputs": inputs}
        return key

    def sum(self, one: list, weight_1: float, two: list, weight_2: float) -> list:
        """The wire of two vectors' exact sum."""
        inputs = {"vector_1": one, "weight_1": weight_1, "vector_2": two, "weight_2": weight_2}
        nested = {f"count.{name}": value for name, value in inputs.items()}
        exact = {"method": "exact", "rank": 0, "keep_energy": 1.0}
        return [self.add("LCMLoRACombine", count="2", **exact, **nested), 0]

    def accelerated(self, base: list, subject: Subject, strength: float = 1.0) -> list:
        """The wire of a MODEL with the LCM-LoRA."""
        given = {"lora_name": subject.lcm_lora, "strength": strength, "family": "auto"}
        return [self.add("LCMLoRALoader", model=base, **given), 0]

    def vectors(self, subject: Subject) -> list[list]:
        """The wires of the LCM-LoRA's and the style's vectors."""
        names = subject.lcm_lora, subject.style_lora
        return [[self.add("LCMLoRAVectorLoader", lora_name=name), 0] for name in names]


Cell = tuple[int | None, str, int]
"""(steps or None for the teacher, column, which caption)"""


def prompt(subject: Subject) -> tuple[dict, dict[str, Cell]]:
    """-> (API prompt, output node id -> its cell)."""
    graph = Graph()
    loader = graph.add("CheckpointLoaderSimple", ckpt_name=subject.checkpoint)
    base, clip, vae = [loader, 0], [loader, 1], [loader, 2]
    size = {"width": subject.size, "height": subject.size, "batch_size": 1}
    latent = [graph.add("EmptyLatentImage", **size), 0]
    texts = [
        [graph.add("CLIPTextEncode", clip=clip, text=text), 0] for text in (*subject.captions, "")
    ]
    empty = texts.pop()
    models = {
        "base, LCM sampler": [graph.add("LCMModelSampling", model=base), 0],
        "LCM-LoRA": graph.accelerated(base, subject),
    }
    if subject.style_lora:
        models["LCM-LoRA + style"] = [_combined(graph, base, clip, subject), 0]

    cells: dict[str, Cell] = {}

    def draw(steps: int | None, column: str) -> None:
        for index, text in enumerate(texts):
            common = {"seed": subject.seed + index, "positive": text, "negative": empty}
            if column in models:
                cfg = subject.guidance if column == "base, LCM sampler" else 1.0
                sampled = graph.add(
                    "LCMKSampler", model=models[column], steps=steps, cfg=cfg, latent=latent,
                    denoise=1.0, **common,
                )  # fmt: skip
            else:
                sampled = graph.add(
                    "KSampler", model=base, steps=steps or 50, cfg=subject.guidance,
                    sampler_name="dpmpp_2m" if "DPM" in column else "ddim",
                    scheduler="sgm_uniform", latent_image=latent, denoise=1.0, **common,
                )  # fmt: skip
            image = graph.add("VAEDecode", samples=[sampled, 0], vae=vae)
            saved = graph.add("SaveImage", images=[image, 0], filename_prefix="lcm_lora_sheet/cell")
            cells[saved] = (steps, column, index)

    draw(None, TEACHER)
    for steps in STEPS:
        for column in COLUMNS:
            if column in models or column.startswith("base, D"):
                draw(steps, column)
    return graph.nodes, cells


def _combined(graph: Graph, base: list, clip: list, subject: Subject) -> str:
    lcm, style = graph.vectors(subject)
    applied = graph.add(
        "LCMLoRAApply", model=base, clip=clip, vector=graph.sum(lcm, 1.0, style, 0.8),
        strength_model=1.0, strength_clip=1.0,
    )  # fmt: skip
    return graph.add("LCMModelSampling", model=[applied, 0])


def compose(pictures: dict[Cell, Path], captions: int) -> Image.Image:
    """Rows are steps, columns ways to sample, the teacher to the right; all captions in a cell."""
    columns = [name for name in COLUMNS if any(cell[1] == name for cell in pictures)]
    across = 2 if captions > 1 else 1
    tile = 128 if captions > 1 else 256
    cell, gap, left, top = tile * across, 12, 90, 44
    width = left + (cell + gap) * (len(columns) + 1)
    sheet = Image.new("RGB", (width, top + (cell + gap) * len(STEPS)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(17)

    def paste(steps: int | None, name: str, x: int, y: int) -> None:
        for index in range(captions):
            with Image.open(pictures[steps, name, index]) as picture:
                small = picture.convert("RGB").resize((tile, tile), Image.Resampling.LANCZOS)
            sheet.paste(small, (x + tile * (index % across), y + tile * (index // across)))

    for column, name in enumerate([*columns, TEACHER]):
        x = left + (cell + gap) * column
        pen.text((x + cell // 2, top // 2), name, "black", font, anchor="mm")
        if name == TEACHER:
            paste(None, name, x, top)
            continue
        for row, steps in enumerate(STEPS):
            paste(steps, name, x, top + (cell + gap) * row)
    for row, steps in enumerate(STEPS):
        y = top + (cell + gap) * row + cell // 2
        pen.text((left // 2, y), f"{steps} step" + "s" * (steps > 1), "black", font, anchor="mm")
    return sheet
