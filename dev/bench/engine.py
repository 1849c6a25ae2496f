"""A step of this pack's training, on a random network and a bank of its own."""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
from safetensors.torch import load_file
from torch import nn

from ...training.adapter import Adapter
from ...training.data.bank import Bank, Row, build
from ...training.host import enter
from ...training.memory import keep_freed, recompute_blocks
from ...training.objectives.solver import Schedule
from ...training.ranks import Ranks
from ...training.spec import Spec
from ...training.state.loop import Run
from ...training.teacher import DTYPES, Teacher
from . import networks
from .step import CFG, PICTURES, SEED, Case, Clock, Step, alphas_cumprod, start_factor


def prepare(
    case: Case, change: Callable[[nn.Module], None] = lambda network: None
) -> Callable[[], Step]:
    """The function that takes a step, in a process that keeps its memory as training/run.py does.

    Reads weights and bank from the case's files if they exist, otherwise draws them. change: a last
    change of the network.
    """
    keep_freed()
    enter(case.host)
    dtype, side, device = DTYPES[case.dtype], case.side, torch.device(case.device)
    network = frozen(case, dtype)
    tensors = load_file(case.bank) if case.bank.exists() else random_bank(case)
    uncond = {"context": tensors["uncond"]}
    if "pooled" in tensors:
        uncond["pooled"] = torch.zeros_like(tensors["pooled"][0])
    uncond = {name: tensor.to(device) for name, tensor in uncond.items()}
    schedule = Schedule(alphas_cumprod().to(device), "eps")
    teacher = Teacher(
        network, schedule, case.architecture, 4, device, dtype, uncond, (), _Sizes(),
        None, None,
    )  # fmt: skip
    folder = case.folder / "bank"
    build(folder, _Rows(tensors, side), _encoder(tensors), 0.0, Ranks(), lambda *_: None)
    spec = Spec(
        host=str(case.host), checkpoint=str(case.folder), banks=str(case.folder),
        output=str(case.folder / "x.safetensors"), resolution=8 * side, batch=case.batch,
        rank=case.rank, guidance=(CFG,), seed=SEED,
        checkpointing="on" if case.recompute else "off", objective=case.objective,
        # Not read here: it says only that dmd needs no steps of lcm first.
        start_from="/x.safetensors" if case.objective == "dmd" else "", steps=9,
    )  # fmt: skip
    adapter = Adapter(network, spec.rank, spec.lora_alpha)
    for name, layer in zip(adapter.names, adapter.layers, strict=True):
        start_factor(layer.down.data, name)
    run = Run(spec, case.folder, teacher, adapter, Bank(folder), Ranks(), None, None, lambda: "")
    if case.recompute:
        recompute_blocks(network)
    change(network)
    clock = Clock(adapter.parameters(), network, device=case.device)

    def step() -> Step:
        loss, _ = run.one_step()
        run.step += 1
        return clock.step(loss)

    return step


def frozen(case: Case, dtype: torch.dtype) -> nn.Module:
    if not case.weights.exists():
        return networks.host_unet(case.config, case.device, dtype).requires_grad_(False).eval()
    network = networks.host_unet(case.config, "meta", dtype).to_empty(device=case.device)
    network.load_state_dict(load_file(case.weights))
    return network.requires_grad_(False).eval()


def random_bank(case: Case) -> dict[str, torch.Tensor]:
    """Latents and embeddings of the right shapes."""
    generator = torch.Generator().manual_seed(SEED)
    width = case.config["context_dim"]
    tensors = {
        "latents": torch.randn(PICTURES, 4, case.side, case.side, generator=generator),
        "contexts": torch.randn(PICTURES, 77, width, generator=generator),
        "uncond": torch.zeros(77, width),
    }
    if "num_classes" in case.config:
        pooled = case.config["adm_in_channels"] - 1536
        tensors["pooled"] = torch.randn(PICTURES, pooled, generator=generator)
    return tensors


class _Rows:
    """A source of the bank whose latents exist already. Its captions are numbers."""

    def __init__(self, tensors: dict[str, torch.Tensor], side: int) -> None:
        self.latents = tensors["latents"]
        self.sizes = (8 * side, 8 * side, 0, 0, 8 * side, 8 * side)

    def __len__(self) -> int:
        return PICTURES

    def captions(self) -> list[str]:
        return [str(i) for i in range(PICTURES)]

    def rows(self, numbers: list[int], *_: object) -> list[Row]:
        return [Row(self.latents[number], self.sizes) for number in numbers]


def _encoder(tensors: dict[str, torch.Tensor]) -> Callable[[str], dict[str, torch.Tensor]]:
    kinds = {"contexts": "context", "pooled": "pooled"}
    return lambda caption: {
        kind: tensors[name][int(caption)] for name, kind in kinds.items() if name in tensors
    }


class _Sizes:
    """The part of ComfyUI's model that Teacher uses for SDXL's size conditioning."""

    def __init__(self) -> None:
        from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep

        self.model = types.SimpleNamespace(embedder=Timestep(256))
