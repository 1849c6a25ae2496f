"""LCMKSampler compared with ComfyUI's own nodes for the same picture, in alternating runs.

Those are KSampler (lcm, simple) on a MODEL of LoraLoader and ModelSamplingDiscrete (lcm). The small
model by default. With --full SD1.5 at its full size, 512 pixels, with random weights, and diffusers
and the bare network calls as further subjects; all of them share one set of float32 weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
import diffusers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

import nodes

from ...nodes.sampling import LCMKSampler
from ...samplers.host import patch_sampling
from ..toy import assemble
from . import networks, subjects
from .report import Report
from .timing import Turns, take_turns, timed

SIDE = 64  # of the latent with --full
OURS, HOST, DIFFUSERS, BARE = "LCMKSampler", "host KSampler", "diffusers", "network calls"
# Without a GPU, ComfyUI uses its own attention, which is slower than PyTorch's.
ALIKE = "LCMKSampler, PyTorch's attention"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=15, help="counted runs of each subject")
    parser.add_argument("--batch", type=int, default=8, help="pictures at once, without --full")
    parser.add_argument("--full", action="store_true", help="SD1.5 at full size, random weights")


def run(chosen: argparse.Namespace, checkpoint: Path) -> Report:
    report = Report("sampling")
    if chosen.full:
        full_size(report, chosen.runs)
    else:
        small(report, chosen, checkpoint)
    return report


def ours(model: ModelPatcher, steps: int, positive: list, negative: list, shape: tuple) -> None:
    latent = {"samples": torch.zeros(shape)}
    LCMKSampler.execute(model, 7, steps, 1.0, positive, negative, latent, 1.0)


def host(model: ModelPatcher, steps: int, positive: list, negative: list, shape: tuple) -> None:
    latent = {"samples": torch.zeros(shape)}
    nodes.common_ksampler(model, 7, steps, 1.0, "lcm", "simple", positive, negative, latent)


def compared(runs: int, ways: dict[str, Callable[[], object]]) -> Turns:
    return take_turns({name: partial(timed, way) for name, way in ways.items()}, runs)


def small(report: Report, chosen: argparse.Namespace, checkpoint: Path) -> None:
    toy = subjects.Toy.load(checkpoint)
    lora = comfy.utils.load_torch_file(str(assemble.lora(assemble.LCM_LORA)), safe_load=True)
    loaded = comfy.sd.load_lora_for_models(toy.base, None, lora, 1.0, 0.0)[0]
    # Both share the patched weights, so that no run waits for a model to be loaded.
    models = patch_sampling(loaded), ModelSamplingDiscrete().patch(loaded, "lcm", False)[0]
    texts = toy.encode("a photo of a fox"), toy.encode("")
    for steps in (1, 4):
        arguments = steps, *texts, (chosen.batch, *subjects.LATENT)
        ways = {
            OURS: partial(ours, models[0], *arguments),
            HOST: partial(host, models[1], *arguments),
        }
        turns = compared(chosen.runs, ways)
        for name in ways:
            report.add(f"{steps} steps", name, "wall", "s", turns.seconds(name))
        report.add(f"{steps} steps", f"{OURS} / host", "ratio", "", turns.ratios(OURS, HOST))
        report.bar(f"time ratio at {steps} steps", turns.ratio(OURS, HOST), 1.03)


def full_size(report: Report, runs: int) -> None:
    config = networks.ARCHITECTURES["SD1.5"]
    weights = networks.host_unet(config, "cpu").state_dict()
    # The loader wants the names that checkpoints have; all three networks share the tensors.
    model = comfy.sd.load_diffusion_model_state_dict(dict(weights))
    comfy.model_management.load_models_gpu([model])
    network = model.model.diffusion_model
    pipeline = diffusers_pipeline(config, dict(network.named_parameters()))
    like = next(network.parameters())  # on ComfyUI's device, in its precision
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 77, 768, generator=generator).to(like)
    x = torch.randn(1, 4, SIDE, SIDE, generator=generator).to(like)
    apart = difference(network, pipeline.unet, x, text)
    limit = 1e-3 if like.dtype == torch.float32 else 5e-2
    report.bar("largest difference of the two networks' answers", apart, limit)
    patched = patch_sampling(model)
    alike = patched.clone()
    alike.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda _, *arguments, **options: attention_pytorch(*arguments, **options)
    )
    theirs = ModelSamplingDiscrete().patch(model, "lcm", False)[0]
    for steps in (1, 4):
        timesteps = torch.tensor([[999.0], [759.0], [499.0], [259.0]])[:steps].to(x.device)
        arguments = steps, [[text, {}]], [[text, {}]], (1, 4, SIDE, SIDE)
        ways = {
            OURS: partial(ours, patched, *arguments),
            ALIKE: partial(ours, alike, *arguments),
            HOST: partial(host, theirs, *arguments),
            DIFFUSERS: partial(
                pipeline, prompt_embeds=text, num_inference_steps=steps, guidance_scale=1.0,
                output_type="latent", height=8 * SIDE, width=8 * SIDE,
            ),
            BARE: lambda timesteps=timesteps: [network(x, t, context=text) for t in timesteps],
        }  # fmt: skip
        with torch.inference_mode():
            turns = compared(runs, ways)
        case = f"SD1.5 512px, {steps} steps"
        for name in ways:
            report.add(case, name, "wall", "s", turns.seconds(name))
            report.add(case, name, "peak memory", "GB", [turns.peak(name) / 1e9])
        limits = (OURS, HOST, 1.01), (OURS, DIFFUSERS, 0.95), (ALIKE, DIFFUSERS, 0.95)
        for one, other, limit in (*limits, (OURS, BARE, 1.05)):
            report.bar(f"{case}: time, {one} / {other}", turns.ratio(one, other), limit)
        peaks = turns.peak(OURS) / turns.peak(HOST)
        report.bar(f"{case}: peak memory, ours / host", peaks, 1.005)


def diffusers_pipeline(
    config: dict, parameters: dict[str, torch.nn.Parameter]
) -> diffusers.StableDiffusionPipeline:
    """A pipeline of a network and a scheduler, from text embeddings to latents."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**networks.DIFFUSERS["SD1.5"])
    names = comfy.utils.unet_to_diffusers(config)
    unet.load_state_dict({name: parameters[names[name]] for name in unet.state_dict()}, assign=True)
    scheduler = diffusers.LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.inference_mode()
def difference(
    network: torch.nn.Module, unet: torch.nn.Module, x: torch.Tensor, text: torch.Tensor
) -> float:
    """The largest difference of the two networks' answers, relative to the largest number."""
    t = torch.tensor([499.0], device=x.device)
    one, other = network(x, t, context=text), unet(x, t, encoder_hidden_states=text).sample
    return float((one - other).abs().max() / one.abs().max())
