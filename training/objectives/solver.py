"""The noise schedule of the model at hand and the DDIM solver on the distillation grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...samplers.consistency import x0_and_eps


@dataclass(frozen=True)
class Schedule:
    """What a model was trained with: `alphas_cumprod` [1000] and its prediction type.

    The table is float32, or float64 to check equations; latents and losses take its precision.

    prediction: "eps", "v" or "x0". The host's sigmas give alphas_cumprod = 1 / (1 + sigma^2).
    """

    alphas_cumprod: torch.Tensor
    prediction: str = "eps"

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """sqrt(alphas_cumprod[t]), ready to multiply latents: [B] -> [B, 1, 1, 1]."""
        return self.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """sqrt(1 - alphas_cumprod[t]): [B] -> [B, 1, 1, 1]."""
        return (1 - self.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)

    def noised(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """z_t = alpha_t x0 + sigma_t eps, in float32 (VP scale)."""
        return self.alpha(t) * x0 + self.sigma(t) * eps

    def split(
        self, output: torch.Tensor, z: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A network's raw output at (z, t) -> what it says of x0 and eps, in the table's dtype."""
        dtype = self.alphas_cumprod.dtype
        return x0_and_eps(
            output.to(dtype), z.to(dtype), self.alpha(t), self.sigma(t), self.prediction
        )


def guided(cond: torch.Tensor, uncond: torch.Tensor, cfg: float | torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance with the usual scale: 1 is the conditional answer alone.

    The LCM papers write w = cfg - 1 (arXiv 2310.04378, equation 12).
    """
    return uncond + cfg * (cond - uncond)


def teacher(
    network, schedule: Schedule, z: torch.Tensor, t: torch.Tensor,
    context: dict[str, torch.Tensor], uncond: dict[str, torch.Tensor], cfg: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The guided (x0, eps) of a network at z_t, both [B, C, H, W] float32.

    network(z, t, **context) -> raw output. Conditional and unconditional run as one batch; x0 and
    eps are each converted first and then guided, whatever the prediction type.
    """
    both = {name: torch.cat([value, uncond[name]]) for name, value in context.items()}
    zz, tt = torch.cat([z, z]), torch.cat([t, t])
    x0, eps = schedule.split(network(zz, tt, **both), zz, tt)
    return guided(*x0.chunk(2), cfg), guided(*eps.chunk(2), cfg)


@torch.no_grad()
def ddim(
    network, schedule: Schedule, noise: torch.Tensor, steps: int,
    context: dict[str, torch.Tensor], uncond: dict[str, torch.Tensor], cfg: float,
    between: Callable[[], None] = lambda: None,
) -> torch.Tensor:  # fmt: skip
    """The teacher's own answer: `steps` guided DDIM steps from t = 999 to the clean latent.

    Evenly spaced from the noisiest timestep (999, 979, ..., 19 for 50 steps); a DDIM step to s
    noises x0 with the predicted eps, and the last one keeps x0 (arXiv 2010.02502, equation 12).
    between() is called before each step.
    """
    z = noise.float()
    grid = torch.linspace(999, -1, steps + 1).round().long().tolist()
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        between()
        now = torch.full((len(z),), t, device=z.device)
        x0, eps = teacher(network, schedule, z, now, context, uncond, cfg)
        z = x0 if s < 0 else schedule.noised(x0, eps, torch.full_like(now, s))
    return z
