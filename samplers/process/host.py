"""The sampling objects of ComfyUI's models: a table of timesteps, or a flow model's line."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from comfy import model_sampling as ms

from ..consistency import consistency
from ..families import DEFAULT, DEFAULT_FLOW, FAMILIES, Family
from ..lcm import Shares

UNDER = "lcm_lora_under"  # a flow model's sampling object keeps the replaced one under this name


class LCMSampling(ms.ModelSamplingDiscrete):
    """The model's own noise schedule, with the grid and the boundary of a family.

    `sigmas`, from which ComfyUI's schedulers choose, holds the family's grid only. The scheduler
    `simple` therefore finds the reference timesteps. timestep() and sigma() use `table`, which has
    one sigma for each timestep. They are exact on the table and interpolate geometrically between
    its points, so the network gets the right (perhaps fractional) timestep for any sigma.
    """

    table: torch.Tensor

    def __init__(self, model_config: Any, own: ms.ModelSamplingDiscrete, family: Family):
        """own: the model's sampling object until now; this one takes over its schedule."""
        super().__init__(model_config, zsnr=own.zsnr)
        table = full_table(own).float()
        self.family = family
        self.num_timesteps = len(table)
        self.sigma_data = own.sigma_data
        self.register_buffer("table", table)
        self.set_sigmas(table[family.grid(len(table))])
        self._tables = {table.device: table}

    def _table_on(self, device: torch.device) -> torch.Tensor:
        """The table on `device`. Kept there, because a copy at each step would stall the device."""
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
        f"(Stable Diffusion 1, 2, XL and relatives), or a flow model (SD3, Flux, Qwen-Image, Wan "
        f"and relatives). This MODEL is a {model_name}, which samples with {kind}. Use a sampler "
        "made for it."
    )


def is_flow(sampling: Any) -> bool:
    """Whether a sampling object belongs to a flow model, which mixes noise and picture on a line.

    Cosmos is a flow model in another scale: x divided by 1 - sigma, and a sigma of t / (1 - t).
    """
    kinds = (ms.CONST, ms.COSMOS_RFLOW)
    return isinstance(sampling, kinds) and not isinstance(sampling, ms.IMG_TO_IMG_FLOW)


def shares(sampling: Any, sigmas: torch.Tensor) -> Shares:
    """alpha and beta at each of `sigmas` [N], found by letting ComfyUI mix picture and noise."""
    none, all_ = torch.zeros_like(sigmas), torch.ones_like(sigmas)
    alphas = sampling.noise_scaling(sigmas, none, all_)
    return alphas.tolist(), sampling.noise_scaling(sigmas, all_, none).tolist()


def shifted(sampling: Any, time: float) -> float:
    """The sigma of a time in (0, 1] of a flow model, with the model's own shift.

    ComfyUI calls this map sigma(), and its map from a sigma to the network's input timestep(). In
    its flow classes these two are not inverse, so do not use one to undo the other.
    """
    return float(sampling.sigma(time * getattr(sampling, "multiplier", 1)))


def native(sampling: Any, sigma: float) -> float:
    """A sigma between 0 and 1, converted to the flow model's own scale."""
    return sigma if isinstance(sampling, ms.CONST) else shifted(sampling, sigma)


def earlier(sampling: Any, sigmas: torch.Tensor, eta: float) -> torch.Tensor:
    """The sigmas at (1 - eta) of the network's time; times that are timesteps are rounded down.

    The time of a flow model is its sigma between 0 and 1. This extension of TCD to flow models is
    our own choice: no author gives one.
    """
    if isinstance(sampling, ms.CONST):
        return sigmas * (1 - eta)
    if is_flow(sampling):
        line = sigmas / (sigmas + 1) * (1 - eta)
        return line / (1 - line)
    return sampling.sigma(torch.floor((1 - eta) * sampling.timestep(sigmas).float()))


def full_table(sampling: ms.ModelSamplingDiscrete) -> torch.Tensor:
    """The sigmas of all training timesteps, ascending."""
    return sampling.table if isinstance(sampling, LCMSampling) else sampling.sigmas


def flow_sampling(own: Any, family: Family) -> Any:
    """A flow model's own sampling object, with the shift of `family` if the family has one.

    Nothing else has to change: the host's scheduler `simple` finds the family's sigmas.
    """
    sampling = copy.deepcopy(own)
    if family.shift is not None:
        if isinstance(own, ms.ModelSamplingFlux):  # whose shift is a logarithm
            sampling.set_parameters(shift=math.log(family.shift))
        elif isinstance(own, ms.ModelSamplingDiscreteFlow):
            sampling.set_parameters(shift=family.shift, multiplier=own.multiplier)
        else:
            raise ValueError(
                f"The family {family.name!r} sets a shift of {family.shift:g}, and this MODEL "
                f"samples with {type(own).__bases__[0].__name__}, which has none. Choose "
                f"{DEFAULT_FLOW} or {DEFAULT}."
            )
    sampling.family = family
    sampling.__dict__[UNDER] = own  # not an attribute, which would make it a part of the module
    return sampling


def families_of(sampling: Any) -> list[str]:
    """The families that a model with this sampling object can be sampled as."""
    flow = is_flow(sampling)
    return [name for name, family in FAMILIES.items() if (family.flow if flow else family.tables)]


def set_family(sampling: Any) -> Family | None:
    """The family that a MODEL's sampling object is set for. None if it is not set by this pack."""
    family = getattr(sampling, "family", None)
    return family if isinstance(family, Family) else None
