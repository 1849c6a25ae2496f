"""The samplers inside ComfyUI: the MODEL's noise schedule, SIGMAS, SAMPLER and a whole run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy import model_sampling as ms
from comfy.model_patcher import ModelPatcher
from tqdm.auto import tqdm

from .consistency import consistency
from .families import FAMILIES, ORIGIN_STEPS, Family
from .guidance import refuse_guidance_embedding
from .lcm import kept_noise, lcm
from .noise import picture_noise, picture_numbers
from .timesteps import parse, timesteps


class LCMSampling(ms.ModelSamplingDiscrete):
    """The model's own noise schedule, and how a family samples: its grid and its boundary.

    `sigmas`, from which the host's schedulers choose, is the family's grid, so `simple` finds the
    reference timesteps. timestep() and sigma() use the whole `table`, one sigma for each
    timestep: exact on it, and geometric interpolation between, so a sigma from any scheduler
    reaches the network with the (perhaps fractional) timestep that belongs to it.
    """

    def __init__(self, model_config: object, own: ms.ModelSamplingDiscrete, family: Family):
        """Takes over the schedule of `own`, the model's sampling so far, and the family's grid."""
        super().__init__(model_config, zsnr=own.zsnr)
        table = full_table(own).float()
        self.family = family
        self.num_timesteps = len(table)
        self.sigma_data = own.sigma_data
        self.register_buffer("table", table)
        self.set_sigmas(table[family.grid(len(table))])
        self._near = table

    def _table_near(self, device: torch.device) -> torch.Tensor:
        """The table on `device`. Kept there: a copy at each step would make the device wait."""
        if self._near.device != device:
            self._near = self.table.to(device)
        return self._near

    def timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """The float timestep of each sigma, clamped to the table's ends."""
        table = self._table_near(sigma.device)
        sigma = sigma.float().clamp(table[0], table[-1])
        above = torch.searchsorted(table, sigma).clamp(min=1)
        low, high = table[above - 1], table[above]
        # The quotient of equal logarithms is exactly 1, so points of the table stay whole numbers.
        return (above - 1) + (sigma / low).log() / (high / low).log()

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """The sigma of each timestep, of any number type; fractions lie between."""
        table = self.table.to(timestep.device)
        t = timestep.float().clamp(0, len(table) - 1)
        low = t.floor().long()
        ratio = table[t.ceil().long()] / table[low]
        return table[low] * ratio ** (t - low)

    def calculate_denoised(
        self, sigma: torch.Tensor, model_output: torch.Tensor, model_input: torch.Tensor
    ) -> torch.Tensor:
        """f(z, t) for the host's x = z sqrt(1 + sigma^2), by the model's own prediction type; just
        x0 for a family without the boundary."""
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

    Raises ValueError when it has no discrete schedule with eps, v or x0 prediction.
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


def own_sampling(model: ModelPatcher) -> ms.ModelSamplingDiscrete:
    """The sampling object of a MODEL that still has all its timesteps.

    Raises ValueError for a model without a discrete schedule, and for one that the host has loaded
    without its guidance embedding.
    """
    # It drops that weight without a trace, but a MODEL knows how it would be loaded again: by a
    # loader and its arguments, of which the host's have the file as the first.
    _, arguments, *_ = model.cached_patcher_init or (None, ())
    if arguments and isinstance(arguments[0], str):
        refuse_guidance_embedding(Path(arguments[0]))
    own = model.get_model_object("model_sampling")
    sampling_class(own, type(model.model).__name__)
    if len(full_table(own)) != own.num_timesteps:
        # The host's own lcm patch keeps 50 sigmas and forgets v-prediction: look below it.
        zsnr, bare = own.zsnr, model.clone()
        bare.object_patches.pop("model_sampling")
        own = bare.get_model_object("model_sampling")
        sampling_class(own, type(model.model).__name__)
        if zsnr and not own.zsnr:  # set by hand with that patch; a copy, for `own` is the model's
            own = copy.deepcopy(own)
            own.zsnr = True
            own.set_sigmas(ms.rescale_zero_terminal_snr_sigmas(own.sigmas))
    return own


def patch_sampling(model: ModelPatcher, family: str = "lcm") -> ModelPatcher:
    """A clone of MODEL that samples as `family` was distilled; its weights are untouched.

    Raises ValueError for an unknown family, and as `own_sampling` does.
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
    """The family that a MODEL's sampling object is set for; LCM where none has been set."""
    return sampling.family if isinstance(sampling, LCMSampling) else FAMILIES["lcm"]


def schedule(
    model: ModelPatcher,
    steps: int = 4,
    strength: float = 1.0,
    origin_steps: int = ORIGIN_STEPS,
    timesteps_text: str = "",
) -> torch.Tensor:
    """SIGMAS at the exact timesteps of the MODEL's family, then 0: float32 [N + 1] on the CPU.

    Another number of origin_steps than 50 replaces the family's grid by an LCM's of that many
    points; a user's list in timesteps_text replaces steps and strength too. Raises ValueError for
    a list or numbers that do not fit (samplers/timesteps.py).
    """
    table = full_table(own_sampling(model)).float().cpu()
    if timesteps_text.strip():
        t = parse(timesteps_text, len(table))
    elif origin_steps != ORIGIN_STEPS:
        t = timesteps(steps, strength, origin_steps, len(table))
    else:
        family = family_of(model.get_model_object("model_sampling"))
        t = family.timesteps(steps, strength, len(table))
    return torch.cat([table[t], torch.zeros(1)])


class FewStepSampler(comfy.samplers.KSAMPLER):
    """A SAMPLER that makes a picture of noise alone at whatever timestep its run starts.

    The host does so at the last timestep only and adds noise to the latent at others, which leaves
    less than the variance 1 (VP scale) that DMD2's single step at 399 wants, when the picture's
    latent is empty.
    """

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None,
        denoise_mask=None, disable_pbar=False,
    ) -> torch.Tensor:  # fmt: skip
        if not self.max_denoise(model_wrap, sigmas):
            empty = ~latent_image.flatten(1).any(1).view(-1, *[1] * (noise.ndim - 1))
            noise = torch.where(empty, noise * (1 + sigmas[0] ** -2).sqrt(), noise)
        return super().sample(
            model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask,
            disable_pbar,
        )  # fmt: skip


def sampler(
    eta: float | None = 1.0, noise_device: str = "cpu", batch_index: Sequence[int] | None = None
) -> FewStepSampler:
    """The few-step SAMPLER.

    eta: that of the MODEL's family when None. batch_index: numbers of the pictures in their batch,
    0..B-1 when None.
    """
    options = {"eta": eta, "noise_device": noise_device, "batch_index": batch_index}
    return FewStepSampler(sample_lcm_exact, options)


def sample_lcm_exact(
    model, x, sigmas, extra_args=None, callback=None, disable=None,
    *, eta: float | None, noise_device: str, batch_index: Sequence[int] | None,
) -> torch.Tensor:  # fmt: skip
    """samplers/lcm.py in the shape the host's KSAMPLER calls."""
    extra_args = extra_args or {}
    network = model.inner_model.inner_model
    sampling = network.model_sampling
    sampling_class(sampling, type(network).__name__)
    if eta is None:
        eta = family_of(sampling).eta
    noise = picture_noise(x, extra_args.get("seed") or 0, batch_index, noise_device)
    kept = kept_noise(sigmas, eta, sampling.timestep, sampling.sigma)
    with tqdm(total=len(sigmas) - 1, disable=disable) as bar:

        def tick(state: dict) -> None:
            bar.update()
            if callback is not None:
                callback(state)

        return lcm(model, x, sigmas, extra_args, tick, noise=noise, kept=kept)


def sample(
    model: ModelPatcher,
    seed: int,
    steps: int,
    cfg: float,
    positive: list,
    negative: list,
    latent: dict,
    denoise: float = 1.0,
    eta: float | None = None,
    noise_device: str = "cpu",
) -> dict:
    """A whole run on a LATENT: schedule, noise and sampler as the MODEL's family wants them.

    A MODEL without our patch is taken for an LCM one; eta: that of the family when None. Raises
    ValueError for steps and denoise that do not fit together and for a model that cannot be
    sampled so.
    """
    if not isinstance(model.get_model_object("model_sampling"), LCMSampling):
        model = patch_sampling(model)
    sigmas = schedule(model, steps, denoise)
    image = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], latent.get("downscale_ratio_spacial")
    )
    batch_index = picture_numbers(latent.get("batch_index"), len(image))
    samples = comfy.sample.sample_custom(
        model,
        comfy.sample.prepare_noise(image, seed, batch_index),
        cfg,
        sampler(eta, noise_device, batch_index),
        sigmas,
        positive,
        negative,
        image,
        noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    hints = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # of an empty latent only
    return {**{k: v for k, v in latent.items() if k not in hints}, "samples": samples}
