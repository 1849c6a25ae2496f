"""The node that finds the weights of styles beside an acceleration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.utils
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.v0_0_2 import io
from PIL import Image

from ..lora.combine import summed
from ..lora.delta import Vector
from ..lora.formats.module_names import is_text
from ..lora.formats.searched import distilled_at, written
from ..lora.formats.wire import Tensors, from_wire, to_wire
from ..lora.stack import terms
from ..samplers.report import Line
from ..search.find import Point
from ..search.host import Settings, Studio
from ..search.picture import sheet
from ..search.report import report
from ..search.session import PICTURES, Order, Outcome, calls, figures, search, split
from ..training.data.sources import PROMPTS, read_prompts
from .host import interruptions, show, weight_input
from .overlap import overlap
from .texts import as_ui

MOST_STYLES = 5
USUAL_GUIDANCE = 7.5


class LCMWeightSearch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        rows = [_row(number) for number in range(1, MOST_STYLES + 1)]
        counts = [
            io.DynamicCombo.Option(str(count), [field for row in rows[:count] for field in row])
            for count in range(1, MOST_STYLES + 1)
        ]
        return io.Schema(
            node_id="LCMWeightSearch",
            display_name="Find LoRA Weights",
            category="LCM-LoRA",
            description=(
                "Finds weights for an LCM-LoRA and up to 5 styles, so that a few steps draw what "
                "the styles alone draw in many. It draws a reference with the styles alone, "
                "measures about 15 sets of weights against it, and checks the result on prompts "
                "that it did not search on. If no weights are better than the default, it keeps "
                "the default."
            ),
            search_aliases=[
                "lora weight", "auto weight", "optimize", "lora strength", "xy plot", "tune",
                "best weight", "combine lora",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The checkpoint's model, without an LCM-LoRA."
                ),
                io.Clip.Input("clip", tooltip="The text encoder, for the prompts."),
                io.Vae.Input("vae", tooltip="Decodes the pictures that are shown."),
                io.LoraModel.Input(
                    "acceleration", tooltip="The vector of the LCM-LoRA, from Load LoRA Vector."
                ),
                weight_input(
                    "acceleration_weight",
                    "Default weight of the LCM-LoRA: the search begins there, and keeps it if no "
                    "other weight is better.",
                ),
                io.DynamicCombo.Input(
                    "count", options=counts, tooltip="How many styles the node has."
                ),
                io.Latent.Input(
                    "latent", tooltip="An empty latent, for the size of the pictures."
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip=(
                        "Prompts to search on, one per line, with the trigger words of the "
                        "styles. Every third prompt is held out for the check. Leave it empty to "
                        "use the prompts that come with this pack."
                    ),
                ),
                io.Int.Input(
                    "steps", default=4, min=1, max=16,
                    tooltip="Steps of the few-step pictures. The best weights depend on them.",
                ),
                io.Int.Input(
                    "budget", default=40, min=1, max=200,
                    tooltip="How many sets of weights to measure at most. Two weights need about "
                    "15, six about 40.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=False,
                    tooltip="Seed of all noise. All weights are measured with the same noise.",
                ),
                io.Int.Input(
                    "pictures", default=PICTURES, min=1, max=256, advanced=True,
                    tooltip="Pictures to search on. Half as many are held out for the check.",
                ),
                io.Int.Input(
                    "reference_steps", default=50, min=4, max=50, advanced=True,
                    tooltip="Steps of the reference.",
                ),
                io.Float.Input(
                    "guidance", default=0.0, min=0.0, max=30.0, step=0.1, advanced=True,
                    tooltip="Guidance scale (cfg) of the reference. 0 takes the guidance that the "
                    "LCM-LoRA was distilled with if its file names it, otherwise 7.5.",
                ),
                io.Float.Input(
                    "cfg", default=1.0, min=0.0, max=30.0, step=0.1, advanced=True,
                    tooltip="cfg of the few-step pictures, usually 1.",
                ),
                io.String.Input(
                    "negative", default="", advanced=True,
                    tooltip="Negative prompt of the reference, and of the few-step pictures if cfg "
                    "is not 1.",
                ),
                weight_input("lowest", "The lowest weight to try.", 0.0),
                weight_input("highest", "The highest weight to try.", 1.5),
                io.Float.Input(
                    "style_at_least", default=0.0, min=0.0, max=1.5, step=0.05, optional=True,
                    advanced=True,
                    tooltip="The least share of the styles' effect that must show; 1 is their "
                    "effect in many steps without the LCM-LoRA. The search takes the best weights "
                    "that reach this share. 0 sets no limit.",
                ),
            ],
            outputs=[
                io.LoraModel.Output(
                    display_name="LORA_MODEL",
                    tooltip="The sum of all vectors at the weights found: apply it or save it.",
                ),
                io.String.Output(
                    display_name="weights",
                    tooltip="The weights, one per line, for Combine LoRA Vectors.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="The weights found, which other weights are equally good, and how much "
                    "of the style shows.",
                ),
                io.Image.Output(
                    display_name="sheet",
                    tooltip="The path of the search, and pictures of held-out prompts: the "
                    "reference, the default, the weights found, and the two ends of the range of "
                    "equally good weights.",
                ),
                io.Image.Output(
                    display_name="overlap",
                    tooltip="Where the styles support or fight the LCM-LoRA: how large the change "
                    "of each style is in every block at the weights found, and its angle to the "
                    "LCM-LoRA.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> int:
        return interruptions["LCMWeightSearch"]

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        vae: VAE,
        acceleration: Tensors,
        acceleration_weight: float,
        count: dict[str, Any],
        latent: dict[str, Any],
        prompts: str,
        steps: int,
        budget: int,
        seed: int,
        pictures: int = PICTURES,
        reference_steps: int = 50,
        guidance: float = 0.0,
        cfg: float = 1.0,
        negative: str = "",
        lowest: float = 0.0,
        highest: float = 1.5,
        style_at_least: float = 0.0,
    ) -> io.NodeOutput:
        numbers = range(1, int(count["count"]) + 1)
        vectors = [from_wire(acceleration), *(from_wire(count[f"style_{n}"]) for n in numbers)]
        strengths = tuple(float(count[f"strength_{number}"]) for number in numbers)
        default = (acceleration_weight, *(count[f"weight_{number}"] for number in numbers))
        searched, held_out = split(prompts, read_prompts(str(PROMPTS)), pictures)
        names = tuple(vector.source for vector in vectors)
        order = Order(names, searched, held_out, default, lowest, highest, budget, style_at_least)
        guidance = guidance or distilled_at(vectors[0].metadata) or USUAL_GUIDANCE
        settings = Settings(steps, cfg, seed, reference_steps, guidance, negative, strengths)
        bar = comfy.utils.ProgressBar(calls(order, steps, reference_steps))
        studio = Studio(model, clip, vectors[0], vectors[1:], latent, settings, bar.update)
        outcome = search(studio, order, _show)
        interruptions["LCMWeightSearch"] += outcome.found.stopped
        combined, overlaps = _sum(vectors, outcome.weights, strengths)
        made = {**combined.metadata, **figures(outcome, order, studio)}
        text = report(outcome, order)
        return io.NodeOutput(
            to_wire(replace(combined, metadata=made)),
            written(names, outcome.weights),
            text,
            _sheet(outcome, names, vae),
            overlaps,
            ui=as_ui(*_lines(outcome)),
        )


def _row(number: int) -> list[io.Input]:
    return [
        io.LoraModel.Input(f"style_{number}", tooltip=f"The vector of style {number}."),
        weight_input(
            f"strength_{number}",
            f"How strong you want style {number} to be. The node draws the reference at this "
            "strength, without the LCM-LoRA.",
        ),
        weight_input(
            f"weight_{number}",
            f"Default weight of style {number}: the search begins there, and keeps it if no "
            "other weight is better.",
            0.8,
        ),
    ]


def _sum(
    vectors: list[Vector], weights: tuple[float, ...], strengths: tuple[float, ...]
) -> tuple[Vector, torch.Tensor]:
    """The sum of the vectors at their weights, and a picture of where they support or fight each
    other. The search used each style's text encoder part at the style's strength, so it keeps that.
    """
    texts = [weights[0], *strengths]
    parts = [
        (vector, weight, text if any(map(is_text, vector.modules())) else weight)
        for vector, weight, text in zip(vectors, weights, texts, strict=True)
    ]
    at_weights = terms(parts)
    total, _, grams = summed(at_weights, [1.0] * len(at_weights))
    return total, overlap(grams, [vector.source for vector in at_weights])


def _show(point: Point, number: int) -> None:
    weights = ", ".join(f"{weight:.2f}" for weight in point.weights)
    values = {"number": number, "weights": weights, "distance": f"{point.j / 2:.3f}"}
    text = "Measurement {number}: {weights}, {distance} times the distance of the default"
    show([Line(text, values)])


def _lines(outcome: Outcome) -> list[Line]:
    """The result, as lines on the node."""
    values = {"weights": " + ".join(f"{weight:g}" for weight in outcome.weights)}
    if outcome.found.stopped and outcome.held_out is None:
        return [Line("Interrupted; the best weights so far: {weights}", values, warning=True)]
    if outcome.is_default:
        lines = [Line("No weights are better than the default, {weights}", values)]
    else:
        better = 100 * (1 - (outcome.held_out or 2) / 2)
        values["percent"] = f"{abs(better):.1f}"
        text = "{weights}: {percent} % nearer to the reference than the default"
        if better < 0:
            text = "{weights}: {percent} % farther from the reference than the default"
        lines = [Line(text, values)]
    if outcome.shown is not None:
        percent = {"percent": f"{100 * outcome.shown[1]:.0f}"}
        lines.append(Line("Style at {percent} %", percent))
    return lines


def _sheet(outcome: Outcome, names: tuple[str, ...], vae: VAE) -> torch.Tensor:
    rows = {title: _images(vae.decode(latents)) for title, latents in outcome.rows.items()}
    picture = sheet(outcome.found, names, rows)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


def _images(pixels: torch.Tensor) -> list[Image.Image]:
    """[N, H, W, 3] in 0..1, or with frames [N, F, H, W, 3]."""
    if pixels.ndim == 5:
        pixels = pixels[:, 0]
    values = (pixels.cpu().float().clamp(0, 1) * 255).round().byte().numpy()
    return [Image.fromarray(value[..., :3]) for value in values]
