"""How a model mixes noise, the guided teacher, and the DDIM solver on the distillation grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...samplers.consistency import consistency, x0_and_eps
from ...samplers.families import ORIGIN_STEPS, Family
from ..adapter import Adapter
from .batch import GRID, Batch, Inputs

TIMES = 840  # of a flow model
Network = Callable[..., torch.Tensor]
"""network(z [B, C, H, W], t int64 [B], **inputs) -> raw output [B, C, H, W]."""


class Process:
    """How a model mixes picture and noise at timesteps 0..T - 1: z = alpha(t) x0 + sigma(t) eps."""

    prediction: str

    @property
    def T(self) -> int:  # noqa: N802 (as the papers call it)
        """The number of timesteps."""
        raise NotImplementedError

    @property
    def starts(self) -> tuple[int, ...]:
        """The timesteps where a step of the solver begins, ascending."""
        raise NotImplementedError

    @property
    def skip(self) -> int:
        """How many timesteps a step of the solver covers."""
        return self.T // ORIGIN_STEPS

    def run(self, family: Family, steps: int) -> list[int]:
        """The timesteps at which our sampler calls the network in a run of `steps`, descending."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """That of the tables, which latents and losses take: float32, or float64 in checks."""
        raise NotImplementedError

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """The picture's share, ready to multiply latents: int64 [B] -> [B, 1, 1, 1]."""
        raise NotImplementedError

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The noise's share: int64 [B] -> [B, 1, 1, 1]."""
        raise NotImplementedError

    def noised(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """z_t = alpha_t x0 + sigma_t eps, in float32."""
        return self.alpha(t) * x0 + self.sigma(t) * eps

    def predict(
        self, network: Network, z: torch.Tensor, t: torch.Tensor, inputs: Inputs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The (x0, eps) that a network predicts at (z, t): [B, C, H, W] in the tables' dtype."""
        output = network(z, t, **inputs)
        return x0_and_eps(
            output.to(self.dtype), z.to(self.dtype), self.alpha(t), self.sigma(t), self.prediction
        )

    def consistency(self, z: torch.Tensor, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """f(z, t), the student's clean latent, where the network predicts x0: [B, C, H, W]."""
        raise NotImplementedError

    def comparable(self, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """A clean latent at timestep t in the unit in which the consistency loss compares."""
        return x0


@dataclass(frozen=True)
class Schedule(Process):
    """Of Stable Diffusion: `alphas_cumprod` [1000] and a prediction type, "eps", "v" or "x0".

    alpha^2 + sigma^2 = 1. ComfyUI's sigmas give alphas_cumprod = 1 / (1 + sigma^2).
    """

    alphas_cumprod: torch.Tensor
    prediction: str = "eps"

    @property
    def dtype(self) -> torch.dtype:
        return self.alphas_cumprod.dtype

    @property
    def T(self) -> int:  # noqa: N802
        return len(self.alphas_cumprod)

    @property
    def starts(self) -> tuple[int, ...]:
        return GRID

    def run(self, family: Family, steps: int) -> list[int]:
        return family.timesteps(steps)

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return self.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return (1 - self.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)

    def consistency(self, z: torch.Tensor, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return consistency(z, x0, t.to(x0.dtype))


@dataclass(frozen=True)
class Line(Process):
    """Of a flow model: alpha + sigma = 1. sigmas: [TIMES], ascending to 1, with the model's shift.

    A sampler divides the time before the shift into equal parts, 1, 0.75, 0.5, 0.25 for 4 steps. As
    TIMES can be divided by 1 to 8, each of these is one of the timesteps, and a step of the solver
    begins at any of them.

    ComfyUI turns the velocity eps - x0 that the network predicts into x0 before we see it.
    """

    sigmas: torch.Tensor
    prediction: str = "x0"

    @property
    def dtype(self) -> torch.dtype:
        return self.sigmas.dtype

    @property
    def T(self) -> int:  # noqa: N802
        return len(self.sigmas)

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(range(self.T))

    def run(self, family: Family, steps: int) -> list[int]:
        return [round(time * self.T) - 1 for time in family.times(steps)]

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return (1 - self.sigmas[t]).view(-1, 1, 1, 1)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return self.sigmas[t].view(-1, 1, 1, 1)

    def consistency(self, z: torch.Tensor, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x0 itself, as flow models are sampled. At t = 0 a little noise is left for it to take."""
        return x0

    def comparable(self, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Divided by sigma. As z = x0 + sigma v, two clean latents then differ as the velocities
        do, the outputs of the network. Compared as they are, those at little noise would hardly
        count, and would drift away from the teacher (docs/distillation.md)."""
        return x0 / self.sigma(t)


def guided(cond: torch.Tensor, uncond: torch.Tensor, cfg: float | torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance with the usual scale: 1 gives the conditional prediction alone.

    The LCM papers write w = cfg - 1 (arXiv 2310.04378, equation 12).
    """
    return uncond + cfg * (cond - uncond)


def predict_guided(
    network: Network, schedule: Process, z: torch.Tensor, t: torch.Tensor,
    cond: Inputs, uncond: Inputs, cfg: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The guided (x0, eps) of a network at (z, t), both [B, C, H, W] float32.

    The conditional and the unconditional prediction run as one batch. x0 and eps are each converted
    first and then guided, whatever the prediction type. Without an uncond the network has its
    guidance embedded: it is called once, and cfg does not count.
    """
    if not uncond:
        return schedule.predict(network, z, t, cond)
    both = {name: torch.cat([value, uncond[name]]) for name, value in cond.items()}
    x0, eps = schedule.predict(network, torch.cat([z, z]), torch.cat([t, t]), both)
    (x0_cond, x0_uncond), (eps_cond, eps_uncond) = x0.chunk(2), eps.chunk(2)
    return guided(x0_cond, x0_uncond, cfg), guided(eps_cond, eps_uncond, cfg)


@torch.no_grad()
def teacher_step(
    network: Network, adapter: Adapter, schedule: Process, batch: Batch
) -> torch.Tensor:
    """z_s [B, C, H, W]: a guided DDIM step from z_t at batch.t to batch.s (arXiv 2310.04378,
    algorithm 1). The teacher is the network with the adapter off."""
    t, s = batch.t, batch.s
    z_t = schedule.noised(batch.z0, batch.eps, t)
    with adapter.off():
        x0, eps = predict_guided(network, schedule, z_t, t, batch.cond, batch.uncond, batch.cfg)
    return schedule.noised(x0, eps, s)


@torch.no_grad()
def ddim(
    network: Network, schedule: Process, noise: torch.Tensor, steps: int,
    cond: Inputs, uncond: Inputs, cfg: float, between: Callable[[], None] = lambda: None,
) -> torch.Tensor:  # fmt: skip
    """`steps` guided DDIM steps from noise [B, C, H, W] at t = T - 1 to the clean latent.

    Evenly spaced from the noisiest timestep (999, 979, ..., 19 for 50 steps of 1000). A DDIM step
    to s noises x0 with the predicted eps, and the last one keeps x0 (arXiv 2010.02502, equation
    12). between() is called before each step.
    """
    z = noise.float()
    grid = torch.linspace(schedule.T - 1, -1, steps + 1).round().long().tolist()
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        between()
        now = torch.full((len(z),), t, device=z.device)
        x0, eps = predict_guided(network, schedule, z, now, cond, uncond, cfg)
        z = x0 if s < 0 else schedule.noised(x0, eps, torch.full_like(now, s))
    return z
