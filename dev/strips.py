"""The pictures of the help pages: one setting of a node at several values, drawn on the toy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .sheet import Graph, Subject

PAGES = Path(__file__).parents[1] / "web" / "docs"
TILE, TOP, ROWS = 144, 26, 2
BLOCKS = ("", "input=0", "output=0", "attention=0")


def sampled(**settings) -> Callable[[Graph, list, Subject], dict]:
    """LCM KSampler's inputs on a MODEL with the LCM-LoRA."""
    return lambda graph, base, subject: {"model": graph.accelerated(base, subject)} | settings


def strength(value: float) -> Callable[[Graph, list, Subject], dict]:
    """Load LCM-LoRA at this strength."""
    return lambda graph, base, subject: {"model": graph.accelerated(base, subject, value)}


def styled(
    weight: float, share: float = 0.0, blocks: str = "", applied: float = 1.0, **settings
) -> Callable[[Graph, list, Subject], dict]:
    """The LCM-LoRA and a style of this weight, which goes through the node in question."""

    def inputs(graph: Graph, base: list, subject: Subject) -> dict:
        lcm, style = graph.vectors(subject)
        if share:
            protect = graph.add("LCMLoRAProtect", style=style, acceleration=lcm, share=share)
            style = [protect, 0]
        if blocks:
            weighed = {"preset": "all", "weights": blocks, "text_encoder": 1.0}
            style = [graph.add("LCMLoRABlocks", vector=style, **weighed), 0]
        both = graph.sum(lcm, 1.0, style, weight)
        model = graph.add(
            "LCMLoRAApply", model=base, vector=both, strength_model=applied, strength_clip=1.0
        )
        return {"model": [graph.add("LCMModelSampling", model=[model, 0]), 0]} | settings

    return inputs


STRIPS = {
    "LCMKSampler": {f"cfg {cfg:g}": sampled(cfg=cfg) for cfg in (1.0, 1.5, 3.0, 6.0)},
    "LCMSchedule": {f"steps {steps}": sampled(steps=steps) for steps in (1, 2, 4, 8)},
    "LCMSampler": {f"eta {eta:g}": sampled(eta=eta) for eta in (0.0, 0.3, 0.7, 1.0)},
    "LCMLoRALoader": {f"strength {value:g}": strength(value) for value in (0.0, 0.5, 1.0, 1.5)},
    "LCMLoRACombine": {f"weight_2 {weight:g}": styled(weight) for weight in (0.0, 0.4, 0.8, 1.2)},
    "LCMLoRAApply": {
        f"strength_model {value:g}": styled(0.8, applied=value) for value in (0.0, 0.5, 1.0, 1.5)
    },
    "LCMLoRAProtect": {
        f"share {share:g}": styled(1.2, share, steps=2) for share in (0.0, 0.5, 1.0)
    },
    "LCMLoRABlocks": {text or "whole": styled(1.0, blocks=text) for text in BLOCKS},
}
"""Node -> title of a column -> what is drawn in it"""


def prompt(node: str, subject: Subject) -> tuple[dict, dict[str, tuple[str, int]]]:
    """-> (API prompt, output node id -> column and row)."""
    graph = Graph()
    loader = graph.add("CheckpointLoaderSimple", ckpt_name=subject.checkpoint)
    size = {"width": subject.size, "height": subject.size, "batch_size": 1}
    latent = [graph.add("EmptyLatentImage", **size), 0]
    texts = [
        [graph.add("CLIPTextEncode", clip=[loader, 1], text=text), 0]
        for text in (*subject.captions[:ROWS], "")
    ]
    cells = {}
    for title, inputs in STRIPS[node].items():
        given = {"steps": 4, "cfg": 1.0} | inputs(graph, [loader, 0], subject)
        for row, text in enumerate(texts[:ROWS]):
            drawn = graph.add(
                "LCMKSampler", seed=subject.seed + row, positive=text, negative=texts[-1],
                latent=latent, denoise=1.0, **given,
            )  # fmt: skip
            image = graph.add("VAEDecode", samples=[drawn, 0], vae=[loader, 2])
            saved = graph.add("SaveImage", images=[image, 0], filename_prefix="lcm_lora_help/cell")
            cells[saved] = (title, row)
    return graph.nodes, cells


def compose(node: str, pictures: dict[tuple[str, int], Path]) -> None:
    """Writes the page's picture: the columns side by side under their titles."""
    titles = list(STRIPS[node])
    strip = Image.new("RGB", (TILE * len(titles), TOP + TILE * ROWS), "white")
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(14)
    for column, title in enumerate(titles):
        pen.text((TILE * column + TILE // 2, TOP // 2), title, "black", font, anchor="mm")
        for row in range(ROWS):
            with Image.open(pictures[title, row]) as picture:
                small = picture.convert("RGB").resize((TILE, TILE), Image.Resampling.LANCZOS)
            strip.paste(small, (TILE * column, TOP + TILE * row))
    strip.save(PAGES / f"{node}.jpg", quality=88)
