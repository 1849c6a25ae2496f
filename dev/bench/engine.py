"""The engine's own step, as training/run.py takes it, on a random network and a bank of its own."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ...training.adapter import Adapter
from ...training.data.bank import Bank, Row, build
from ...training.memory import recompute_blocks
from ...training.objectives.solver import Schedule
from ...training.ranks import Ranks
from ...training.spec import Spec
from ...training.state.loop import Run
from ...training.teacher import DTYPES, Teacher, enter
from . import networks
from .given import CFG, PICTURES, SEED, Clock, acp, start_factor


def start(settings: dict) -> Callable[[], tuple[float, int, float]]:
    """-> a function that takes a step and tells its loss, network calls, and seconds in them."""
    enter(Path(settings["host"]))
    config, side, folder = settings["config"], settings["side"], Path(settings["folder"])
    network = frozen(config, DTYPES[settings["dtype"]], settings["weights"])
    made = load_file(settings["bank"]) if settings["bank"] else random_bank(side, config)
    uncond = {"context": made["uncond"]}
    if "pooled" in made:
        uncond["pooled"] = torch.zeros_like(made["pooled"][0])
    teacher = Teacher(
        network, Schedule(acp(), "eps"), settings["family"], 4, torch.device("cpu"),
        DTYPES[settings["dtype"]], uncond, (), _Sizes(), None, None,
    )  # fmt: skip
    build(folder / "bank", _Rows(made, side), _texts(made), 0.0, Ranks(), lambda *_: None)
    spec = Spec(
        host=settings["host"], checkpoint=str(folder), output=str(folder / "x.safetensors"),
        banks=str(folder), resolution=8 * side, batch=settings["batch"], rank=settings["rank"],
        guidance=(CFG,), seed=SEED,
        checkpointing="on" if settings["recompute"] else "off",
    )  # fmt: skip
    adapter = Adapter(network, spec.rank, spec.lora_alpha)
    for name, layer in zip(adapter.names, adapter.layers, strict=True):
        start_factor(layer.down.data, name)
    run = Run(
        spec, folder, teacher, adapter, Bank(folder / "bank"), Ranks(), None, None, lambda: ""
    )
    if settings["recompute"]:
        recompute_blocks(network)
    clock = Clock(network)

    def step():
        loss, _ = run.one_step()
        run.step += 1
        return loss, *clock.taken()

    return step


def frozen(config: dict, dtype: torch.dtype, weights: str) -> nn.Module:
    """The host's network with the weights of a file, or with some of its own."""
    if not weights:
        return networks.host_unet(config, "cpu", dtype).requires_grad_(False).eval()
    network = networks.host_unet(config, "meta", dtype).to_empty(device="cpu")
    network.load_state_dict(load_file(weights))
    return network.requires_grad_(False).eval()


class _Rows:
    """A source of the bank: latents that are there already."""

    def __init__(self, made: dict[str, torch.Tensor], side: int):
        self.latents, self.sizes = made["latents"], (8 * side, 8 * side, 0, 0, 8 * side, 8 * side)

    def __len__(self) -> int:
        return PICTURES

    def captions(self) -> list[str]:
        return [str(i) for i in range(PICTURES)]

    def rows(self, numbers: list[int], *_: object) -> list[Row]:
        return [Row(self.latents[number], self.sizes) for number in numbers]


def _texts(made: dict[str, torch.Tensor]) -> Callable[[str], dict[str, torch.Tensor]]:
    def text(caption: str) -> dict[str, torch.Tensor]:
        told = {"context": made["contexts"][int(caption)]}
        return told | ({"pooled": made["pooled"][int(caption)]} if "pooled" in made else {})

    return text


class _Sizes:
    """What Teacher asks of the host's model for SDXL's size conditioning."""

    def __init__(self):
        from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep

        self.model = types.SimpleNamespace(embedder=Timestep(256))


def random_bank(side: int, config: dict) -> dict:
    """Latents and embeddings of the right shapes, where only time and memory are asked for."""
    generator = torch.Generator().manual_seed(SEED)
    found = {
        "latents": torch.randn(PICTURES, 4, side, side, generator=generator),
        "contexts": torch.randn(PICTURES, 77, config["context_dim"], generator=generator),
        "uncond": torch.zeros(77, config["context_dim"]),
    }
    if "num_classes" in config:
        pooled = config["adm_in_channels"] - 1536
        found["pooled"] = torch.randn(PICTURES, pooled, generator=generator)
    return found
