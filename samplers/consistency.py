"""The consistency function, and x0 and eps from a network's output, all in VP scale.

VP scale is z = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1, as in the papers.
"""

from __future__ import annotations

import torch

# The smallest divisor. Only the last step of a zero-terminal-SNR schedule has a smaller alpha: z is
# pure noise there, and eps divided by alpha would be infinite.
SMALLEST = 2.0**-13


def c_skip_out(
    t: torch.Tensor, sigma_data: float = 0.5, scaling: float = 10.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(c_skip, c_out) at timesteps t in 0..999, of t's shape; float32, or float64 for float64.

    c_skip = sigma_data^2 / (s^2 + sigma_data^2), c_out = s / sqrt(s^2 + sigma_data^2), s = scaling
    * t (LCM, arXiv 2310.04378, section 4.1 and its released code). At t = 0: (1, 0).
    """
    s = scaling * (t if t.dtype == torch.float64 else t.float())
    total = s.square() + sigma_data**2
    return sigma_data**2 / total, s / total.sqrt()


def consistency(z: torch.Tensor, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """f(z, t) = c_skip(t) z + c_out(t) x0 (equation 9): [B, ...] for t of shape [B] or []."""
    c_skip, c_out = c_skip_out(t.reshape(t.shape + (1,) * (z.dim() - 1)))
    return c_skip * z + c_out * x0


def x0_and_eps(
    output: torch.Tensor, z: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, prediction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A network's raw output at z -> (x0, eps), both of z's shape.

    prediction: "eps", "v" (v = alpha eps - sigma x0, arXiv 2202.00512, appendix D) or "x0".
    alpha, sigma broadcast against z. Raises ValueError for another prediction type.
    """
    if prediction == "eps":
        return (z - sigma * output) / alpha.clamp(min=SMALLEST), output
    if prediction == "v":
        return alpha * z - sigma * output, alpha * output + sigma * z
    if prediction == "x0":
        return output, (z - alpha * output) / sigma.clamp(min=SMALLEST)
    raise ValueError(f"Prediction type must be eps, v or x0, found {prediction!r}.")
