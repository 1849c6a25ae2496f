"""Live painting: from a changed picture to the one drawn over it, through a real server.

Each run changes the painted picture, as a stroke does, and nothing else, so the server may keep the
models and the text. The other subject is what cannot be saved: the VAE and the network's calls, in
this process on the same weights.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import count
from pathlib import Path

import comfy
import comfy.model_management
import torch
from PIL import Image, ImageDraw

from .. import commands
from ..client import Client
from ..demo import toy_subject
from ..server import Server
from ..sheet import Graph, Subject
from ..toy import assemble, stand_ins, world
from . import subjects
from .report import Report
from .timing import take_turns, timed

STEPS = 4
PROMPT, BARE = "stroke to picture", "VAE and network"
STROKE = "stroke.png"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=15, help="strokes that count")


def run(chosen: argparse.Namespace, checkpoint: Path) -> Report:
    server = Server(Path(comfy.__path__[0]).parent, commands.LOCAL / "live-bench")
    assemble.install(server.base)
    report, strokes = Report("live"), count(1)
    with server:
        client, prompt = server.client(), painting(toy_subject())
        ways = {
            PROMPT: lambda: draw(client, prompt, server.base / "input", next(strokes)),
            BARE: bare(checkpoint),
        }
        turns = take_turns({name: partial(timed, way) for name, way in ways.items()}, chosen.runs)
    case = f"{STEPS} steps, {world.SIZE} pixels"
    for name in ways:
        report.add(case, name, "wall", "s", turns.seconds(name))
    report.add(case, f"{PROMPT} / {BARE}", "ratio", "", turns.ratios(PROMPT, BARE))
    report.bar(f"time, {PROMPT} / {BARE}", turns.ratio(PROMPT, BARE), 1.15)
    return report


def painting(subject: Subject) -> dict:
    """The API prompt of the template Live painting, with Load Image in Painter's place."""
    graph = Graph(subject)
    base, clip, vae = graph.checkpoint()
    (text,), empty = graph.texts(clip, subject.captions[:1])
    image = graph.wire("LoadImage", image=STROKE)
    latent = graph.wire("VAEEncode", pixels=image, vae=vae)
    sampled = graph.wire(
        "LCMKSampler", model=graph.accelerated(base), seed=7, steps=STEPS, cfg=1.0, positive=text,
        negative=empty, latent=latent, denoise=0.7,
    )  # fmt: skip
    graph.add("PreviewImage", images=graph.wire("VAEDecode", samples=sampled, vae=vae))
    return graph.nodes


def draw(client: Client, prompt: dict, folder: Path, stroke: int) -> None:
    """Saves the example with one more line, as the front end uploads it, and draws over it."""
    with Image.open(stand_ins.EXAMPLE) as example:
        painted = example.convert("RGB")
    row = 3 * stroke % world.SIZE
    ImageDraw.Draw(painted).line((0, row, world.SIZE, row), "white", 2)
    painted.save(folder / STROKE)
    client.run(prompt)


def bare(checkpoint: Path):
    """-> what encodes a picture, calls the network STEPS times, and decodes."""
    toy = subjects.Toy.load(checkpoint)
    # As in the server; the quality benchmarks use a format that decodes in half the time.
    toy.vae.first_stage_model.to(memory_format=torch.contiguous_format)
    comfy.model_management.load_models_gpu([toy.base])
    network = toy.base.model.diffusion_model
    text, latent = toy.encode("a photo of a fox")[0][0], torch.randn(1, *subjects.LATENT)
    pixels = torch.rand(1, world.SIZE, world.SIZE, 3)

    @torch.inference_mode()
    def run() -> None:
        toy.vae.encode(pixels)
        for timestep in (999.0, 759.0, 499.0, 259.0)[:STEPS]:
            network(latent, torch.tensor([timestep]), context=text)
        toy.vae.decode(latent)

    return run
