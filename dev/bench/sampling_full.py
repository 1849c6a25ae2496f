"""A whole run on SD1.5 at its full size, 512 x 512, with random weights: who adds how much to the
network calls? Everybody shares one set of float32 weights, so that only the ways differ."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import comfy.sd
import comfy.utils
import diffusers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

import nodes

from ...nodes.sampling import LCMKSampler
from ...samplers.host import patch_sampling
from . import networks
from .report import Report
from .turns import Turn, take_turns

SIDE = 64  # of the latent
OURS, HOST, DIFFUSERS, BARE = "LCMKSampler", "host KSampler", "diffusers", "network calls"
# Without a GPU the host takes an attention of its own, which is slower than PyTorch's.
ALIKE = "LCMKSampler, PyTorch's attention"


def run(report: Report, runs: int) -> None:
    config = networks.FAMILIES["SD1.5"]
    weights = networks.host_unet(config, "cpu").state_dict()
    # The host takes names that its checkpoints have; the tensors are shared by all three networks.
    model = comfy.sd.load_diffusion_model_state_dict(dict(weights))
    comfy.model_management.load_models_gpu([model])
    network = model.model.diffusion_model
    pipeline = diffusers_pipeline(config, dict(network.named_parameters()))
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 77, 768, generator=generator)
    x = torch.randn(1, 4, SIDE, SIDE, generator=generator)
    difference = apart(network, pipeline.unet, x, text)
    report.bar("largest difference of the two networks' answers", difference, 1e-3)
    conditions = [[text, {}]]
    ours = patch_sampling(model)
    host = ModelSamplingDiscrete().patch(model, "lcm", False)[0]
    alike = ours.clone()
    alike.model_options["transformer_options"]["optimized_attention_override"] = (
        lambda _, *given, **options: attention_pytorch(*given, **options)
    )

    def latent() -> dict:
        return {"samples": torch.zeros(1, 4, SIDE, SIDE)}

    def subjects(steps: int) -> dict[str, Callable[[], object]]:
        timesteps = torch.tensor([[999.0], [759.0], [499.0], [259.0]])[:steps]
        return {
            OURS: lambda: LCMKSampler.execute(
                ours, 7, steps, 1.0, conditions, conditions, latent(), 1.0
            ),
            ALIKE: lambda: LCMKSampler.execute(
                alike, 7, steps, 1.0, conditions, conditions, latent(), 1.0
            ),
            HOST: lambda: nodes.common_ksampler(
                host, 7, steps, 1.0, "lcm", "simple", conditions, conditions, latent()
            ),
            DIFFUSERS: lambda: pipeline(
                prompt_embeds=text, num_inference_steps=steps, guidance_scale=1.0,
                output_type="latent", height=8 * SIDE, width=8 * SIDE,
            ),
            BARE: lambda: [network(x, t, context=text) for t in timesteps],
        }  # fmt: skip

    for steps in (1, 4):
        with torch.inference_mode():
            turns = take_turns(subjects(steps), runs)
        case = f"SD1.5 512px, {steps} steps"
        told(report, case, turns)
        for one, other, limit in (
            (OURS, HOST, 1.01), (OURS, DIFFUSERS, 0.95), (ALIKE, DIFFUSERS, 0.95),
            (OURS, BARE, 1.05),
        ):  # fmt: skip
            report.bar(f"{case}: time, {one} / {other}", turns.ratio(one, other), limit)
        peaks = [max(turns.peaks[name]) for name in (OURS, HOST)]
        report.bar(f"{case}: peak memory, ours / host", peaks[0] / peaks[1], 1.005)


def told(report: Report, case: str, turns: Turn) -> None:
    for name, seconds in turns.seconds.items():
        report.add(case, name, "wall", "s", seconds)
        report.add(case, name, "peak memory", "GB", [max(turns.peaks[name]) / 1e9])


def diffusers_pipeline(
    config: dict, parameters: dict[str, torch.nn.Parameter]
) -> diffusers.StableDiffusionPipeline:
    """Text is given and latents are asked for, so it has nothing but the network and the steps."""
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
def apart(network, unet, x: torch.Tensor, text: torch.Tensor) -> float:
    """How far the answers of the two networks are from each other, as a share of their size."""
    t = torch.tensor([499.0])
    one, other = network(x, t, context=text), unet(x, t, encoder_hidden_states=text).sample
    return float((one - other).abs().max() / one.abs().max())
