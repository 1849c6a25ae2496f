"""The pictures of the help pages: one setting of a node at several values, drawn on the toy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .sheet import Cell, Graph, Subject, Wire

Setting = Callable[[Graph, Wire], dict[str, Any]]
"""(graph, MODEL of the checkpoint) -> inputs of LCM KSampler"""
ROWS = 2


def sampled(strength: float = 1.0, **settings: Any) -> Setting:
    """The LCM-LoRA at this strength, and settings of LCM KSampler."""
    return lambda graph, base: {"model": graph.accelerated(base, strength)} | settings


def styled(
    weight: float, share: float = 0.0, blocks: str = "", strength: float = 1.0, **settings: Any
) -> Setting:
    """The sum of the LCM-LoRA and a style, after the node that the help page describes."""

    def inputs(graph: Graph, base: Wire) -> dict[str, Any]:
        lcm, style = graph.vectors()
        if share:
            style = graph.wire("LCMLoRAProtect", style=style, acceleration=lcm, share=share)
        if blocks:
            weights = {"preset": "all", "weights": blocks, "text_encoder": 1.0}
            style = graph.wire("LCMLoRABlocks", vector=style, **weights)
        both = graph.sum(lcm, 1.0, style, weight)
        return {"model": graph.applied(base, both, strength)} | settings

    return inputs


STRIPS: dict[str, dict[str, Setting]] = {
    "LCMKSampler": {f"cfg {cfg:g}": sampled(cfg=cfg) for cfg in (1.0, 1.5, 3.0, 6.0)},
    "LCMSchedule": {f"steps {steps}": sampled(steps=steps) for steps in (1, 2, 4, 8)},
    "LCMSampler": {f"eta {eta:g}": sampled(eta=eta) for eta in (0.0, 0.3, 0.7, 1.0)},
    "LCMLoRALoader": {f"strength {value:g}": sampled(value) for value in (0.0, 0.5, 1.0, 1.5)},
    "LCMLoRACombine": {f"weight_2 {weight:g}": styled(weight) for weight in (0.0, 0.4, 0.8, 1.2)},
    "LCMLoRAApply": {
        f"strength_model {value:g}": styled(0.8, strength=value) for value in (0.0, 0.5, 1.0, 1.5)
    },
    "LCMLoRAProtect": {
        f"share {share:g}": styled(1.2, share, steps=2) for share in (0.0, 0.5, 1.0)
    },
    "LCMLoRABlocks": {
        text or "whole": styled(1.0, blocks=text)
        for text in ("", "input=0", "output=0", "attention=0")
    },
}
"""Node -> title of a column -> what is drawn in it"""


def prompt(node: str, subject: Subject) -> tuple[dict[str, dict], dict[str, Cell]]:
    """Its API prompt, and the id of each node that saves -> its cell."""
    graph = Graph(subject)
    base, clip, vae = graph.checkpoint()
    latent, (texts, empty) = graph.latent(), graph.texts(clip, subject.captions[:ROWS])
    cells: dict[str, Cell] = {}
    for title, setting in STRIPS[node].items():
        inputs = {"steps": 4, "cfg": 1.0} | setting(graph, base)
        for row, text in enumerate(texts):
            inputs |= {"seed": subject.seed + row, "positive": text, "negative": empty}
            cells[graph.picture(vae, "LCMKSampler", latent=latent, **inputs)] = "", title
    return graph.nodes, cells
