"""A whole search: reference, search, check on held-out pictures, and the pictures to show."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..lora.formats.searched import SEARCH
from .find import Found, Point, Search
from .host import Measured, Part, Reference, Studio, interrupted, kept
from .objective import statistics, style_shown
from .strength import SLACK, at_least
from .surface import Array, minimizer

PICTURES, MOST_BUDGET = 16, 200
TINY = 1e-12
SHOWN = 4  # pictures of each row of the sheet


@dataclass(frozen=True)
class Order:
    """What to search for.

    Attributes:
        names: of the acceleration and of the styles.
        prompts: one for each picture to search on.
        held_out: the prompts of the check at the end.
        default: the weights to begin with, and to keep if no others are better.
        low, high: the range of all weights.
        budget: the most sets of weights to measure.
        shown: the least share of the styles' effect that must show; 0 sets no limit.
    """

    names: tuple[str, ...]
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    default: tuple[float, ...]
    low: float
    high: float
    budget: int
    shown: float = 0.0

    def __post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(
                f"The range of the weights goes from {self.low:g} to {self.high:g}; expected a "
                "lower number first and a higher one after it, such as 0 and 1.5."
            )
        outside = [weight for weight in self.default if not self.low <= weight <= self.high]
        if outside:
            raise ValueError(
                f"The search begins at the weight {outside[0]:g}, which is outside the range from "
                f"{self.low:g} to {self.high:g}. Widen the range, or change that weight."
            )
        least = 2 * len(self.default) + 2
        if not least <= self.budget <= MOST_BUDGET:
            raise ValueError(
                f"The budget is {self.budget}; for {len(self.default)} weights it must be between "
                f"{least} and {MOST_BUDGET} measurements. 40 is usual."
            )


def split(
    text: str, usual: Sequence[str], pictures: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The prompts to search on and the held-out ones, from a text with one prompt per line.

    usual: the prompts to use if the text is empty.

    Raises:
        ValueError: there is only one prompt, or pictures is less than 1.
    """
    if pictures < 1:
        raise ValueError(f"pictures is {pictures}; expected 1 or more. {PICTURES} are usual.")
    lines = [line.strip() for line in text.splitlines()]
    prompts = list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    if text.strip() and not prompts:
        raise ValueError(
            "The list of prompts has no prompt in it: lines that begin with # are left out. Write "
            "one prompt on each line, or leave the list empty for the prompts of this pack."
        )
    prompts = prompts or list(usual)
    if len(prompts) < 2:
        raise ValueError(
            f"There is only one prompt ({prompts[0][:60]!r}). Write at least 2, because the search "
            "checks its result on a prompt that it did not search on."
        )
    beside = max(1, (pictures + 1) // 2)
    # Every third prompt is held out. With too few prompts, `_spread` repeats them.
    held = prompts[1::3]
    searched = [prompt for prompt in prompts if prompt not in held]
    return _spread(searched, pictures), _spread(held, beside)


def _spread(prompts: Sequence[str], count: int) -> tuple[str, ...]:
    """`count` prompts spread over a list; repeats them if there are too few."""
    if count <= len(prompts):
        return tuple(prompts[i * len(prompts) // count] for i in range(count))
    return tuple(prompts[i % len(prompts)] for i in range(count))


@dataclass(frozen=True)
class Outcome:
    """The outcome of a search.

    Attributes:
        weights: the result: the weights taken, or the default if it is better on held-out pictures.
        held_out: J on held-out pictures at the weights taken; the default has 2. None without the
            check.
        shown: the share of the styles' effect that few steps show, at the default and at the
            result; None if it is unknown.
        rows: latents of pictures of held-out prompts, by their titles.
    """

    found: Found
    weights: tuple[float, ...]
    held_out: float | None
    shown: tuple[float, float] | None
    rows: dict[str, Tensor]

    @property
    def is_default(self) -> bool:
        return self.weights == tuple(map(float, self.found.default.weights))


def calls(order: Order, steps: int, reference_steps: int) -> int:
    """The most network calls of one picture that a search makes."""
    searched, held = len(order.prompts), len(order.held_out)
    # With `shown`, also the bare model, and each set of weights without the styles.
    references, drawings = (2, 3) if order.shown else (1, 2)
    return (references * searched + 2 * held) * reference_steps + steps * (
        drawings * searched * order.budget + 8 * held
    )


def search(studio: Studio, order: Order, watch: Callable[[Point, int], None]) -> Outcome:
    """Runs a search. If the user interrupts it, it returns the best weights so far. During the
    reference and the first measurement, an interruption is raised instead; during the check and the
    final pictures, it ends only those.

    watch(point, number) is called after each measurement.
    """
    minimizer()  # before the reference, which takes long
    parts = studio.parts(order.prompts, 0)
    beside = studio.parts(order.held_out, len(order.prompts))

    def key(prompts: Sequence[str]) -> str:
        return json.dumps([list(order.prompts), prompts])

    styled = kept(studio, key(order.prompts), lambda: studio.reference(parts))
    checked = kept(studio, key(order.held_out), lambda: studio.reference(beside))
    run = Search(
        Measured(studio, parts, styled), order.default, order.low, order.high, order.budget
    )
    share = None
    if order.shown:  # before the search, because Share may raise
        plain = kept(studio, "plain" + key(order.prompts), lambda: studio.reference(parts, False))
        share = Share(studio, parts, styled, plain)
    stopped, number, is_enough = False, 0, True
    try:
        for number, point in enumerate(run.steps(), 1):
            watch(point, number)
        found = run.found()
        if share is not None:
            found.taken = at_least(
                run, share, order.shown, lambda point: watch(point, len(run.points))
            )
            is_enough = share(found.default) >= order.shown - SLACK
    except interrupted():
        if not number:
            raise
        stopped, found = True, run.found(stopped=True)
    taken, default = _plain(found.taken.weights), tuple(map(float, found.default.weights))
    if taken == _plain(found.default.weights):
        taken = default
    held_out, shown, weights = None, None, taken
    rows = {f"{studio.settings.reference_steps} steps, styles alone": checked.latents[:SHOWN]}
    try:
        if not stopped and taken != default:
            check = Measured(studio, beside, checked)
            first, second = check(default), check(taken)
            held_out = second.d_path / max(first.d_path, TINY)
            held_out += second.d_spec / max(first.d_spec, TINY)
            if held_out >= 2 and is_enough:
                weights = default
        few = studio.parts(order.held_out[:SHOWN], len(order.prompts))
        for title, at in {"default": default, "found": taken, **_edges(found)}.items():
            numbers = " + ".join(f"{weight:.2f}" for weight in at)
            rows[f"{title}: {numbers}"] = studio.draw(at, few)
        if not stopped:
            plain = kept(
                studio, "plain" + key(order.held_out), lambda: studio.reference(beside, False)
            )
            shown = _shown(studio, beside, (default, weights), checked, plain)
    except interrupted():
        found.stopped = True
    return Outcome(found, weights, held_out, shown, rows)


class Share:
    """The share of the styles' effect that shows at a point of the search; 1 is their effect alone,
    in many steps. Raises ValueError if they have no effect there.
    """

    def __init__(
        self, studio: Studio, parts: Sequence[Part], styled: Reference, plain: Reference
    ) -> None:
        self.studio, self.parts = studio, parts
        self.effect = statistics(styled.latents), statistics(plain.latents)
        self._without: dict[float, Tensor] = {}
        if style_shown(*self.effect, *self.effect) is None:
            raise ValueError(
                "style_at_least is set, but even in many steps the styles change neither colours "
                "nor spectrum, so how much of them shows cannot be measured. Set it to 0."
            )

    def __call__(self, point: Point) -> float:
        fast, *styles = map(float, point.weights)
        if fast not in self._without:
            bare = self.studio.draw((fast, *[0.0] * len(styles)), self.parts)
            self._without[fast] = statistics(bare)
        share = style_shown(point.residuals.shown, self._without[fast], *self.effect)
        assert share is not None  # it depends on the effect alone
        return share


def _shown(
    studio: Studio, parts: Sequence[Part], weights: Sequence[tuple[float, ...]], styled: Reference,
    plain: Reference,
) -> tuple[float, float] | None:  # fmt: skip
    """The share of the styles' effect that few steps show, at two sets of weights."""
    effect, shares = (statistics(styled.latents), statistics(plain.latents)), []
    for at in weights:
        without = statistics(studio.draw((at[0], *[0.0] * (len(at) - 1)), parts))
        shares.append(style_shown(statistics(studio.draw(at, parts)), without, *effect))
    first, second = shares
    return None if first is None or second is None else (first, second)


def _plain(weights: Array) -> tuple[float, ...]:
    """The weights as a user can type them: two decimals."""
    return tuple(round(float(weight), 2) for weight in np.asarray(weights))


def _edges(found: Found) -> dict[str, tuple[float, ...]]:
    """The two ends of the region along the direction in which it is longest."""
    region = found.region
    axis = region.axes[:, 0] * region.lengths[0]
    ends = (np.clip(region.centre + sign * axis, region.low, region.high) for sign in (-1, 1))
    return {f"edge {number}": _plain(end) for number, end in enumerate(ends, 1)}


def figures(outcome: Outcome, order: Order, studio: Studio) -> dict[str, str]:
    """The figures of a search for the metadata of a combined file."""
    settings = studio.settings
    prompts = hashlib.sha256("\n".join((*order.prompts, *order.held_out)).encode()).hexdigest()
    values = {
        "weights": list(zip(order.names, outcome.weights, strict=True)),  # names may be equal
        "steps": settings.steps, "cfg": settings.cfg, "seed": settings.seed,
        "prompts": len({*order.prompts, *order.held_out}), "prompts_sha256": prompts,
        "reference": {
            "steps": settings.reference_steps, "guidance": settings.guidance,
            "strengths": settings.strengths,
        },
        "measured": len(outcome.found.points),
        "better_on_held_out": _better(outcome),
        "style_shown": outcome.shown and round(outcome.shown[1], 3),
        "style_at_least": order.shown,
    }  # fmt: skip
    return {SEARCH: json.dumps(values)}


def _better(outcome: Outcome) -> float | None:
    """By which share J is lower than at the default, on held-out pictures; 0 for the default."""
    if outcome.held_out is None:
        return None
    return 0.0 if outcome.is_default else round(1 - outcome.held_out / 2, 3)
