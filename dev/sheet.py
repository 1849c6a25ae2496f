"""Pictures side by side: API prompts that draw them, and tables made of the results."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

STEPS = (1, 2, 4, 8)
TEACHER = "base, DDIM 50 steps"
PLAIN = {"base, DDIM": "ddim", "base, DPM++ 2M": "dpmpp_2m"}  # ComfyUI's samplers
Wire = list
"""[node id, number of the output]"""
Cell = tuple[str, str]
"""titles of the row and of the column"""


@dataclass(frozen=True)
class Subject:
    """What to draw with: files as ComfyUI lists them, captions, and the guidance of the base."""

    checkpoint: str
    lcm_lora: str
    style_lora: str | None
    captions: tuple[str, ...]
    guidance: float
    size: int
    seed: int = 7
    second_style: str | None = None


@dataclass
class Graph:
    """An API prompt that grows."""

    subject: Subject
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, kind: str, **inputs: Any) -> str:
        """Adds a node; -> its id."""
        key = str(len(self.nodes) + 1)
        self.nodes[key] = {"class_type": kind, "inputs": inputs}
        return key

    def wire(self, kind: str, **inputs: Any) -> Wire:
        """Adds a node; -> its first output."""
        return [self.add(kind, **inputs), 0]

    def checkpoint(self) -> tuple[Wire, Wire, Wire]:
        """MODEL, CLIP and VAE."""
        loader = self.add("CheckpointLoaderSimple", ckpt_name=self.subject.checkpoint)
        return [loader, 0], [loader, 1], [loader, 2]

    def latent(self) -> Wire:
        size = self.subject.size
        return self.wire("EmptyLatentImage", width=size, height=size, batch_size=1)

    def texts(self, clip: Wire, captions: tuple[str, ...]) -> tuple[list[Wire], Wire]:
        """The captions, encoded, and the empty one."""
        *texts, empty = (
            self.wire("CLIPTextEncode", clip=clip, text=text) for text in (*captions, "")
        )
        return texts, empty

    def accelerated(self, base: Wire, strength: float = 1.0) -> Wire:
        """A MODEL with the LCM-LoRA."""
        lora = {"lora_name": self.subject.lcm_lora, "strength": strength, "family": "auto"}
        return self.wire("LCMLoRALoader", model=base, **lora)

    def vectors(self) -> tuple[Wire, Wire]:
        """The LCM-LoRA and the style."""
        names = self.subject.lcm_lora, self.subject.style_lora
        lcm, style = (self.wire("LCMLoRAVectorLoader", lora_name=name) for name in names)
        return lcm, style

    def sum(self, one: Wire, weight_1: float, two: Wire, weight_2: float) -> Wire:
        """The exact sum of two vectors."""
        inputs = {"vector_1": one, "weight_1": weight_1, "vector_2": two, "weight_2": weight_2}
        nested = {f"count.{name}": value for name, value in inputs.items()}
        exact = {"method": "exact", "rank": 0, "keep_energy": 1.0}
        return self.wire("LCMLoRACombine", count="2", **exact, **nested)

    def applied(self, base: Wire, vector: Wire, strength: float = 1.0, **clip: Wire) -> Wire:
        """A MODEL with this vector, sampled as LCM."""
        strengths = {"strength_model": strength, "strength_clip": 1.0}
        model = self.wire("LCMLoRAApply", model=base, vector=vector, **strengths, **clip)
        return self.wire("LCMModelSampling", model=model)

    def picture(self, vae: Wire, sampler: str, **inputs: Any) -> str:
        """Samples, decodes and saves; -> the id of the node that saves."""
        sampled = self.wire(sampler, denoise=1.0, **inputs)
        image = self.wire("VAEDecode", samples=sampled, vae=vae)
        return self.add("SaveImage", images=image, filename_prefix="lcm_lora_sheet/cell")


def prompt(subject: Subject) -> tuple[dict[str, dict], dict[str, Cell]]:
    """The contact sheet: its API prompt, and the id of each node that saves -> its cell.

    Rows are steps, columns are ways to sample, the teacher is to the right.
    """
    graph = Graph(subject)
    base, clip, vae = graph.checkpoint()
    latent, (texts, empty) = graph.latent(), graph.texts(clip, subject.captions)
    models = {
        "base, LCM sampler": (graph.wire("LCMModelSampling", model=base), subject.guidance),
        "LCM-LoRA": (graph.accelerated(base), 1.0),
    }
    if subject.style_lora:
        lcm, style = graph.vectors()
        both = graph.sum(lcm, 1.0, style, 0.8)
        models["LCM-LoRA + style"] = graph.applied(base, both, clip=clip), 1.0
    cells: dict[str, Cell] = {}

    def draw(row: str, column: str, steps: int) -> None:
        for index, text in enumerate(texts):
            inputs = {"seed": subject.seed + index, "positive": text, "negative": empty}
            inputs["steps"] = steps
            if column in models:
                model, cfg = models[column]
                inputs |= {"model": model, "cfg": cfg, "latent": latent}
                key = graph.picture(vae, "LCMKSampler", **inputs)
            else:
                key = graph.picture(
                    vae, "KSampler", model=base, cfg=subject.guidance, latent_image=latent,
                    sampler_name=PLAIN.get(column, "ddim"), scheduler="sgm_uniform", **inputs,
                )  # fmt: skip
            cells[key] = row, column

    for steps in STEPS:
        row = f"{steps} step" + "s" * (steps > 1)
        for column in (*PLAIN, *models):
            draw(row, column, steps)
        if steps == STEPS[0]:
            draw(row, TEACHER, 50)
    return graph.nodes, cells


def gathered(cells: dict[str, Cell], pictures: dict[str, list[Path]]) -> dict[Cell, list[Path]]:
    """The files of each cell, of what Client.pictures returns."""
    files: dict[Cell, list[Path]] = {}
    for key, cell in cells.items():
        files.setdefault(cell, []).append(pictures[key][0])
    return files


def compose(files: dict[Cell, list[Path]], tile: int, across: int = 1, gap: int = 0) -> Image.Image:
    """A table of pictures with titles. A cell has `across` pictures per row, each `tile` pixels."""
    rows = list(dict.fromkeys(row for row, _ in files))
    columns = list(dict.fromkeys(column for _, column in files))
    down = -(-max(map(len, files.values())) // across)
    width, height = tile * across + gap, tile * down + gap
    left, top = 90 if any(rows) else 0, 36
    sheet = Image.new("RGB", (left + width * len(columns), top + height * len(rows)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for number, title in enumerate(columns):
        x = left + width * number + tile * across // 2
        pen.text((x, top // 2), title, "black", font, anchor="mm")
    for number, title in enumerate(rows):
        y = top + height * number + tile * down // 2
        pen.text((left // 2, y), title, "black", font, anchor="mm")
    for (row, column), paths in files.items():
        x, y = left + width * columns.index(column), top + height * rows.index(row)
        for number, path in enumerate(paths):
            with Image.open(path) as picture:
                small = picture.convert("RGB").resize((tile, tile), Image.Resampling.LANCZOS)
            sheet.paste(small, (x + tile * (number % across), y + tile * (number // across)))
    return sheet
