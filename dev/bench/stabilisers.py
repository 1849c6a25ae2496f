"""Ways to steady one to four steps, each from its source, on the shipped LCM-LoRA: which helps?

All begin with a mild guidance of the LCM-LoRA's own prediction, except eta and the last, which
costs no guidance: it moves each channel's mean and deviation to the teacher's, as measured on other
pictures. What helps by more than its deviation over the seeds is in samplers/: eta alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher

from ..toy import data
from . import subjects
from .subjects import drawn

PLAIN = "LCM-LoRA"
ETAS = (0.0, 0.3, 0.7)
GUIDED = 1.5
PHI, SHARE = 0.7, 0.995  # of the rescale; of values that the threshold leaves alone
CALIBRATED = 10  # pictures a class
Change = Callable[[dict], torch.Tensor]
"""(what the host tells a function after guidance) -> the new denoised"""


def columns(toy: subjects.Toy) -> dict[str, subjects.Sample]:
    """The LCM-LoRA plain, and with each option alone."""
    guided = {
        "rescaled": after(toy.lcm, rescaled), "thresholded": after(toy.lcm, thresholded),
        "channels kept": after(toy.lcm, channels_kept), "at the first step": first_only(toy.lcm),
    }  # fmt: skip
    return {
        PLAIN: drawn(toy.lcm),
        **{f"eta {eta:g}": drawn(toy.lcm, eta=eta) for eta in ETAS},
        f"cfg {GUIDED}": drawn(toy.lcm, GUIDED),
        **{f"cfg {GUIDED}, {name}": drawn(model, GUIDED) for name, model in guided.items()},
        "mean and deviation moved": moved(toy, drawn(toy.lcm)),
    }


def after(model: ModelPatcher, change: Change) -> ModelPatcher:
    changed = model.clone()
    changed.set_model_sampler_post_cfg_function(change)
    return changed


def rescaled(told: dict) -> torch.Tensor:
    """arXiv 2305.08891, equations 14 to 16: the deviation goes a share PHI of the way back."""
    guided, plain = told["denoised"], told["cond_denoised"]
    factor = plain.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
    return guided * (PHI * factor + 1 - PHI)


def thresholded(told: dict) -> torch.Tensor:
    """Imagen's dynamic thresholding (arXiv 2205.11487, section 2.3). Latents have no range of their
    own, so the bound is the unguided prediction's, channel by channel."""
    guided, plain = told["denoised"], told["cond_denoised"]
    mean = guided.mean((2, 3), keepdim=True)
    bound = quantile(guided - mean)
    allowed = torch.minimum(quantile(plain - plain.mean((2, 3), keepdim=True)), bound)
    return mean + (guided - mean).clamp(-bound, bound) * (allowed / bound)


def quantile(values: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, C, 1, 1]"""
    return values.abs().flatten(2).quantile(SHARE, dim=2)[..., None, None]


def channels_kept(told: dict) -> torch.Tensor:
    """The guided prediction with the unguided one's mean and deviation in each channel, as AdaIN
    (arXiv 1703.06868, equation 8) takes them over."""
    guided, plain = told["denoised"], told["cond_denoised"]
    means = [each.mean((2, 3), keepdim=True) for each in (guided, plain)]
    deviations = [each.std((2, 3), keepdim=True) for each in (guided, plain)]
    return (guided - means[0]) * (deviations[1] / deviations[0]) + means[1]


def first_only(model: ModelPatcher) -> ModelPatcher:
    """The negative prompt is asked at the first step alone: one more network call a picture."""

    def predicted(told: dict) -> list[torch.Tensor]:
        sampling = told["model"].model_sampling
        first = sampling.timestep(told["sigma"][:1]).item() >= sampling.num_timesteps - 1
        wanted = told["conds"] if first else [told["conds"][0], None]
        found = comfy.samplers.calc_cond_batch(
            told["model"], wanted, told["input"], told["sigma"], told["model_options"]
        )
        return found if first else [found[0], found[0]]

    changed = model.clone()
    changed.set_model_sampler_calc_cond_batch_function(predicted)
    return changed


def moved(toy: subjects.Toy, sample: subjects.Sample) -> subjects.Sample:
    """Each channel's mean and deviation over all pictures moved from the student's to the
    teacher's; both are measured on pictures of seeds that nobody judges."""
    prompts = [toy.encode(data.TEMPLATES[0].format(name)) for name in data.NAMES]
    empty = toy.encode("")

    @functools.cache
    def statistics(drawing: subjects.Sample, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        latents = torch.cat([
            drawing(steps, 10**6 + i, prompt, empty, CALIBRATED)
            for i, prompt in enumerate(prompts)
        ])  # fmt: skip
        return latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), keepdim=True)

    teacher = subjects.teacher(toy)

    def corrected(steps, seed, positive, negative, count):
        (goal, spread), (mean, deviation) = statistics(teacher, 0), statistics(sample, steps)
        latents = sample(steps, seed, positive, negative, count)
        return (latents - mean) * (spread / deviation) + goal

    return corrected
