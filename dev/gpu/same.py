"""Is it the same picture: alone or in a batch, twice, and on the CPU?"""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from safetensors.torch import load_file, save_file

from ..bench import subjects
from ..environment import ROOT
from ..toy import assemble
from .kit import Kit
from .sampling import Case


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((one - other).abs().max() / one.abs().max())


def drawing(toy: subjects.Toy):
    """drawn(numbers, steps) -> the latents of the pictures with these numbers in their batch."""
    from ...nodes.sampling import LCMKSampler
    from ...samplers.host import patch_sampling

    model, texts = patch_sampling(toy.base), (toy.encode("a photo of a fox"), toy.encode(""))

    def drawn(numbers: list[int], steps: int = 4) -> torch.Tensor:
        latent = {"samples": torch.zeros(len(numbers), *subjects.LATENT), "batch_index": numbers}
        done = LCMKSampler.execute(model, 5, steps, 1.0, *texts, latent, 1.0)
        return done.result[0]["samples"].float().cpu()

    return drawn


def run(kit: Kit) -> None:
    numbers = [0, 1, 2, 3]
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if kit.cuda else (torch.float32,)
    kept: dict[torch.dtype, torch.Tensor] = {}
    on_cpu = on_the_cpu(kit) if kit.cuda else None
    for dtype in dtypes:
        with kit.case(f"toy, {dtype}", 4) as go:
            if not go:
                continue
            toy = subjects.Toy.load(assemble.checkpoint(), dtype)
            drawn, name = drawing(toy), f"toy {str(dtype)[6:]}"
            kept[dtype] = batch = drawn(numbers)
            save_file({"latents": batch.contiguous()}, kit.work / f"{str(dtype)[6:]}.safetensors")
            kit.bar(f"{name}: a batch drawn twice", apart(batch, drawn(numbers)), 0)
            for steps in (1, 4):
                alone = torch.cat([drawn([n], steps) for n in numbers])
                kit.add(f"{name}, {steps} steps", "alone - in a batch", "largest difference",
                        "share", apart(drawn(numbers, steps), alone))  # fmt: skip
            pixels = toy.decode(batch) - toy.decode(alone)
            kit.add(f"{name}, 4 steps", "alone - in a batch", "largest pixel", "of 255",
                    float(pixels.abs().max()) * 255)  # fmt: skip
    dtype = torch.float16 if kit.cuda else torch.float32
    with kit.case("SD1.5", 5) as go, torch.inference_mode():
        if go:
            case = Case(kit, "SD1.5", dtype)

            def full(numbers: list[int]) -> torch.Tensor:
                return case.sampled(4, case.latent(len(numbers)) | {"batch_index": numbers}).cpu()

            batch, alone = full(numbers), torch.cat([full([n]) for n in numbers])
            name = f"SD1.5 random, {str(dtype)[6:]}, 4 steps"
            kit.add(name, "alone - in a batch", "largest difference", "share", apart(batch, alone))
            kit.bar(f"{name}: a batch drawn twice", apart(batch, full(numbers)), 0)
    if on_cpu:
        with kit.case("the toy on the CPU"):
            on_cpu.wait(max(1, kit.left() - 1))
            cpu = load_file(kit.work / "same" / "float32.safetensors")["latents"]
            for dtype, latents in kept.items():
                kit.add("toy, 4 steps", f"CPU float32 - GPU {str(dtype)[6:]}",
                        "largest difference", "share", apart(cpu, latents))  # fmt: skip


def on_the_cpu(kit: Kit) -> subprocess.Popen:
    """This part in a process that sees no GPU."""
    command = [
        sys.executable, str(ROOT / "dev"), "gpu", "--part", "same", "--tiny", "--budget", "60",
        "--work", str(kit.work), "--out", str(kit.work),
    ]  # fmt: skip
    return subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
