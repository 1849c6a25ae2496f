"""The best weights at which a style shows as much as the user wants."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .find import NEAR, TRIES, Point, Search
from .surface import Array, Surface, minimizer, terms

REACH = 0.4  # distance from measured weights within which the models are trusted
SLACK = 0.005  # tolerance for a share, less than anyone sees


def at_least(
    run: Search, share: Callable[[Point], float], wanted: float, watch: Callable[[Point], None]
) -> Point:
    """The point with the lowest J among those with at least the share `wanted`; if there is none,
    the point with the largest share. May measure up to TRIES more points, within the budget.

    share(point): the share of the styles' effect that shows at a point. watch(point) is called
    after each new measurement.
    """
    shares = [share(point) for point in run.points]
    for _ in range(TRIES):
        if len(run.points) >= run.budget:
            break
        best = _best(run.points, shares, wanted)
        there = _lowest(run, run.surface(best.weights), np.array(shares), wanted, best.weights)
        if min(np.abs(there - point.weights).max() for point in run.points) < NEAR:
            break
        point = run.measured(there)
        watch(point)
        shares.append(share(point))
    return _best(run.points, shares, wanted)


def _best(points: list[Point], shares: list[float], wanted: float) -> Point:
    enough = [p for p, s in zip(points, shares, strict=True) if s >= wanted - SLACK]
    if enough:
        return min(enough, key=lambda point: point.j)
    return max(zip(points, shares, strict=True), key=lambda pair: pair[1])[0]


def _lowest(run: Search, surface: Surface, shares: Array, wanted: float, centre: Array) -> Array:
    """The weights within REACH at which the model of J is lowest and the model of the share reaches
    `wanted`; if it reaches that nowhere, the weights with the largest share."""
    low, high = np.maximum(run.low, centre - REACH), np.minimum(run.high, centre + REACH)
    bounds = list(zip(low, high, strict=True))
    fitted = surface.solve @ shares

    def shown(weights: Array) -> float:
        return float(terms((weights - surface.centre)[None], surface.order)[0] @ fitted)

    minimize = minimizer()
    options = {"ftol": 1e-10, "maxiter": 200}
    enough = {"type": "ineq", "fun": lambda weights: shown(weights) - wanted}
    lowest = minimize(
        surface, centre, method="SLSQP", bounds=bounds, constraints=[enough], options=options
    )
    if not lowest.success or shown(lowest.x) < wanted - SLACK:
        lowest = minimize(lambda weights: -shown(weights), centre, method="L-BFGS-B", bounds=bounds)
    return np.clip(lowest.x, low, high)
