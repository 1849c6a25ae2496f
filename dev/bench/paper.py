"""The claims of the LCM-LoRA paper (arXiv 2311.05556), measured on the demo model.

| part | question |
|---|---|
| steps | How good are 1, 2, 4 and 8 steps, beside DDIM and DPM++ 2M? |
| checkpoints | Does the LoRA serve fine-tuned models that it was not distilled from? |
| style | Which weights combine a style with it? The paper takes 0.8 and 1.0. |
| rank | What does a smaller rank cost? |
| data | Are prompts enough, without pictures? |

The figures are those of `bench quality`. LoRAs that a part distils are kept for the next run.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import comfy
import torch
from PIL import Image

from ...lora.combine import exact
from ...lora.formats import files
from .. import commands, environment, sheet
from ..toy import assemble, learn, sprites, world
from ..toy.command import DISTILLED, write_pictures
from . import quality, subjects
from .distill_quality import distil
from .report import Report, chosen_parts

log = logging.getLogger("lcm_lora")
PARTS = ("steps", "checkpoints", "style", "rank", "data")
RANKS = (4, 8, 16, 32, 64)
STYLE_WEIGHTS, LCM_WEIGHTS = (0.0, 0.4, 0.8, 1.2), (0.6, 0.8, 1.0, 1.2)
PICTURES, PROMPTS = 1_600, 600


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, with commas")
    parser.add_argument("--pictures", type=int, default=200, help="pictures per seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="steps of each distillation")


def run(chosen: argparse.Namespace, checkpoint: Path) -> Report:
    wanted = chosen_parts(chosen.parts, PARTS)
    bench = Bench(chosen, checkpoint)
    for part in wanted:
        getattr(bench, part)()
    return bench.report


class Bench:
    """One run: its settings, the LoRAs that it distilled, and what it found."""

    def __init__(self, chosen: argparse.Namespace, checkpoint: Path) -> None:
        self.chosen, self.checkpoint = chosen, checkpoint
        self.work = commands.LOCAL / "paper"
        self.work.mkdir(parents=True, exist_ok=True)
        self.report = Report("paper")

    def steps(self) -> None:
        toy = self.load(self.checkpoint)
        columns = subjects.columns(toy)
        self.measure("steps", toy, columns, quality.STEPS)
        self.picture("steps", toy, {
            (plural(steps), title): (sample, steps)
            for steps in quality.STEPS for title, sample in columns.items()
        })  # fmt: skip

    def checkpoints(self) -> None:
        for name in assemble.FINE_TUNED:
            checkpoint = assemble.checkpoint(fine_tuned=name)
            toy = self.load(checkpoint)
            own = files.read(self.distilled(f"{name}-own", checkpoint, self.pictures(name)))
            columns = subjects.columns(toy)
            columns["its own LCM-LoRA"] = subjects.accelerated(toy, own)
            self.measure(name, toy, columns, quality.STEPS, name)
            cells = {("4 steps", title): (sample, 4) for title, sample in columns.items()}
            cells["4 steps", "50 steps of DDIM"] = subjects.teacher(toy), 50
            self.picture(name, toy, cells, name)

    def style(self) -> None:
        toy = self.load(self.checkpoint)
        lcm, style = (
            files.read(assemble.lora(name))
            for name in (assemble.LCM_LORA, assemble.STICKER_LORA)
        )  # fmt: skip
        columns = {
            f"{share:g} x style + {weight:g} x LCM": subjects.accelerated(
                toy, exact((style, lcm), (share, weight))[0]
            )
            for weight in LCM_WEIGHTS
            for share in STYLE_WEIGHTS
        }
        self.measure("style", toy, columns, (4,), "sticker")
        self.picture("style", toy, {
            (title.split(" + ")[1], title.split(" + ")[0]): (sample, 4)
            for title, sample in columns.items()
        })  # fmt: skip

    def rank(self) -> None:
        data = self.pictures("3d")
        loras = {
            f"rank {rank}": self.distilled(f"rank-{rank}", self.checkpoint, data, rank=rank)
            for rank in RANKS
        }
        self.loras("rank", loras)

    def data(self) -> None:
        captions = [
            spec.caption for spec in world.specs(PROMPTS, torch.Generator().manual_seed(71))
        ]
        prompts = {"prompts": captions, "count": PROMPTS}
        self.loras("data", {
            "from prompts": self.distilled("prompts", self.checkpoint, prompts),
            "from pictures": self.distilled(
                "rank-64", self.checkpoint, self.pictures("3d"), rank=64
            ),
        })  # fmt: skip

    def loras(self, part: str, loras: dict[str, Path]) -> None:
        """Measures and draws LoRAs of the demo model."""
        toy = self.load(self.checkpoint)
        columns = {
            name: subjects.accelerated(toy, files.read(path)) for name, path in loras.items()
        }
        self.measure(part, toy, columns, (1, 2, 4))
        self.picture(part, toy, {
            (plural(steps), title): (sample, steps)
            for steps in (1, 4) for title, sample in columns.items()
        })  # fmt: skip

    def load(self, checkpoint: Path) -> subjects.Toy:
        return subjects.Toy.load(checkpoint, subjects.quick_dtype())

    def measure(
        self, part: str, toy: subjects.Toy, columns: dict[str, subjects.Sample],
        steps: tuple[int, ...], collection: str = "3d",
    ) -> None:  # fmt: skip
        count = self.chosen.pictures
        sources = [Path(__file__), *(environment.ROOT / "training").rglob("*.py")]
        kept = quality.Kept(self.work / "kept", f"{part} {toy.name} {count}", sources)
        figures = quality.measure(
            toy, columns, steps, count, self.chosen.seeds, kept, collection
        )  # fmt: skip
        named = {(f"{part}, {case}", *rest): values for (case, *rest), values in figures.items()}
        quality.rows(self.report, named)

    def picture(
        self, part: str, toy: subjects.Toy,
        cells: dict[sheet.Cell, tuple[subjects.Sample, int]], collection: str = "3d",
    ) -> None:  # fmt: skip
        """Writes PART.jpg: four pictures in each cell, from the same noise."""
        specs = quality.scenes(9, 4, collection)
        positive, negative = toy.encode(*(spec.caption for spec in specs)), toy.encode("")
        folder = self.work / "pictures"
        folder.mkdir(exist_ok=True)
        drawn: dict[sheet.Cell, list[Path]] = {}
        for number, (cell, (sample, steps)) in enumerate(cells.items()):
            for i, picture in enumerate(toy.decode(sample(steps, 9, positive, negative, 4))):
                file = folder / f"{part}-{number}-{i}.png"
                pixels = (picture * 255).round().byte().permute(1, 2, 0)
                Image.fromarray(pixels.cpu().numpy()).save(file)
                drawn.setdefault(cell, []).append(file)
        sheet.compose(drawn, tile=96, across=4, gap=12).save(self.work / f"{part}.jpg", quality=88)

    def pictures(self, collection: str) -> dict:
        """Captioned pictures of a collection, drawn once: the setting `data` of a job."""
        folder = self.work / f"pictures-{collection}"
        if not folder.exists():
            sprite = sprites.load(collection, environment.cache())
            scratch = folder.with_suffix(".tmp")
            write_pictures(scratch, learn.Painter({collection: sprite}, 9), PICTURES, collection)
            scratch.rename(folder)
        # Not mirrored, because captions name what is on the left first.
        return {"kind": "pictures", "path": str(folder), "flip": False}

    def distilled(self, name: str, checkpoint: Path, data: dict, **changes: int) -> Path:
        """The LoRA of a job with default settings but these, distilled if it is not there."""
        folder = self.work / name
        spec = {
            "host": str(Path(comfy.__path__[0]).parent), "checkpoint": str(checkpoint),
            "banks": str(self.work / "banks"), "output": str(folder / "lcm-lora.safetensors"),
            "resolution": world.SIZE, "guidance": DISTILLED, "sample_every": 0, "data": data,
            "steps": self.chosen.steps, **changes,
        }  # fmt: skip
        done = folder / "spec.json"
        finished = Path(spec["output"]).exists() and done.exists()
        if not finished or json.loads(done.read_text(encoding="utf-8")) != spec:
            log.info("%s: distilling", name)
            distil(spec)
        return Path(spec["output"])


def plural(steps: int) -> str:
    return f"{steps} step" + "s" * (steps > 1)
