"""LCMKSampler against the host's own route to the same picture, in interleaved runs.

The host's route is its KSampler (lcm, simple) on LoraLoader and ModelSamplingDiscrete (lcm).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import comfy.sd
import comfy.utils
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

import nodes

from ...nodes.sampling import LCMKSampler
from ...samplers.host import patch_sampling
from ..toy import assemble
from . import subjects
from .report import Report


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=15, help="counted runs of each subject")
    parser.add_argument("--batch", type=int, default=8)


def run(chosen: argparse.Namespace, checkpoint: Path) -> Report:
    toy = subjects.Toy.load(checkpoint)
    lora = comfy.utils.load_torch_file(str(assemble.LCM_LORA), safe_load=True)
    loaded = comfy.sd.load_lora_for_models(toy.base, None, lora, 1.0, 0.0)[0]
    patched = ModelSamplingDiscrete().patch(loaded, "lcm", False)[0]
    # The same patched weights under both, so that neither run waits for a model to be loaded.
    sampled = patch_sampling(loaded)
    positive, negative = toy.encode("a photo of a bag"), toy.encode("")

    def latent() -> dict:
        return {"samples": torch.zeros(chosen.batch, 4, 8, 8)}

    def ours(steps: int) -> None:
        LCMKSampler.execute(sampled, 7, steps, 1.0, positive, negative, latent(), 1.0)

    def host(steps: int) -> None:
        nodes.common_ksampler(patched, 7, steps, 1.0, "lcm", "simple", positive, negative, latent())

    report = Report("sampling")
    for steps in (1, 4):
        ours(steps), host(steps)  # warm-up
        times: dict[str, list[float]] = {"LCMKSampler": [], "host KSampler": []}
        for index in range(chosen.runs):
            pair = [("LCMKSampler", ours), ("host KSampler", host)]
            for name, subject in pair if index % 2 else reversed(pair):
                begun = time.perf_counter()
                subject(steps)
                times[name].append(time.perf_counter() - begun)
        for name, values in times.items():
            report.add(f"{steps} steps", name, "wall", "s", values)
        ratios = [a / b for a, b in zip(*times.values(), strict=True)]
        report.add(f"{steps} steps", "LCMKSampler / host", "ratio", "", ratios)
        report.bar(f"time ratio at {steps} steps", statistics.median(ratios), 1.03)
    return report
