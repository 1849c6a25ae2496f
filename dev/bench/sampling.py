"""LCMKSampler against the host's own route to the same picture, in interleaved runs.

The host's route is its KSampler (lcm, simple) on LoraLoader and ModelSamplingDiscrete (lcm). On the
toy; with --full at the size of SD1.5, beside diffusers and the bare network calls.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import comfy.sd
import comfy.utils
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

import nodes

from ...nodes.sampling import LCMKSampler
from ...samplers.host import patch_sampling
from ..toy import assemble
from . import sampling_full, subjects
from .report import Report
from .sampling_full import HOST, OURS
from .turns import take_turns


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=15, help="counted runs of each subject")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--full", action="store_true", help="SD1.5 at full size, random weights")


def run(chosen: argparse.Namespace, checkpoint: Path) -> Report:
    report = Report("sampling")
    if chosen.full:
        sampling_full.run(report, chosen.runs)
    else:
        toy_runs(report, chosen, checkpoint)
    return report


def toy_runs(report: Report, chosen: argparse.Namespace, checkpoint: Path) -> None:
    toy = subjects.Toy.load(checkpoint)
    lora = comfy.utils.load_torch_file(str(assemble.LCM_LORA), safe_load=True)
    loaded = comfy.sd.load_lora_for_models(toy.base, None, lora, 1.0, 0.0)[0]
    patched = ModelSamplingDiscrete().patch(loaded, "lcm", False)[0]
    # The same patched weights under both, so that neither run waits for a model to be loaded.
    sampled = patch_sampling(loaded)
    positive, negative = toy.encode("a photo of a bag"), toy.encode("")

    def latent() -> dict:
        return {"samples": torch.zeros(chosen.batch, 4, 8, 8)}

    def subjects_of(steps: int) -> dict[str, Callable[[], object]]:
        return {
            OURS: lambda: LCMKSampler.execute(
                sampled, 7, steps, 1.0, positive, negative, latent(), 1.0
            ),
            HOST: lambda: nodes.common_ksampler(
                patched, 7, steps, 1.0, "lcm", "simple", positive, negative, latent()
            ),
        }

    for steps in (1, 4):
        turns = take_turns(subjects_of(steps), chosen.runs)
        for name, seconds in turns.seconds.items():
            report.add(f"{steps} steps", name, "wall", "s", seconds)
        report.add(f"{steps} steps", f"{OURS} / host", "ratio", "", turns.ratios(OURS, HOST))
        report.bar(f"time ratio at {steps} steps", turns.ratio(OURS, HOST), 1.03)
