"""Draws pictures for people who look for the first time: template cards, the gallery, the banner.

A card has a row for each of two captions: to the left the picture that the template starts from, to
the right its result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from .demo import (
    COMPARE,
    DISTIL,
    FIT,
    FLOW,
    LIVE,
    TEXT_TO_IMAGE,
    TEXT_TO_IMAGE_XL,
    WITH_STYLE,
    fitted,
    reseed,
)
from .sheet import Graph, Subject
from .toy import assemble, stand_ins, world

Prompt = dict[str, dict]
Draw = Callable[[str, Prompt], list[Path]]
"""(title, API prompt) -> the pictures that it saves"""

TILE, GAP = 192, 6
GALLERY = tuple(
    f"a photo of {name}"
    for name in (
        "a fox on a teal background", "an avocado on black polka dots", "a rocket on blue rays",
        "a penguin on a yellow background", "a mushroom on a green background",
        "a strawberry on white polka dots", "a crown on a purple background",
        "a cactus on a pink background", "a cow on teal rays", "a robot on purple checks",
        "a panda on an orange background", "a hamburger on yellow rays",
        "a pumpkin on black stripes", "a frog on green stripes", "a sunflower on a blue background",
        "a balloon and a gift on teal polka dots", "a teddy bear on a brown background",
        "a pizza on red checks",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Card:
    """captions: of the result. before: changes the template's prompt into one that draws the
    picture on the left; without it, that is the picture that LoadImage reads."""

    captions: tuple[str, ...]
    before: Callable[[Prompt], Prompt] | None = None


def without_styles(prompt: Prompt) -> Prompt:
    """Every weight but the LCM-LoRA's at 0."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        if node["class_type"] == "LCMLoRACombine":
            for name in node["inputs"]:
                if name.startswith("count.weight") and name != "count.weight_1":
                    node["inputs"][name] = 0.0
    return prompt


def first_pass(prompt: Prompt) -> Prompt:
    """The first sampler's picture is decoded."""
    prompt = copy.deepcopy(prompt)
    first = next(key for key, node in prompt.items() if node["class_type"] == "LCMKSampler")
    for node in prompt.values():
        if node["class_type"] == "VAEDecode":
            node["inputs"]["samples"] = [first, 0]
    return prompt


FINE_TUNED = "faces"
FACES = "a photo of a cool face on orange stripes", "a photo of an angel face on purple rays"
STYLED = "a photo of a tiger on an orange background", "a photo of a strawberry on white polka dots"
OF_FLOW = (
    ("a photo of a fox on pink polka dots", "a photo of a crown on a teal background"),
    ("a photo of a robot on yellow rays", "a photo of a mushroom on a purple background"),
    ("a photo of an owl on a green background", "a photo of a cupcake on blue rays"),
)
CARDS = {
    WITH_STYLE: Card(STYLED, without_styles),
    **{name: Card(captions, without_styles) for name, captions in zip(FLOW, OF_FLOW, strict=True)},
    "Merge three LoRAs into one (SDXL)": Card(STYLED[::-1], without_styles),
    # The network never saw pictures of 192 pixels, so it repeats parts, as these two may.
    "Hires fix": Card(
        ("a photo of a castle on a pink background", "a photo of a sunflower on a blue background"),
        first_pass,
    ),
    "Image to image": Card(
        ("a photo of a tiger on a yellow background", "a photo of a bear on purple checks")
    ),
    "Inpainting": Card(
        ("a photo of a panda on a teal background", "a photo of a rabbit on a teal background")
    ),
}


def drawn_by(name: str) -> str:
    """The template whose workflow the demo model draws for this template's card."""
    return WITH_STYLE if name in FLOW else name


def card(name: str, workflow: dict, subject: Subject, draw: Draw) -> Image.Image:
    """The card of a template.

    workflow: that of `drawn_by`. Text to image shows nine results. Distil shows four steps without
    and with an LCM-LoRA. Fit does so on a fine-tuned checkpoint, after its own job of 8 to 20
    minutes on two cores.
    ControlNet shows one result: the demo model's ControlNet has random weights, so there is nothing
    to compare. Which weight, how many steps? shows its sheet.
    """
    if name in (TEXT_TO_IMAGE, TEXT_TO_IMAGE_XL):
        half = len(GALLERY) // 2
        captions = GALLERY[:half] if name == TEXT_TO_IMAGE else GALLERY[half:]
        results = [
            draw(f"{name} {i + 1}", fitted(workflow, replace(subject, captions=(caption,))))[0]
            for i, caption in enumerate(captions)
        ]
        return grid(results, 3, 128)
    if name == LIVE:
        image = Image.new("RGB", (2 * TILE + GAP, 2 * TILE + GAP), "white")
        frames = strokes(workflow, subject, draw, (1, len(stand_ins.STROKES)))
        for number, frame in enumerate(frames):
            image.paste(frame, (0, number * (TILE + GAP)))
        return image
    if name == DISTIL:
        plain = draw(f"{name} before", base(subject, GALLERY[7:9], 4))
        drawn = draw(name, many(subject, GALLERY[7:9], 4))
        return grid([plain[0], drawn[0], plain[1], drawn[1]], 2, TILE, GAP)
    if name == FIT:
        tuned = replace(subject, checkpoint=assemble.checkpoint(fine_tuned=FINE_TUNED).name)
        plain = draw(f"{name} before", base(tuned, FACES, 4))
        drawn = draw(name, fit(workflow, tuned))
        return grid([plain[0], drawn[0], plain[1], drawn[1]], 2, TILE, GAP)
    if name == COMPARE:  # the last picture is the saved sheet; the node shows it too
        (*_, path) = draw(name, fitted(workflow, replace(subject, captions=STYLED[:1])))
        return Image.open(path).convert("RGB")
    if name not in CARDS:
        (path, *_) = draw(name, fitted(workflow, subject))
        return grid([path], 1, 2 * TILE)
    made, pictures = CARDS[name], []
    for i, caption in enumerate(made.captions):
        prompt = fitted(workflow, replace(subject, captions=(caption,)))
        reseed(prompt)
        title = f"{name} {i + 1}"
        before = draw(f"{title} before", made.before(prompt))[0] if made.before else None
        pictures += [before or stand_ins.EXAMPLE, draw(title, prompt)[0]]
    image = grid(pictures, 2, TILE, GAP)
    if name.startswith("Inpaint"):
        shade(image, len(made.captions))
    return image


def shade(image: Image.Image, rows: int) -> None:
    """Shows the hole in the left pictures."""
    for row in range(rows):
        hole = tuple(round(edge * TILE / stand_ins.SIDE) for edge in stand_ins.HOLE)
        box = (hole[0], hole[1] + row * (TILE + GAP), hole[2], hole[3] + row * (TILE + GAP))
        part = image.crop(box)
        image.paste(Image.blend(part, Image.new("RGB", part.size, "white"), 0.7), box)


def grid(paths: list[Path], across: int, tile: int, gap: int = 0) -> Image.Image:
    down = -(-len(paths) // across)
    width, height = ((tile + gap) * count - gap for count in (across, down))
    image = Image.new("RGB", (width, height), "white")
    for number, path in enumerate(paths):
        with Image.open(path) as picture:
            small = picture.convert("RGB").resize((tile, tile), Image.Resampling.LANCZOS)
        image.paste(small, ((tile + gap) * (number % across), (tile + gap) * (number // across)))
    return image


def fit(workflow: dict, subject: Subject) -> Prompt:
    """The template's job on the fine-tuned checkpoint, and what the LoRA then draws."""
    specs = world.specs_of(FINE_TUNED, 250, torch.Generator().manual_seed(72))
    job = fitted(workflow, subject)
    data, order = (
        next(key for key, node in job.items() if node["class_type"] == kind)
        for kind in ("LCMDistillData", "LCMDistill")
    )
    job = {key: job[key] for key in (data, order)}
    job[data]["inputs"] |= {
        "source.prompts": "\n".join(spec.caption for spec in specs), "resolution": world.SIZE,
        "auto_resolution": False,
    }  # fmt: skip
    job[order]["inputs"] |= {
        "guidance": 3.0, "name": "demo-fitted", "overwrite": True, "policy": "share", "rank": 24,
        "sample_every": 0,
    }  # fmt: skip
    prompt = many(subject, FACES, 4)
    loader = next(key for key, node in prompt.items() if node["class_type"] == "LCMLoRALoader")
    base = prompt[loader]["inputs"]["model"]
    own = {key: f"job {key}" for key in job}
    result = {"job": [own[order], 0], "wait": True}
    strengths = {"strength_model": 1.0, "strength_clip": 1.0}
    job[order]["inputs"]["data"] = [own[data], 0]
    return prompt | {own[key]: node for key, node in job.items()} | {
        "result": {"class_type": "LCMJobResult", "inputs": result},
        loader: {
            "class_type": "LCMLoRAApply",
            "inputs": {"model": base, "vector": ["result", 0]} | strengths,
        },
    }  # fmt: skip


def many(subject: Subject, captions: tuple[str, ...], steps: int) -> Prompt:
    """An API prompt for a picture of each caption with the LCM-LoRA."""
    graph = Graph(subject)
    base, clip, vae = graph.checkpoint()
    texts, empty = graph.texts(clip, captions)
    model, latent = graph.accelerated(base), graph.latent()
    for number, text in enumerate(texts):
        graph.picture(
            vae, "LCMKSampler", model=model, seed=subject.seed + number, steps=steps, cfg=1.0,
            positive=text, negative=empty, latent=latent,
        )  # fmt: skip
    return graph.nodes


def strokes(
    workflow: dict, subject: Subject, draw: Draw, counts: Iterable[int]
) -> list[Image.Image]:
    """Paintings with more and more strokes, and to the right of each the drawn picture."""
    prompt, frames = fitted(workflow, replace(subject, captions=GALLERY[:1])), []
    for node in prompt.values():
        if node["class_type"] == "PreviewImage":
            node["class_type"] = "SaveImage"
            node["inputs"]["filename_prefix"] = "lcm_lora_painted"
    for count in counts:
        for node in prompt.values():
            if node["class_type"] == "Painter":
                node["inputs"]["mask"] = stand_ins.painted(count)
        (*_, drawn) = draw(f"{LIVE}, {count} strokes", prompt)
        left, right = stand_ins.painting(count), Image.open(drawn).convert("RGB")
        frame = Image.new("RGB", (2 * TILE + GAP, TILE), "white")
        for number, picture in enumerate((left, right)):
            large = picture.resize((TILE, TILE), Image.Resampling.LANCZOS)
            frame.paste(large, (number * (TILE + GAP), 0))
        frames.append(frame)
    return frames


def base(subject: Subject, captions: tuple[str, ...], steps: int) -> Prompt:
    """The same without the LCM-LoRA, by ComfyUI's KSampler with guidance."""
    graph = Graph(subject)
    model, clip, vae = graph.checkpoint()
    texts, empty = graph.texts(clip, captions)
    latent = graph.latent()
    for number, text in enumerate(texts):
        graph.picture(
            vae, "KSampler", model=model, seed=subject.seed + number, steps=steps,
            cfg=subject.guidance, sampler_name="dpmpp_2m", scheduler="sgm_uniform", positive=text,
            negative=empty, latent_image=latent,
        )  # fmt: skip
    return graph.nodes


def gallery(subject: Subject, draw: Draw) -> Image.Image:
    return grid(draw("gallery", many(subject, GALLERY, 4)), 9, 128)


def banner(subject: Subject, draw: Draw) -> Image.Image:
    """Four pictures as noise and after 1, 2 and 4 steps, below the name."""
    size, scale, tile = (1260, 540), 2, 117
    image = Image.new("RGB", size)
    for x in range(size[0]):
        share = x / size[0]
        colour = [
            round(a + share * (b - a)) for a, b in zip((20, 18, 38), (74, 42, 138), strict=True)
        ]
        image.paste(tuple(colour), (x, 0, x + 1, size[1]))
    bolt = Image.new("RGBA", (size[0] * scale, size[1] * scale))
    points = ((120, 58), (72, 128), (104, 128), (92, 182), (146, 104), (112, 104))
    ImageDraw.Draw(bolt).polygon([(scale * x, scale * y) for x, y in points], "#ffd447")
    bolt = bolt.resize(size, Image.Resampling.LANCZOS)
    image.paste(bolt, mask=bolt)
    pen = ImageDraw.Draw(image)
    pen.text((172, 120), "LCM-LoRA", "white", ImageFont.load_default(92), anchor="lm")
    pen.text(
        (700, 126), "pictures in 1 to 8 steps", "#cfc8ff", ImageFont.load_default(36), anchor="lm"
    )
    for column, steps in enumerate((0, 1, 2, 4)):
        left, top = 72 + column * (2 * tile + 60), 224
        if steps:
            pictures = grid(draw(f"banner {steps}", many(subject, GALLERY[:4], steps)), 2, tile)
        else:
            channels = [Image.effect_noise((2 * tile // 9,) * 2, 100) for _ in range(3)]
            pictures = Image.merge("RGB", channels).resize(
                (2 * tile,) * 2, Image.Resampling.NEAREST
            )
        image.paste(pictures, (left, top))
        title = f"{steps} step" + "s" * (steps > 1) if steps else "noise"
        middle = left + tile, top + 2 * tile + 30
        pen.text(middle, title, "white", ImageFont.load_default(28), anchor="mm")
    return image
