"""The timesteps of a few-step run (LCM, arXiv 2310.04378, algorithm 3, section 4.3)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence


def of_family(
    steps: int,
    strength: float,
    origin_steps: int | None,
    single: int | None,
    T: int = 1000,  # noqa: N803
) -> list[int]:
    """The timesteps of a family, descending. families.py has the settings of each.

    Args:
        origin_steps: the points of the grid that the family was distilled on; None spreads the
            steps over all T timesteps.
        single: the timestep of a run of one step, if the family has a special one.

    Raises:
        ValueError: there are fewer timesteps than `steps`.
    """
    if steps == 1 and single is not None:
        return [min(single, trailing(1, strength, T)[0])]
    if origin_steps is not None:
        return timesteps(steps, strength, origin_steps, T)
    return trailing(steps, strength, T)


def grid(origin_steps: int = 50, strength: float = 1.0, T: int = 1000) -> list[int]:  # noqa: N803
    """The timesteps the model was distilled on, ascending: 19, 39, ..., 999 for 50 of 1000.

    strength in (0, 1]: image to image uses only the int(origin_steps * strength) points at the
    clean end. A low strength may leave none.

    Raises:
        ValueError: origin_steps or strength is out of range.
    """
    if not 1 <= origin_steps <= T:
        raise ValueError(
            f"origin_steps is the number of grid points the model was distilled on: expected 1 to "
            f"{T}, found {origin_steps}. Use 50 for LCM-LoRAs."
        )
    _check_strength(strength)
    skip = T // origin_steps
    return [i * skip - 1 for i in range(1, int(origin_steps * strength) + 1)]


def timesteps(
    steps: int,
    strength: float = 1.0,
    origin_steps: int = 50,
    T: int = 1000,  # noqa: N803
) -> list[int]:
    """`steps` timesteps, descending, spread evenly over the kept grid: 999, 759, 499, 259 for 4.

    These are the timesteps of diffusers' LCMScheduler.

    Raises:
        ValueError: the kept grid has fewer points than `steps`.
    """
    _check_steps(steps)
    kept = grid(origin_steps, strength, T)[::-1]
    if steps > len(kept):
        raise ValueError(
            f"{steps} steps do not fit: at strength {strength:g} only {len(kept)} of the "
            f"{origin_steps} grid points are left. {_remedy(steps, origin_steps, len(kept))}"
        )
    # Multiplied first and then floored, as numpy's linspace does, to get the same points.
    stride = len(kept) / steps
    return [kept[math.floor(i * stride)] for i in range(steps)]


def trailing(steps: int, strength: float = 1.0, T: int = 1000) -> list[int]:  # noqa: N803
    """`steps` timesteps, descending, each the last of an equal part: 999, 749, 499, 249 for 4.

    This is the spacing "trailing" of diffusers' DDIM and Euler schedulers (arXiv 2305.08891, table
    2). At a strength below 1 it divides only the lower round(T * strength) timesteps, so 0.6 starts
    at 599.

    Raises:
        ValueError: fewer than `steps` timesteps are left.
    """
    _check_steps(steps)
    _check_strength(strength)
    kept = round(T * strength)
    if steps > kept:
        raise ValueError(
            f"{steps} steps do not fit: at strength {strength:g} only {kept} of the {T} timesteps "
            f"are left. Use fewer steps or a strength (denoise) of at least {steps / T:g}."
        )
    # Rounded as numpy's arange does, to get the same points when a part ends on a half.
    stride = kept - (kept - kept / steps)
    return [round(kept - i * stride) - 1 for i in range(steps)]


def times(steps: int, strength: float = 1.0, origin_steps: int | None = None) -> list[float]:
    """`steps` times of a flow model, descending from `strength`: 1, 0.75, 0.5, 0.25 for 4.

    ComfyUI's scheduler `simple` and diffusers' pipelines start from these times; the model then
    shifts them. origin_steps: the number of grid points to choose from, with the gaps of
    `timesteps`; None divides the range into equal parts.

    Raises:
        ValueError: the kept grid has fewer points than `steps`.
    """
    _check_steps(steps)
    _check_strength(strength)
    if origin_steps is not None:
        chosen = timesteps(steps, strength, origin_steps, origin_steps)
        return [(t + 1) / origin_steps for t in chosen]
    return [strength * (1 - i / steps) for i in range(steps)]


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, found {steps}.")


def _check_strength(strength: float) -> None:
    if not 0 < strength <= 1:
        raise ValueError(
            f"strength (denoise) must be above 0 and at most 1, found {strength:g}. "
            "1 starts from pure noise, 0.5 keeps about half of the picture."
        )


def _remedy(steps: int, origin_steps: int, room: int) -> str:
    """A sentence with what to change so that the steps fit the grid."""
    if steps > origin_steps:
        return f"Use at most {origin_steps} steps, at strength 1."
    percent = math.ceil(100 * steps / origin_steps)
    while int(origin_steps * (percent / 100)) < steps:  # 0.58 * 50 is 28.999... in binary
        percent += 1
    fewer = f"at most {room} steps or " if room else ""
    return f"Use {fewer}a strength (denoise) of at least {percent / 100:g}."


def parse_sigmas(text: str) -> list[float]:
    """A user's own list for a flow model, "1, 0.9, 0.75, 0.5": strictly descending, from at most 1.
    A 0 at the end may be there or not.

    Raises:
        ValueError: an entry is wrong; the message names the first.
    """
    example = 'Expected a descending list of sigmas such as "1, 0.9, 0.75, 0.5".'
    numbers: list[float] = []
    for word in _words(text):
        try:
            sigma = float(word)
        except ValueError:
            raise ValueError(f"Sigmas must be numbers, found {word!r}. {example}") from None
        if not 0 <= sigma <= 1:
            raise ValueError(
                f"A flow model's sigmas go from 1 down to 0, found {word}; timesteps from 999 down "
                f"are for Stable Diffusion. {example}"
            )
        if numbers and sigma >= numbers[-1]:
            raise ValueError(f"Sigmas must descend, found {word} after {numbers[-1]:g}. {example}")
        numbers.append(sigma)
    if not any(numbers):
        raise ValueError(f"The list has no sigma above 0. {example}")
    return numbers if numbers[-1] else numbers[:-1]


def refuse_ascent(sigmas: Sequence[float]) -> None:
    """Raises ValueError if a list of sigmas ascends, which no sampling run does."""
    for before, after in zip(sigmas, sigmas[1:], strict=False):
        if after > before:
            raise ValueError(
                f"A run goes from noise to the picture, so sigmas must descend; these SIGMAS have "
                f"{after:g} after {before:g}. Take them from LCM Schedule, or reverse them."
            )


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[\s,;]+", text) if word]


def parse(text: str, T: int = 1000) -> list[int]:  # noqa: N803
    """A user's own list, "999, 759, 499, 259": whole numbers from T - 1 to 0, strictly descending.

    Commas, semicolons and white space separate the numbers.

    Raises:
        ValueError: an entry is wrong; the message names the first.
    """
    example = 'Expected a descending list such as "999, 759, 499, 259".'
    words = _words(text)
    if not words:
        raise ValueError(f"The list of timesteps is empty. {example}")
    numbers: list[int] = []
    for word in words:
        if not re.fullmatch(r"\d+", word):
            raise ValueError(f"Timesteps must be whole numbers, found {word!r}. {example}")
        t = int(word)
        if t >= T:
            raise ValueError(f"Timesteps go from {T - 1} down to 0, found {t}. {example}")
        if numbers and t >= numbers[-1]:
            raise ValueError(f"Timesteps must descend, found {t} after {numbers[-1]}. {example}")
        numbers.append(t)
    return numbers
