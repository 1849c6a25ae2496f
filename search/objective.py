"""The objective of a search: how far few-step sampling with some weights is from the reference.

The styles alone draw the reference in many guided steps: r_i are its finished pictures, and z_ik
its states at the timesteps t_k of the few-step sampler. f_l is one call of the network at weights
l, and x_i(l) are the few-step pictures, with the same noise for all l:

    D_path(l) = mean_ik |f_l(z_ik, t_k) - r_i|^2
    D_spec(l) = sum over channels of (log P_x - log P_r)^2 in BANDS radial bands, and of the
                difference of the means, in standard deviations of r
    J(l) = D_path(l) / D_path(default) + D_spec(l) / D_spec(default)

A distance between x_i(l) and r_i would not work: with fresh noise in each step they are different
pictures, and a blurred mean is the nearest. D_path compares along the reference's own path, where
there is only one right answer. Blur still lowers D_path a little, but it raises D_spec.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BANDS = 6


@dataclass(frozen=True)
class Residuals:
    """The residuals at one set of weights, whose squares add up to the objective.

    Attributes:
        path: [pictures, n], scaled so that the sum of squares over n is the picture's D_path.
        spectrum: [m]; the sum of its squares is D_spec.
        shown: [m], the statistics of the few-step pictures, for the share of a style that shows.
    """

    path: Tensor
    spectrum: Tensor
    shown: Tensor

    @property
    def d_path(self) -> float:
        return float(self.path.double().square().sum(1).mean())

    @property
    def d_spec(self) -> float:
        return float(self.spectrum.square().sum())


def residuals(answers: Tensor, targets: Tensor, drawn: Tensor, spread: Tensor | None) -> Residuals:
    """answers: f_l(z_ik, t_k), [pictures, steps, ...]. targets: r_i, or one target for each step.
    drawn: x_i(l). spread: the statistics to reach; None takes the statistics of the targets."""
    if targets.ndim < answers.ndim:
        targets = targets.unsqueeze(1)
    path = (answers.float() - targets.float()).flatten(1)
    shown = statistics(drawn)
    wanted = statistics(targets[:, 0]) if spread is None else spread
    return Residuals(path / path.shape[1] ** 0.5, difference(shown, wanted), shown)


def difference(shown: Tensor, wanted: Tensor) -> Tensor:
    """The difference of statistics, each in its own unit: [m].

    Log powers are differences of logarithms; means are in standard deviations of `wanted`.
    """
    mean, log_power = shown[:, :1], shown[:, 1:]
    # The power of all bands together is the variance within a picture.
    deviation = wanted[:, 1:].exp().sum(1, keepdim=True).sqrt()
    means = (mean - wanted[:, :1]) / deviation.clamp(min=1e-12)
    return torch.cat([means, log_power - wanted[:, 1:]], 1).flatten()


def statistics(latents: Tensor) -> Tensor:
    """Of all latents [N, C, ..., H, W] together: the mean of each channel, and the log of its power
    in BANDS radial bands of frequencies, without the mean: [C, 1 + BANDS], float64."""
    x = latents.double()
    if x.ndim == 5:  # a video latent: each frame counts as a picture
        x = x.transpose(1, 2).flatten(0, 1)
    mean = x.mean((0, 2, 3))
    power = torch.fft.fft2(x - x.mean((2, 3), keepdim=True), norm="forward").abs().square().mean(0)
    bands = band_of(*x.shape[-2:]).to(x.device)
    sums = x.new_zeros(x.shape[1], BANDS).index_add_(1, bands.flatten(), power.flatten(1))
    floor = sums.sum(1, keepdim=True) * 1e-9 + 1e-30  # of a band without frequencies
    return torch.cat([mean[:, None], (sums + floor).log()], 1).cpu()


def band_of(height: int, width: int) -> Tensor:
    """The band of each frequency, [height, width]: bands of equal width up to the highest frequency
    of an axis; higher ones on the diagonals count to the last band."""
    y, x = torch.fft.fftfreq(height).abs(), torch.fft.fftfreq(width).abs()
    radius = (y[:, None].square() + x.square()).sqrt()
    return (radius / 0.5 * BANDS).long().clamp(max=BANDS - 1)


def style_shown(shown: Tensor, without: Tensor, styled: Tensor, plain: Tensor) -> float | None:
    """The share of a style's effect on the statistics that few-step pictures show; 1 is all of it.

    shown, without: statistics of few-step pictures with and without the style. styled, plain: the
    same for many-step pictures. None if the style changes nothing in many steps.
    """
    effect = difference(styled, plain)
    size = float(effect.square().sum())
    if size < 1e-8:
        return None
    return float((difference(shown, plain) - difference(without, plain)) @ effect) / size
