"""A real ComfyUI server with the pack in it draws the shipped workflows, as users start it and then
without the host's dynamic memory, which an NVIDIA device has and no process of a test."""

from __future__ import annotations

import json
import logging
import time

import numpy as np
from PIL import Image

from ..client import Client
from ..demo import DISTIL, FLOW, TEXT_TO_IMAGE, WORKFLOWS, fitted, reseed, toy_subject
from ..server import Server
from ..toy import assemble, stand_ins
from .kit import Kit

log = logging.getLogger("lcm_lora")
STATIC = "--disable-dynamic-vram"


class Flagged(Server):
    """A server with more flags."""

    more: tuple[str, ...] = ()

    def _known_flags(self) -> list[str]:
        return [*super()._known_flags(), *self.more]


def run(kit: Kit) -> None:
    drawn = {}
    for way, flags in {"as users start it": (), STATIC: (STATIC,)}.items():
        with kit.case(f"server, {way}", 20 if kit.cuda else 0) as go:
            if go:
                drawn[way] = pictures_of(kit, way, flags)
    if len(drawn) == 2:
        one, other = (pictures.astype(int) for pictures in drawn.values())
        name = "pictures with and without dynamic memory, largest difference of 255"
        kit.bar(name, abs(one - other).max(), 2)


def pictures_of(kit: Kit, way: str, flags: tuple[str, ...]) -> np.ndarray:
    server = Flagged(kit.host, kit.work / f"local-{len(flags)}")
    server.more = flags
    assemble.install(server.base)
    stand_ins.lay_out(server.base)
    begun = time.monotonic()
    try:
        with server:
            kit.add("server", way, "start", "s", time.monotonic() - begun)
            return prompts(kit, way, server.client())
    finally:
        lines = server.log.read_text(errors="replace").splitlines()
        log.info("%s", "\n".join(lines[-80:]))
        about_memory = [line for line in lines if "DynamicVRAM" in line or "aimdo" in line]
        kit.note(f"{way}: {about_memory[:3] or 'the log says nothing of dynamic memory'}")
        wrong = [line for line in lines if "lcm" in line.lower() and "rror" in line]
        kit.bar(f"server, {way}: errors of the pack in the log", len(wrong), 0)


def prompts(kit: Kit, way: str, client: Client) -> np.ndarray:
    """Runs every shipped workflow that draws with the demo model; -> the pictures of text to
    image."""
    subject, pictures = toy_subject(), np.zeros(0)
    paths = [p for p in sorted(WORKFLOWS.glob("*.json")) if p.stem not in (DISTIL, *FLOW)]
    paths.sort(key=lambda path: path.stem != TEXT_TO_IMAGE)
    for path in paths[:1] if kit.tiny else paths:
        prompt = fitted(json.loads(path.read_text(encoding="utf-8")), subject)
        first = path.stem == TEXT_TO_IMAGE
        for node in prompt.values():
            if first and node["class_type"] == "EmptyLatentImage":
                node["inputs"]["batch_size"] = 1 if kit.tiny else 8
        with kit.case(f"{way}: {path.stem}", 2) as go:
            if not go:
                continue
            seconds = []
            for _ in range(3 if first and not kit.tiny else 1):
                reseed(prompt)
                begun = time.monotonic()
                shown = client.run(prompt)
                seconds.append(time.monotonic() - begun)
            kit.add("server", way, path.stem, "s", seconds)
            if first:
                (files,) = client.pictures(shown).values()
                pictures = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
                flat = (pictures.std((1, 2, 3)) < 5).sum()
                kit.bar(f"server, {way}: pictures of one colour", flat, 0)
    return pictures
