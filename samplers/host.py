"""The samplers in ComfyUI: the noise schedule of a MODEL, SIGMAS, a SAMPLER, and a full run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy import model_sampling as ms
from comfy.model_patcher import ModelPatcher
from tqdm.auto import tqdm

from .families import DEFAULT, DEFAULT_FLOW, FAMILIES, ORIGIN_STEPS, Family
from .guidance_embedding import refuse_guidance_embedding
from .lcm import kept_noise, lcm
from .noise import picture_noise, picture_numbers
from .process.host import (
    UNDER,
    earlier,
    families_of,
    flow_sampling,
    full_table,
    is_flow,
    native,
    sampling_class,
    set_family,
    shares,
    shifted,
)
from .report import Acceleration, Applied, Line, ran, warnings
from .timesteps import parse, parse_sigmas, refuse_ascent, times, timesteps

APPLIED = "lcm_lora"  # the MODEL's attachment that holds an Applied; clones keep it
SMALLEST = 1e-4  # below the sigma of any timestep
HINTS = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # keys of some empty latents


def file_of(model: ModelPatcher) -> Path | None:
    """The file that a MODEL was loaded from, if the MODEL knows it."""
    # A MODEL keeps the loader that can load it again, and its arguments. The first argument of
    # ComfyUI's loaders is the file.
    _, arguments, *_ = model.cached_patcher_init or (None, ())
    return Path(arguments[0]) if arguments and isinstance(arguments[0], str) else None


def own_sampling(model: ModelPatcher) -> Any:
    """A MODEL's sampling object before this pack changed it: with all timesteps, or its own shift.

    Raises:
        ValueError: the model has no discrete schedule, or ComfyUI dropped its guidance embedding.
    """
    if (file := file_of(model)) is not None:
        refuse_guidance_embedding(file)  # ComfyUI drops that weight silently
    own = model.get_model_object("model_sampling")
    if is_flow(own):
        return own.__dict__.get(UNDER, own)
    sampling_class(own, type(model.model).__name__)
    if len(full_table(own)) != own.num_timesteps:
        # ComfyUI's own lcm patch keeps 50 sigmas and forgets v-prediction. Look below it.
        zsnr, bare = own.zsnr, model.clone()
        bare.object_patches.pop("model_sampling")
        own = bare.get_model_object("model_sampling")
        sampling_class(own, type(model.model).__name__)
        if zsnr and not own.zsnr:  # the patch sets zsnr; copied, because the model owns `own`
            own = copy.deepcopy(own)
            own.zsnr = True
            own.set_sigmas(ms.rescale_zero_terminal_snr_sigmas(own.sigmas))
    return own


def patch_sampling(model: ModelPatcher, family: str = DEFAULT) -> ModelPatcher:
    """A clone of MODEL, with the same weights, that samples as `family` was distilled.

    Raises:
        ValueError: the family is unknown or not of this kind of model, or `own_sampling` raises it.
    """
    if family not in FAMILIES:
        raise ValueError(f"Unknown family {family!r}, expected one of: {', '.join(FAMILIES)}.")
    return _with_family(model, FAMILIES[family])


def _with_family(model: ModelPatcher, family: Family) -> ModelPatcher:
    own, name = own_sampling(model), type(model.model).__name__
    if family.name not in families_of(own):
        raise ValueError(
            f"The family {family.name!r} is for {'flow' if family.flow else 'Stable Diffusion'} "
            f"models, and this MODEL is {_kind(own, name)}. Choose one of "
            f"{', '.join(families_of(own))}, or use the LoRA with the model it was made for."
        )
    patched = model.clone()
    if is_flow(own):
        sampling = flow_sampling(own, family)
    else:
        sampling = sampling_class(own, name)(model.model.model_config, own, family)
    patched.add_object_patch("model_sampling", sampling)
    return patched


def _kind(sampling: Any, model_name: str) -> str:
    return f"a {'flow' if is_flow(sampling) else 'Stable Diffusion'} model ({model_name})"


def offered(model: ModelPatcher) -> tuple[list[str], str, str]:
    """(the families that a MODEL can be sampled as, the default family of a LoRA that names none,
    what the MODEL is, for messages)."""
    own = own_sampling(model)
    default = DEFAULT_FLOW if is_flow(own) else DEFAULT
    return families_of(own), default, _kind(own, type(model.model).__name__)


def applied_to(model: ModelPatcher) -> Applied:
    """What this pack's nodes added to a MODEL."""
    return model.get_attachment(APPLIED) or Applied()


def record(before: ModelPatcher, after: ModelPatcher, acceleration: Acceleration | None) -> None:
    """Records on `after`, a new clone of `before`, that a LoRA was added to it.

    acceleration: the LoRA, or None if it is a style.
    """
    earlier_loras = applied_to(before)
    new = () if acceleration is None else (acceleration,)
    patches = earlier_loras.patches + _patches(after) - _patches(before)
    after.set_attachments(APPLIED, Applied((*earlier_loras.accelerations, *new), patches))


def _patches(model: ModelPatcher) -> int:
    return sum(map(len, model.patches.values()))


def family_for(model: ModelPatcher) -> Family:
    """The family that a MODEL's sampling is set for; if none is set, its accelerations' family.

    Raises:
        ValueError: the sampling is not set and the accelerations have no single family.
    """
    sampling = model.get_model_object("model_sampling")
    if family := set_family(sampling):
        return family
    family = FAMILIES[applied_to(model).family(*offered(model))]
    if is_flow(sampling) and "model_sampling" in model.object_patches:
        # The user set a shift after the LoRA, with one of ComfyUI's nodes.
        return replace(family, shift=None, lists=())
    return family


def auto_family(model: ModelPatcher) -> str:
    """The family of a MODEL's accelerations; if it has none, as `family_for`.

    Raises:
        ValueError: the accelerations have no single family.
    """
    applied = applied_to(model)
    if not applied.accelerations:
        return family_for(model).name
    return applied.family(*offered(model))


def report(model: ModelPatcher, run: Run, fast: bool = False) -> list[Line]:
    """Warnings about a run of `sample`, and then what it did.

    fast: whether the checkpoint itself is a few-step model.
    """
    applied, family = applied_to(model), family_for(model)
    others = fast or _patches(model) > applied.patches or bool(model.injections)
    own = own_sampling(model)
    if is_flow(own):
        shown = [f"{sigma:.3g}" for sigma in schedule(model, run.steps, run.denoise)[:-1].tolist()]
    else:
        shown = [str(t) for t in family.timesteps(run.steps, run.denoise, len(full_table(own)))]
    advice = warnings(applied, others, run.steps, run.cfg, family.cfg)
    return [*advice, ran(family.name, shown, run.cfg)]


def schedule(
    model: ModelPatcher,
    steps: int = 4,
    strength: float = 1.0,
    origin_steps: int = ORIGIN_STEPS,
    timesteps_text: str = "",
) -> torch.Tensor:
    """SIGMAS at the exact timesteps of the MODEL's family, then 0: float32 [N + 1] on the CPU.

    origin_steps: any number but 50 replaces the family's grid by an LCM grid with that many points.
    timesteps_text: a user's list, which replaces the grid, steps and strength. For a flow model a
        list of sigmas.

    Raises:
        ValueError: the list is not valid, or the numbers do not fit together.
    """
    own = own_sampling(model)
    if is_flow(own):
        sigmas = _flow_sigmas(model, steps, strength, origin_steps, timesteps_text)
        return torch.tensor([*sigmas, 0.0])
    table = full_table(own).float().cpu()
    if timesteps_text.strip():
        t = parse(timesteps_text, len(table))
    elif origin_steps != ORIGIN_STEPS:
        t = timesteps(steps, strength, origin_steps, len(table))
    else:
        t = family_for(model).timesteps(steps, strength, len(table))
    return torch.cat([table[t], torch.zeros(1)])


def _flow_sigmas(
    model: ModelPatcher, steps: int, strength: float, origin_steps: int, text: str
) -> list[float]:
    sampling = _prepared(model).get_model_object("model_sampling")
    family = sampling.family
    listed = parse_sigmas(text) if text.strip() else None
    if listed is None and origin_steps == ORIGIN_STEPS:
        listed = family.listed(steps, strength)
    if listed is not None:
        return [native(sampling, sigma) for sigma in listed]
    if origin_steps != ORIGIN_STEPS:
        chosen = times(steps, strength, origin_steps)
    else:
        chosen = family.times(steps, strength)
    return [shifted(sampling, time) for time in chosen]


def _prepared(model: ModelPatcher) -> ModelPatcher:
    """The MODEL with its sampling set."""
    if set_family(model.get_model_object("model_sampling")):
        return model
    return _with_family(model, family_for(model))


class FewStepSampler(comfy.samplers.KSAMPLER):
    """A SAMPLER that starts from pure noise at any timestep if the latent is empty.

    ComfyUI does so at the last timestep only; at any other it adds noise to the latent. With an
    empty latent the variance is then less than 1 (VP scale), but DMD2's single step at 399 needs 1.
    A flow model's noise always has the size that its sigma says.
    """

    def sample(
        self,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., None] | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        if not sigmas.is_floating_point():  # whole numbers, as a user may type them
            sigmas = sigmas.float()
        exploding = isinstance(model_wrap.inner_model.model_sampling, ms.EPS)  # or v or x0
        if exploding and latent_image is not None and not self.max_denoise(model_wrap, sigmas):
            empty = ~latent_image.flatten(1).any(1).view(-1, *[1] * (noise.ndim - 1))
            # The end of a schedule that a node has split may be 0, where the noise is 0 too.
            first = sigmas[0].clamp(min=SMALLEST)
            noise = torch.where(empty, noise * (1 + first**-2).sqrt(), noise)
        return super().sample(
            model_wrap,
            sigmas,
            extra_args,
            callback,
            noise,
            latent_image,
            denoise_mask,
            disable_pbar,
        )


def sampler(
    eta: float | None = 1.0,
    noise_device: str = "cpu",
    batch_index: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
) -> FewStepSampler:
    """The few-step SAMPLER.

    eta: None takes the eta of the MODEL's family. batch_index: the numbers of the pictures in their
    batch; None means 0..B-1. seeds: one for each picture; None uses the run's seed for all.
    """
    options = {
        "eta": eta, "noise_device": noise_device, "batch_index": batch_index, "seeds": seeds,
    }  # fmt: skip
    return FewStepSampler(sample_lcm_exact, options)


def sample_lcm_exact(
    model: Any,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    eta: float | None,
    noise_device: str,
    batch_index: Sequence[int] | None,
    seeds: Sequence[int] | None = None,
) -> torch.Tensor:
    """samplers/lcm.py with the signature that ComfyUI's KSAMPLER calls."""
    extra_args = extra_args or {}
    network = model.inner_model.inner_model
    sampling = network.model_sampling
    if not is_flow(sampling):
        sampling_class(sampling, type(network).__name__)
    if eta is None:
        default = DEFAULT_FLOW if is_flow(sampling) else DEFAULT
        eta = (set_family(sampling) or FAMILIES[default]).eta
    noise = picture_noise(x, seeds or extra_args.get("seed") or 0, batch_index, noise_device)
    on_cpu = sigmas.cpu()  # before the loop, only this waits for the device
    refuse_ascent(on_cpu.tolist())
    kept = kept_noise(on_cpu, eta, partial(earlier, sampling), partial(shares, sampling))
    signals, levels = shares(sampling, on_cpu)
    with tqdm(total=len(sigmas) - 1, disable=disable) as bar:

        def tick(state: dict[str, Any]) -> None:
            bar.update()
            if callback is not None:
                callback(state)

        return lcm(
            model, x, sigmas, extra_args, tick,
            noise=noise, kept=kept, levels=levels, signals=signals,
        )  # fmt: skip


def fitted(model: ModelPatcher, latent: dict[str, Any]) -> torch.Tensor:
    """The samples of a LATENT. An empty latent gets the MODEL's channels and scale."""
    hints = {name: latent[name] for name in HINTS if name in latent}  # 0.16.3 has the first only
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **hints)


def _mask(latent: dict[str, Any]) -> Any:
    """The noise mask of a LATENT, in floating point. Some nodes give truth values or bytes, which
    ComfyUI cannot scale (Comfy-Org/ComfyUI #2727)."""
    mask = latent.get("noise_mask")
    return mask.float() if isinstance(mask, torch.Tensor) else mask


@dataclass(frozen=True)
class Run:
    """The settings of a sampling run.

    Attributes:
        seed: of all its noise.
        steps: network calls per picture.
        cfg: the guidance scale; 1 is no guidance.
        denoise: above 0 to 1; 1 starts from pure noise.
        eta: share of fresh noise between steps; None takes the eta of the MODEL's family.
        noise_device: where noise is drawn, "cpu" or "gpu" (the sampling device).
    """

    seed: int
    steps: int = 4
    cfg: float = 1.0
    denoise: float = 1.0
    eta: float | None = None
    noise_device: str = "cpu"


def sample(
    model: ModelPatcher,
    run: Run,
    positive: list[Any],
    negative: list[Any],
    latent: dict[str, Any],
    *,
    seeds: Sequence[int] | None = None,
    callback: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Samples a LATENT with the schedule, noise and sampler of the MODEL's family.

    If the MODEL's sampling is not set, `family_for` chooses the family.

    Args:
        seeds: one for each picture of the latent; None uses the run's seed for all.
        callback: called after each step, as by ComfyUI's samplers; None shows the step's picture
            and the progress of this run on the node.

    Raises:
        ValueError: steps and denoise do not fit together, or the model cannot be sampled like this.
    """
    model = _prepared(model)
    sigmas = schedule(model, run.steps, run.denoise)
    image = fitted(model, latent)
    # Not len(), which the latent of a video with sound lacks.
    batch_index = picture_numbers(latent.get("batch_index"), image.shape[0])
    if seeds is None:
        noise = comfy.sample.prepare_noise(image, run.seed, batch_index)
    else:
        pictures = zip(image.split(1), seeds, batch_index, strict=True)
        noise = torch.cat([comfy.sample.prepare_noise(x, s, [n]) for x, s, n in pictures])
    samples = comfy.sample.sample_custom(
        model,
        noise,
        run.cfg,
        sampler(run.eta, run.noise_device, batch_index, seeds),
        sigmas,
        positive,
        negative,
        image,
        noise_mask=_mask(latent),
        callback=callback or latent_preview.prepare_callback(model, run.steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=run.seed,
    )
    return {**{k: v for k, v in latent.items() if k not in HINTS}, "samples": samples}
