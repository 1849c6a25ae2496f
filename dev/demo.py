"""`python3 dev demo`: draws two shipped workflows and a contact sheet with a real ComfyUI."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import time
from itertools import cycle
from pathlib import Path

from . import sheet
from .client import Client
from .server import Server, install
from .workflow import to_api

log = logging.getLogger("lcm_lora")
WORKFLOWS = Path(__file__).parents[1] / "workflows"
# A file's name is the title of its card. Those with a number come first in a sorted list.
TEXT_TO_IMAGE = "1 Text to image (SD1.5)"
TEXT_TO_IMAGE_XL = "2 Text to image (SDXL)"
WITH_STYLE = "3 Text to image with a style (SDXL)"
# The demo model is no flow model, so it draws none of these.
FLOW = (
    "4 Text to image with a style (Qwen-Image)", "5 Text to image with a style (Z-Image)",
    "6 Text to image with a style (Flux)",
)  # fmt: skip
DISTIL = "Distil an LCM-LoRA"
FIT = "Fit an LCM-LoRA to a checkpoint"
LIVE = "Live painting"
COMPARE = "Which weight, how many steps"


class Bar:
    """A progress bar on a terminal; elsewhere one line when it is done."""

    def __init__(self, title: str) -> None:
        self.title, self.begun, self.terminal = title, time.monotonic(), sys.stderr.isatty()

    def show(self, done: float, total: int) -> None:
        if self.terminal:
            share = done / total
            line = f"\r{self.title:<32} [{'#' * int(30 * share):<30}] {100 * share:3.0f} % "
            sys.stderr.write(line)
            sys.stderr.flush()

    def close(self) -> float:
        """Ends the line; -> seconds since the bar was made."""
        seconds = time.monotonic() - self.begun
        start = "\r\033[K" if self.terminal else ""
        sys.stderr.write(f"{start}{self.title}: {seconds:.1f} s\n")
        return seconds


def fitted(workflow: dict, subject: sheet.Subject) -> dict:
    """A shipped workflow as an API prompt, with the subject's files, caption and size put in."""
    prompt = to_api(workflow)
    styles = cycle([subject.style_lora, subject.second_style or subject.style_lora])
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] == "CheckpointLoaderSimple":
            inputs["ckpt_name"] = subject.checkpoint
        elif node["class_type"] == "LCMDistill":
            inputs["checkpoint"] = subject.checkpoint
            if inputs.get("start_from", "none") != "none":
                inputs["start_from"] = subject.lcm_lora
        elif "lora_name" in inputs:
            # All workflows name the official LCM-LoRA like this; any other LoRA is a style, except
            # that of a stack, whose styles are in its rows.
            stack = node["class_type"] == "LCMLoRAStack"
            official = stack or inputs["lora_name"].startswith("lcm-lora")
            inputs["lora_name"] = subject.lcm_lora if official else next(styles)
            inputs |= {name: next(styles) for name in inputs if name.startswith("count.lora_")}
        elif node["class_type"] == "CLIPTextEncode" and inputs["text"]:
            inputs["text"] = subject.captions[0]
        elif node["class_type"] == "LCMWeightSearch" and len(subject.captions) > 1:
            inputs["prompts"] = "\n".join(subject.captions)
        elif "width" in inputs:
            inputs["width"] = inputs["height"] = subject.size
    return prompt


def reseed(prompt: dict) -> None:
    """Changes the seeds, so that a second run of the prompt draws other pictures."""
    for node in prompt.values():
        if "seed" in node["inputs"]:
            node["inputs"]["seed"] += 1


def draw(client: Client, title: str, prompt: dict) -> tuple[dict, float]:
    """Runs a prompt with a progress bar; -> (node -> picture files, seconds)."""
    bar = Bar(title)
    shown = client.run(prompt, on_progress=bar.show)
    return client.pictures(shown), bar.close()


def toy_subject() -> sheet.Subject:
    """The demo model's file names, four captions that it knows, and its guidance."""
    from .toy import assemble, command, world

    names = (
        "a fox on a teal background", "a cupcake on pink polka dots", "a rocket on blue rays",
        "a panda on an orange background",
    )  # fmt: skip
    captions = tuple(f"a photo of {name}" for name in names)
    return sheet.Subject(
        assemble.checkpoint().name, assemble.LCM_LORA, assemble.STICKER_LORA, captions,
        command.GUIDANCE, size=world.SIZE, second_style=assemble.BLUEPRINT_LORA,
    )  # fmt: skip


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 dev demo", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a real checkpoint instead of the toy")
    parser.add_argument("--lcm-lora", type=Path, help="the LCM-LoRA of the checkpoint's family")
    parser.add_argument("--style-lora", type=Path)
    parser.add_argument("--prompt", default="a lighthouse on a cliff, oil painting, evening light")
    parser.add_argument("--size", type=int, default=512, help="pixels a side (1024 for SDXL)")
    chosen = parser.parse_args(arguments)
    if bool(chosen.checkpoint) != bool(chosen.lcm_lora):
        parser.error("--checkpoint and --lcm-lora go together: the demo draws with both")
    if chosen.style_lora and not chosen.checkpoint:
        parser.error("--style-lora goes with --checkpoint and --lcm-lora")
    for path in (chosen.checkpoint, chosen.lcm_lora, chosen.style_lora):
        if path and not path.is_file():
            parser.error(f"there is no file {path}")
    if chosen.style_lora and chosen.style_lora.name == chosen.lcm_lora.name:
        parser.error(
            f"both LoRAs are called {chosen.lcm_lora.name}, but ComfyUI needs different names: "
            "rename one"
        )
    return chosen


def draw_workflow(client: Client, name: str, subject: sheet.Subject, out: Path) -> None:
    """Runs a shipped workflow twice, and keeps the second run's picture and time."""
    workflow = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    title = name.replace("_", " ")
    prompt = fitted(workflow, subject)
    draw(client, f"{title} (models load)", prompt)
    reseed(prompt)
    pictures, seconds = draw(client, title, prompt)
    paths = [path for saved in pictures.values() for path in saved]
    for number, path in enumerate(paths):
        shutil.copyfile(path, out / f"{title} {number + 1}.png")
    log.info("%s: %.2f s per picture", title, seconds / len(paths))


def main(arguments: list[str], host: Path, local: Path) -> int:
    chosen = options(arguments)
    out = local / "demo"
    out.mkdir(parents=True, exist_ok=True)
    if chosen.checkpoint:
        files = chosen.checkpoint, chosen.lcm_lora, chosen.style_lora
        names = [path.name if path else None for path in files]
        subject = sheet.Subject(*names, (chosen.prompt,), guidance=7.5, size=chosen.size)
    else:
        files, subject = (), toy_subject()
    server = Server(host, local)
    if subject.second_style:
        from .toy import assemble

        assemble.install(server.base)
    for path, folder in zip(files, ("checkpoints", "loras", "loras"), strict=False):
        if path:
            install(path, server.base / "models" / folder)
    with server:
        client = server.client()
        draw_workflow(client, TEXT_TO_IMAGE, subject, out)
        if subject.style_lora:
            draw_workflow(client, WITH_STYLE, subject, out)
        prompt, cells = sheet.prompt(subject)
        pictures, _ = draw(client, f"Contact sheet of {len(cells)} pictures", prompt)
    files = sheet.gathered(cells, pictures)
    across = 2 if len(subject.captions) > 1 else 1
    path = out / "contact sheet.png"
    scratch = out / f"{os.getpid()}.tmp.png"
    sheet.compose(files, 256 // across, across, gap=12).save(scratch)
    os.replace(scratch, path)
    log.info("The pictures are in %s", out)
    return 0
