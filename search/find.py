"""The search itself: where to measure next, and which of the equally good weights to take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from .objective import Residuals
from .surface import Array, Region, Surface

EQUAL = 0.02  # relative rise of J that nobody can see
SMALL = 5e-5  # of J, which is 2 at the default: below this, weights count as exact
SAME = 1e-3  # of J: the model's own error, when a measurement is compared with its prediction
REACH, POLISH = 0.25, 0.08  # distance of the first points from the default, and around a minimum
NEAR = 0.004  # a shorter step changes nothing
WORTH = 1e-3  # a measurement pays if the model promises to lower J by this share
TRIES = 4  # measurements to find the region's point nearest to the default
RADIUS = 0.6  # the longest first step

Measure = Callable[[Array], Residuals]


@dataclass
class Point:
    """Weights, and what was measured there. J is d_path + d_spec, each 1 at the default."""

    weights: Array
    residuals: Residuals
    d_path: float
    d_spec: float

    @property
    def j(self) -> float:
        return self.d_path + self.d_spec


@dataclass
class Found:
    """The result of a search.

    Attributes:
        points: all measured points, in order; the first is the default.
        best: the point with the lowest J.
        region: the weights at which J is nearly as low.
        taken: the region's point nearest to the default.
        stopped: whether the user interrupted the search.
        tied: pairs of weights whose sum alone matters.
    """

    points: list[Point]
    best: Point
    region: Region
    taken: Point
    stopped: bool = False
    tied: list[tuple[int, int]] = field(default_factory=list)

    @property
    def default(self) -> Point:
        return self.points[0]


class Search:
    """One search. `steps` yields after each measurement, so that the caller can stop there."""

    def __init__(
        self, measure: Measure, default: Sequence[float], low: float, high: float, budget: int
    ) -> None:
        self.measure, self.budget = measure, budget
        self.default = np.asarray(default, np.float64)
        self.low, self.high = np.full_like(self.default, low), np.full_like(self.default, high)
        self.points: list[Point] = []
        self.gram = np.zeros((0, 0))

    def steps(self) -> Iterator[Point]:
        """Measures, point by point, until the minimum is found or the budget is spent."""
        for weights in self._design():
            if len(self.points) >= self.budget:
                return
            yield self.measured(weights)
        radius, polished = RADIUS, False
        while len(self.points) < self.budget:
            best = self.best
            low = np.maximum(self.low, best.weights - radius)
            high = np.minimum(self.high, best.weights + radius)
            if best.j < SMALL / 100:
                return
            surface = self.surface(best.weights)
            lowest = sorted(self.points, key=lambda point: point.j)[:3]
            there = surface.lowest([p.weights for p in lowest], low, high)
            step = float(np.abs(there - best.weights).max())
            gain = best.j - surface(there)
            if step < NEAR or radius < NEAR or gain < WORTH * best.j:
                if polished:
                    return
                polished, radius = True, 4 * POLISH
                for weights in self._around(best.weights, POLISH):
                    if len(self.points) < self.budget:
                        yield self.measured(weights)
                continue
            point = self.measured(there)
            if best.j - point.j < 0.25 * gain:
                radius = step / 2
            yield point

    @property
    def best(self) -> Point:
        return min(self.points, key=lambda point: point.j)

    def surface(self, centre: Array) -> Surface:
        return Surface([point.weights for point in self.points], self.gram, centre)

    def found(self, stopped: bool = False) -> Found:
        """The result so far. If the search was not stopped, this may measure a few more points."""
        region, taken = self._region(), self.best
        # With fewer points the curvature is unknown.
        if not stopped and len(self.points) > 2 * len(self.default):
            for _ in range(TRIES):
                flat = self._flattened(region)
                weights = flat.nearest(self.default)
                if np.abs(weights - self.best.weights).max() < NEAR:
                    region, taken = flat, self.best
                    break
                if len(self.points) >= self.budget:
                    break
                point = self.measured(weights)
                if self._is_equal(point):
                    region, taken = flat, point
                    break
                region = self._region()  # the model knows this point now
        return Found(self.points, self.best, region, taken, stopped, self._tied(region))

    def _region(self) -> Region:
        best = self.best.weights
        curvature = self.surface(best).curvature(best)
        return Region(best, curvature, self._rise, self.low, self.high)

    @property
    def _rise(self) -> float:
        return max(EQUAL * self.best.j, SMALL)

    def _is_equal(self, point: Point) -> bool:
        """Whether a point is in the region, up to the errors of the model."""
        return point.j <= self.best.j + 2 * self._rise + SAME

    def _flattened(self, region: Region) -> Region:
        """The region, extended to the full range along axes on which J does not change. Along such
        an axis the model bends only by its own small errors. If the default lies far away along an
        axis, the caller will measure in that direction; otherwise this measures it."""
        for axis in region.flattest():
            far = float(axis @ (self.default - region.centre))
            if abs(far) < 2 * POLISH:
                for way in (2 * POLISH, -2 * POLISH):
                    there = region.centre + way * axis
                    if ((self.low <= there) & (there <= self.high)).all():
                        break
                else:
                    continue
                if len(self.points) >= self.budget or not self._is_equal(self.measured(there)):
                    continue
            region = region.without(axis)
        return region

    def _design(self) -> Iterator[Array]:
        """The default, two points beside it for each weight, and one for each pair."""
        yield self.default
        yield from self._around(self.default, REACH)
        for i, j in combinations(range(len(self.default)), 2):
            point = self.default.copy()
            for k in (i, j):
                point[k] += REACH if point[k] + REACH <= self.high[k] else -REACH
            yield np.clip(point, self.low, self.high)

    def _around(self, centre: Array, reach: float) -> Iterator[Array]:
        for i in range(len(centre)):
            for sign in (-1, 1):
                point = centre.copy()
                point[i] += sign * reach
                if not self.low[i] <= point[i] <= self.high[i]:
                    point[i] = centre[i] - 2 * sign * reach  # twice as far on the other side
                yield np.clip(point, self.low, self.high)

    def measured(self, weights: Array) -> Point:
        """Measures, and adds the inner products with all earlier points to `gram`."""
        residuals = self.measure(weights)
        first = self.points[0].residuals if self.points else residuals
        scales = [max(scale, 1e-12) for scale in (first.d_path, first.d_spec)]
        values = residuals.d_path / scales[0], residuals.d_spec / scales[1]
        self.points.append(Point(weights, residuals, *values))
        row = [
            _inner(residuals.path, point.residuals.path) / len(residuals.path) / scales[0]
            + _inner(residuals.spectrum, point.residuals.spectrum) / scales[1]
            for point in self.points
        ]
        gram = np.zeros((len(row), len(row)))
        gram[:-1, :-1] = self.gram
        gram[-1, :] = gram[:, -1] = row
        self.gram = gram
        return self.points[-1]

    def _tied(self, region: Region) -> list[tuple[int, int]]:
        """Pairs of weights whose sum alone matters."""
        pairs = []
        for i, j in combinations(range(len(self.default)), 2):
            apart = np.zeros(len(self.default))
            apart[i], apart[j] = 0.5**0.5, -(0.5**0.5)
            together = np.abs(apart)
            if region.width(apart) > max(0.1, 4 * region.width(together)):
                pairs.append((i, j))
        return pairs


def _inner(a: Tensor, b: Tensor) -> float:
    return float(torch.sum(a.double() * b.double()))
