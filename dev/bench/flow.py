"""Distils the small flow model with the real program from prompts alone, and judges the LoRA.

Needs the model that `python3 dev toy --flow` trains. The last columns are the LoRA in ComfyUI's own
sampler `lcm` on the scheduler `simple`.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from ...lora.formats import files
from ...lora.host import apply
from .. import commands
from ..toy import flow, world
from . import distill_quality, quality, subjects
from .report import Report

LATENTS, STEPS = 500, 600
SETTINGS = {"passes": 1, "rank": 32, "lr": 2e-4}
# Number of steps -> distance to real pictures, as a multiple of the teacher's.
WORST = {4: 1.5}
ENDPOINT = 0.5  # error at one step, as a multiple of the base model's
OURS, BASE, SIMPLE = "LCM-LoRA", "base, Euler", "LCM-LoRA, lcm and simple"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", type=int, default=150, help="judged per seed")
    parser.add_argument("--seeds", type=int, default=2)


def run(chosen: argparse.Namespace, _checkpoint: Path) -> Report:
    work = commands.LOCAL / "flow"
    checkpoint = flow.checkpoint(commands.LOCAL / flow.FOLDER)
    specs = world.specs_of(flow.WORLD, LATENTS, torch.Generator().manual_seed(71))
    captions = [spec.caption for spec in specs]
    source = {"prompts": captions, "count": LATENTS, "draw_steps": 20}
    spec = distill_quality.settings(work / "job", checkpoint, source)
    spec |= {"steps": STEPS, "guidance": flow.GUIDANCE, "banks": str(work / "banks")} | SETTINGS
    training = (Path(__file__).parents[2] / "training").rglob("*.py")
    settings = json.dumps([spec, chosen.pictures])
    kept = quality.Kept(work / "judged", settings, [Path(__file__), *training])
    report = Report("flow")
    minutes = kept.get("distil", partial(distill_quality.distil, spec))["minutes"]
    report.add("from prompts", "engine", "time", "min", [minutes])
    toy = subjects.Toy.load(checkpoint, subjects.quick_dtype(), ("euler", "simple"))
    vector = files.read(Path(spec["output"]))
    patched = apply(toy.base, None, vector, 1.0, 0.0)[0]
    columns = {
        BASE: subjects.of_host(toy, "euler", flow.GUIDANCE, "simple"),
        OURS: subjects.accelerated(toy, vector),
        SIMPLE: subjects.of_host(toy, "lcm", 1.0, "simple", patched),
    }
    figures = quality.measure(
        toy, columns, (1, 2, 4), chosen.pictures, chosen.seeds, kept, flow.WORLD, flow.GUIDANCE
    )
    quality.rows(report, figures)
    quality.lcm_bars(report, figures, WORST, OURS)
    report.bar(
        f"endpoint error at 1 step, {OURS} / {BASE}",
        quality.ratio(
            figures, ("1 steps", OURS, "endpoint_error"), ("1 steps", BASE, "endpoint_error")
        ),
        ENDPOINT,
    )
    kept.forget()
    return report
