"""The samplers in ComfyUI: the noise schedule of a MODEL, SIGMAS, a SAMPLER, and a full run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

from .consistency import consistency
from .families import DEFAULT, FAMILIES, ORIGIN_STEPS, Family
from .guidance_embedding import refuse_guidance_embedding
from .lcm import kept_noise, lcm
from .noise import picture_noise, picture_numbers
from .report import Acceleration, Applied, Line, ran, warnings
from .timesteps import parse, timesteps

APPLIED = "lcm_lora"  # where a MODEL carries an Applied, which its clones keep


class LCMSampling(ms.ModelSamplingDiscrete):
    """The model's own noise schedule, with the grid and the boundary of a family.

    `sigmas`, from which ComfyUI's schedulers choose, holds the family's grid only. The scheduler
    `simple` therefore finds the reference timesteps. timestep() and sigma() use `table`, which has
    one sigma for each timestep. They are exact on the table and interpolate geometrically between
    its points, so the network gets the right (perhaps fractional) timestep for any sigma.
    """

    table: torch.Tensor

    def __init__(self, model_config: Any, own: ms.ModelSamplingDiscrete, family: Family):
        """own: the model's sampling object so far, whose schedule this one takes over."""
        super().__init__(model_config, zsnr=own.zsnr)
        table = full_table(own).float()
        self.family = family
        self.num_timesteps = len(table)
        self.sigma_data = own.sigma_data
        self.register_buffer("table", table)
        self.set_sigmas(table[family.grid(len(table))])
        self._tables = {table.device: table}

    def _table_on(self, device: torch.device) -> torch.Tensor:
        """The table on `device`. It is kept, because a copy at each step would stall the device."""
        if device not in self._tables:
            self._tables[device] = self.table.to(device)
        return self._tables[device]

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """The float timestep of each sigma, clamped to the table's ends."""
        table = self._table_on(sigma.device)
        sigma = sigma.float().clamp(table[0], table[-1])
        above = torch.searchsorted(table, sigma).clamp(min=1)
        low, high = table[above - 1], table[above]
        # The quotient of equal logarithms is exactly 1, so points of the table stay whole numbers.
        return (above - 1) + (sigma / low).log() / (high / low).log()

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """The sigma of each timestep, a number of any type that may have a fraction."""
        table = self._table_on(timestep.device)
        t = timestep.float().clamp(0, len(table) - 1)
        low = t.floor().long()
        ratio = table[t.ceil().long()] / table[low]
        return table[low] * ratio ** (t - low)

    def calculate_denoised(
        self, sigma: torch.Tensor, model_output: torch.Tensor, model_input: torch.Tensor
    ) -> torch.Tensor:
        """f(z, t) for ComfyUI's x = z sqrt(1 + sigma^2), or x0 for a family without the boundary.
        The prediction type is the model's own."""
        x0 = super().calculate_denoised(sigma, model_output, model_input)
        if not self.family.boundary:
            return x0
        scale = ms.reshape_sigma(sigma, model_input.ndim).square().add(1).rsqrt()
        return consistency(model_input * scale, x0, self.timestep(sigma))


class LCMSamplingEps(LCMSampling, ms.EPS):
    """For a network that predicts the noise."""


class LCMSamplingV(LCMSampling, ms.V_PREDICTION):
    """For a network that predicts the velocity."""


class LCMSamplingX0(LCMSampling, ms.X0):
    """For a network that predicts the clean latent."""


def sampling_class(own: torch.nn.Module, model_name: str) -> type[LCMSampling]:
    """Our class for the prediction type of a model's sampling object.

    Raises:
        ValueError: the model has no discrete schedule with eps, v or x0 prediction.
    """
    foreign = (ms.ModelSamplingDiscreteEDM, ms.StableCascadeSampling, ms.EDM, ms.IMG_TO_IMG)
    if isinstance(own, ms.ModelSamplingDiscrete) and not isinstance(own, foreign):
        if isinstance(own, ms.V_PREDICTION):
            return LCMSamplingV
        if isinstance(own, ms.X0):
            return LCMSamplingX0
        if isinstance(own, ms.EPS):
            return LCMSamplingEps
    kind = ", ".join(base.__name__ for base in type(own).__bases__)
    raise ValueError(
        f"LCM sampling needs a model with a table of noise levels and eps, v or x0 prediction "
        f"(Stable Diffusion 1, 2, XL and relatives). This MODEL is a {model_name}, which samples "
        f"with {kind}. Use a sampler made for it."
    )


def full_table(sampling: ms.ModelSamplingDiscrete) -> torch.Tensor:
    """The sigmas of all training timesteps, ascending."""
    return sampling.table if isinstance(sampling, LCMSampling) else sampling.sigmas


def file_of(model: ModelPatcher) -> Path | None:
    """The file that a MODEL was loaded from, if the MODEL knows it."""
    # A MODEL knows how to load itself again, with a loader and its arguments. The first argument of
    # ComfyUI's loaders is the file.
    _, arguments, *_ = model.cached_patcher_init or (None, ())
    return Path(arguments[0]) if arguments and isinstance(arguments[0], str) else None


def own_sampling(model: ModelPatcher) -> ms.ModelSamplingDiscrete:
    """The sampling object of a MODEL, with all its timesteps.

    Raises:
        ValueError: the model has no discrete schedule, or ComfyUI dropped its guidance embedding.
    """
    if (file := file_of(model)) is not None:
        refuse_guidance_embedding(file)  # ComfyUI drops that weight silently
    own = model.get_model_object("model_sampling")
    sampling_class(own, type(model.model).__name__)
    if len(full_table(own)) != own.num_timesteps:
        # ComfyUI's own lcm patch keeps 50 sigmas and forgets v-prediction. Look below it.
        zsnr, bare = own.zsnr, model.clone()
        bare.object_patches.pop("model_sampling")
        own = bare.get_model_object("model_sampling")
        sampling_class(own, type(model.model).__name__)
        if zsnr and not own.zsnr:  # set with that patch; a copy, because the model owns `own`
            own = copy.deepcopy(own)
            own.zsnr = True
            own.set_sigmas(ms.rescale_zero_terminal_snr_sigmas(own.sigmas))
    return own


def patch_sampling(model: ModelPatcher, family: str = DEFAULT) -> ModelPatcher:
    """A clone of MODEL, with the same weights, that samples as `family` was distilled.

    Raises:
        ValueError: the family is unknown, or `own_sampling` raises it.
    """
    if family not in FAMILIES:
        raise ValueError(f"Unknown family {family!r}, expected one of: {', '.join(FAMILIES)}.")
    own = own_sampling(model)
    kind = sampling_class(own, type(model.model).__name__)
    patched = model.clone()
    patched.add_object_patch(
        "model_sampling", kind(model.model.model_config, own, FAMILIES[family])
    )
    return patched


def family_of(sampling: ms.ModelSamplingDiscrete) -> Family:
    """The family that a MODEL's sampling object is set for, or the default."""
    return sampling.family if isinstance(sampling, LCMSampling) else FAMILIES[DEFAULT]


def applied_to(model: ModelPatcher) -> Applied:
    """What this pack's nodes added to a MODEL."""
    return model.get_attachment(APPLIED) or Applied()


def record(before: ModelPatcher, after: ModelPatcher, acceleration: Acceleration | None) -> None:
    """Notes on `after`, a new clone of `before`, that a LoRA was added to it.

    acceleration: what the LoRA is, or None for a style.
    """
    known = applied_to(before)
    more = () if acceleration is None else (acceleration,)
    patches = known.patches + _patches(after) - _patches(before)
    after.set_attachments(APPLIED, Applied((*known.accelerations, *more), patches))


def _patches(model: ModelPatcher) -> int:
    return sum(map(len, model.patches.values()))


def family_for(model: ModelPatcher) -> Family:
    """The family that a MODEL's sampling is set for; if it is not set, that of its accelerations.

    Raises:
        ValueError: the sampling is not set and the accelerations have no single family.
    """
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, LCMSampling):
        return sampling.family
    return FAMILIES[applied_to(model).family()]


def auto_family(model: ModelPatcher) -> str:
    """The family of a MODEL's accelerations; without any, the one that is set, or DEFAULT.

    Raises:
        ValueError: the accelerations have no single family.
    """
    applied = applied_to(model)
    return applied.family() if applied.accelerations else family_for(model).name


def report(model: ModelPatcher, run: Run, fast: bool = False) -> list[Line]:
    """What is wrong with a run that `sample` did, and then what it did.

    fast: whether the checkpoint itself is known to be a few-step model.
    """
    applied, family = applied_to(model), family_for(model)
    others = fast or _patches(model) > applied.patches or bool(model.injections)
    table = full_table(own_sampling(model))
    timesteps = family.timesteps(run.steps, run.denoise, len(table))
    found = warnings(applied, others, run.steps, run.cfg)
    return [*found, ran(family.name, timesteps, run.cfg)]


def schedule(
    model: ModelPatcher,
    steps: int = 4,
    strength: float = 1.0,
    origin_steps: int = ORIGIN_STEPS,
    timesteps_text: str = "",
) -> torch.Tensor:
    """SIGMAS at the exact timesteps of the MODEL's family, then 0: float32 [N + 1] on the CPU.

    origin_steps: any number but 50 replaces the family's grid by an LCM grid with that many points.
    timesteps_text: a user's list, which replaces the grid, steps and strength.

    Raises:
        ValueError: the list is not valid, or the numbers do not fit together.
    """
    table = full_table(own_sampling(model)).float().cpu()
    if timesteps_text.strip():
        t = parse(timesteps_text, len(table))
    elif origin_steps != ORIGIN_STEPS:
        t = timesteps(steps, strength, origin_steps, len(table))
    else:
        t = family_for(model).timesteps(steps, strength, len(table))
    return torch.cat([table[t], torch.zeros(1)])


class FewStepSampler(comfy.samplers.KSAMPLER):
    """A SAMPLER that starts from pure noise at any timestep if the latent is empty.

    ComfyUI does so at the last timestep only. At any other it adds noise to the latent. If that is
    empty, the variance is less than 1 (VP scale), which DMD2's single step at 399 needs.
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
        if latent_image is not None and not self.max_denoise(model_wrap, sigmas):
            empty = ~latent_image.flatten(1).any(1).view(-1, *[1] * (noise.ndim - 1))
            noise = torch.where(empty, noise * (1 + sigmas[0] ** -2).sqrt(), noise)
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

    eta: None takes that of the MODEL's family. batch_index: the numbers of the pictures in their
    batch; None means 0..B-1. seeds: one for each picture; None takes the run's for all.
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
    sampling_class(sampling, type(network).__name__)
    if eta is None:
        eta = family_of(sampling).eta
    noise = picture_noise(x, seeds or extra_args.get("seed") or 0, batch_index, noise_device)
    on_cpu = sigmas.cpu()  # the only moment that waits for the device before the loop
    kept = kept_noise(on_cpu, eta, sampling.timestep, sampling.sigma)
    with tqdm(total=len(sigmas) - 1, disable=disable) as bar:

        def tick(state: dict[str, Any]) -> None:
            bar.update()
            if callback is not None:
                callback(state)

        levels = on_cpu.tolist()
        return lcm(model, x, sigmas, extra_args, tick, noise=noise, kept=kept, levels=levels)


@dataclass(frozen=True)
class Run:
    """The settings of a sampling run.

    Attributes:
        seed: of all its noise.
        steps: network calls per picture.
        cfg: the guidance scale; 1 is no guidance.
        denoise: above 0 to 1; 1 starts from pure noise.
        eta: share of fresh noise between steps; None takes that of the MODEL's family.
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

    A MODEL whose sampling is not set is sampled as `family_for` says.

    Args:
        seeds: one for each picture of the latent; None takes the run's for all.
        callback: is called after each step as ComfyUI's samplers do; None shows the step's picture
            and the progress of this run on the node.

    Raises:
        ValueError: steps and denoise do not fit together, or the model cannot be sampled like this.
    """
    if not isinstance(model.get_model_object("model_sampling"), LCMSampling):
        model = patch_sampling(model, family_for(model).name)
    sigmas = schedule(model, run.steps, run.denoise)
    image = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], latent.get("downscale_ratio_spacial")
    )
    batch_index = picture_numbers(latent.get("batch_index"), len(image))
    if seeds is None:
        noise = comfy.sample.prepare_noise(image, run.seed, batch_index)
    else:
        drawn = zip(image.split(1), seeds, batch_index, strict=True)
        noise = torch.cat([comfy.sample.prepare_noise(one, s, [n]) for one, s, n in drawn])
    samples = comfy.sample.sample_custom(
        model,
        noise,
        run.cfg,
        sampler(run.eta, run.noise_device, batch_index, seeds),
        sigmas,
        positive,
        negative,
        image,
        noise_mask=latent.get("noise_mask"),
        callback=callback or latent_preview.prepare_callback(model, run.steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=run.seed,
    )
    hints = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # of an empty latent only
    return {**{k: v for k, v in latent.items() if k not in hints}, "samples": samples}
