"""What a single step lacks of the teacher's colours and contrast, and the map that brings it back.

One step answers with an average of the pictures that the noise could have become: each channel of
the latent has less deviation than the teacher's, and often another mean. AdaIN (arXiv 1703.06868,
equation 8) moves both, picture by picture; here they are measured over many pictures when the LoRA
is distilled, and moved for all alike, so that a dark picture stays dark.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Correction:
    """`scale * latent + shift`, one number of each for every channel, at diffusion scale.

    Raises ValueError when there are not as many shifts as scales, one is not finite, or a scale is
    not above 0.
    """

    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def __post_init__(self) -> None:
        fits = len(self.scale) == len(self.shift) > 0 and all(s > 0 for s in self.scale)
        if not fits or not all(math.isfinite(n) for n in (*self.scale, *self.shift)):
            raise ValueError(
                f"A correction is as many positive scales as shifts, all finite; found "
                f"{list(self.scale)[:8]} and {list(self.shift)[:8]}."
            )

    def __call__(self, latent: torch.Tensor) -> torch.Tensor:
        """[B, C, ...] -> the same shape, on the same device."""
        shape = (-1,) + (1,) * (latent.dim() - 2)
        scale, shift = (latent.new_tensor(each).view(shape) for each in (self.scale, self.shift))
        return latent * scale + shift

    def __str__(self) -> str:
        return json.dumps({"scale": self.scale, "shift": self.shift})


def parse(text: str) -> Correction:
    """What str() of a correction gives. Raises ValueError for anything else."""
    try:
        told = json.loads(text)
        scale, shift = (tuple(float(n) for n in told[key]) for key in ("scale", "shift"))
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        raise ValueError(
            f'expected {{"scale": [...], "shift": [...]}} with a number for each channel, found '
            f"{text[:80]!r}."
        ) from None
    return Correction(scale, shift)


def fitted(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> Correction:
    """The map that gives the latents in `found` the channels' means and deviations of those in
    `wanted`: [B, C, ...] each, of any sizes. Raises ValueError where one is not finite or constant.
    """
    (mean, deviation), (goal, spread) = _statistics(found), _statistics(wanted)
    scale = spread / deviation
    return Correction(tuple(scale.tolist()), tuple((goal - mean * scale).tolist()))


def _statistics(latents: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of each channel, float64 [C]."""
    channels = torch.cat([each.double().transpose(0, 1).flatten(1) for each in latents], dim=1)
    return channels.mean(1), channels.std(1)
