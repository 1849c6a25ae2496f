"""Noise that belongs to a picture: it depends only on the seed, the batch index and the step.

So a picture gets the same noise alone and in a batch, and on every device if the CPU draws it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import index as integer
from typing import SupportsIndex

import torch

from .transfer import sent

_MASK = 0xFFFFFFFFFFFFFFFF


def _splitmix64(x: int) -> int:
    """One step of the SplitMix64 generator (Steele, Lea, Flood 2014): scrambles 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def picture_seed(seed: int, index: int, step: int) -> int:
    """A 64-bit seed for one picture's noise at one step.

    The numbers are chained, not added: picture 0 of seed 1 must differ from picture 1 of seed 0.
    """
    return _splitmix64(_splitmix64(_splitmix64(seed & _MASK) ^ index) ^ step)


def picture_numbers(given: Iterable[SupportsIndex] | None, count: int) -> list[int]:
    """A LATENT's batch_index as integers. Nodes write a list, an array, a tensor, or a list of such
    items. If there is none, the numbers are 0 to count - 1.

    Raises:
        ValueError: they are not integers from 0 on, or not one for each picture.
    """
    numbers = [] if given is None else getattr(given, "tolist", lambda: given)()
    numbers = [numbers] if isinstance(numbers, int) else list(numbers)
    try:
        numbers = [integer(number) for number in numbers] or list(range(count))
    except TypeError:
        raise ValueError(
            f"The latent's batch_index is {str(given)[:80]}; expected one integer for each "
            "picture. Use another node in place of the one that wrote it."
        ) from None
    if min(numbers, default=0) < 0:
        raise ValueError(
            f"The latent's batch_index has {min(numbers)}; expected numbers of pictures, from 0 on."
        )
    if len(numbers) != count:
        raise ValueError(
            f"The latent's batch_index has {len(numbers)} numbers for {count} pictures; expected "
            "one for each. An earlier node changed the batch but kept the old numbers; leave that "
            "node out, or put it after the sampling."
        )
    return numbers


def picture_noise(
    like: torch.Tensor,
    seed: int | Sequence[int],
    batch_index: Sequence[int] | None = None,
    device: str = "cpu",
) -> Callable[[int], torch.Tensor]:
    """A function that gives the standard normal noise of a step, in like's shape, dtype and device.

    Args:
        like: [B, ...].
        seed: of all pictures, or B seeds.
        batch_index: the B numbers of the pictures; None means 0..B-1.
        device: where the noise is drawn. "cpu" gives the same noise on every machine; "gpu" means
            like's device, and other devices give other noise.

    Raises:
        ValueError: device is neither, or "gpu" is a device that cannot draw noise.
    """
    if device not in ("cpu", "gpu"):
        raise ValueError(f"The noise device must be cpu or gpu, found {device!r}.")
    where = torch.device("cpu") if device == "cpu" else like.device
    indices = range(len(like)) if batch_index is None else batch_index
    seeds = [seed] * len(like) if isinstance(seed, int) else seed
    try:
        generator = torch.Generator(device=where)
    except RuntimeError:  # as on DirectML
        raise ValueError(
            f"PyTorch cannot draw noise on the device {where}. Set noise_device to cpu."
        ) from None

    def draw(step: int) -> torch.Tensor:
        noise = torch.empty(like.shape, dtype=torch.float32, device=where)
        for picture, own_seed, index in zip(noise, seeds, indices, strict=True):
            picture.normal_(generator=generator.manual_seed(picture_seed(own_seed, index, step)))
        # The cast comes after the copy, because a cast on the CPU would leave the pinned memory.
        return sent(noise, like.device).to(like.dtype)

    return draw
