"""A model of the objective between the points where it was measured.

Each value of the residuals is modelled as a quadratic of the weights. J is a sum of their squares,
so its model needs the inner products of the residuals only, and follows J much further than a
quadratic of J itself (as in POUNDERS and DFO-LS, arXiv 1804.00154).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FLAT = 0.01  # an axis is flat if its curvature is below this share of the largest
KEEP = 1e-4  # of J at distance 1: a small pull to the centre where J does not change


def terms(x: Array, order: int) -> Array:
    """The terms of a polynomial at points x [n, d]: 1, x_i, then x_i^2 from order 2 (no products)
    and x_i x_j from order 3."""
    columns = [np.ones((len(x), 1)), x]
    if order >= 2:
        columns.append(x**2)
    if order >= 3:
        pairs = list(combinations(range(x.shape[1]), 2))
        columns.append(np.stack([x[:, i] * x[:, j] for i, j in pairs], 1).reshape(len(x), -1))
    return np.concatenate(columns, 1)


class Surface:
    """The model of J near a centre."""

    def __init__(self, points: Sequence[Array], gram: Array, centre: Array) -> None:
        """gram: the inner products of the residuals at the points, [n, n]."""
        self.points, self.gram, self.centre = np.stack(points), gram, centre
        count, d = self.points.shape
        sizes = {order: terms(self.points[:1], order).shape[1] for order in (1, 2, 3)}
        self.order = max((o for o, size in sizes.items() if size <= count), default=1)
        offsets = self.points - centre
        # Near points count more: the residuals are no exact quadratics.
        distance = (offsets**2).sum(1)
        weight = (distance + max(1e-4, np.sort(distance)[min(d, count - 1)] / 4)) ** -2
        rows = terms(offsets, self.order)
        # coefficients = solve @ residuals, by weighted least squares
        root = np.sqrt(weight)[:, None]
        self.solve = np.linalg.pinv(rows * root, rcond=1e-10) * root.T
        self.quadratic = self.solve @ gram @ self.solve.T

    def __call__(self, weights: Array) -> float:
        at = terms((weights - self.centre)[None], self.order)[0]
        return float(at @ self.quadratic @ at)

    def lowest(self, starts: Sequence[Array], low: Array, high: Array) -> Array:
        """The lowest point of the model between low and high; near the centre if it is flat."""
        minimize = minimizer()
        best = starts[0]
        bounds = list(zip(low, high, strict=True))
        pull = KEEP * max(self(self.centre), 0.0)

        def pulled(weights: Array) -> float:
            return self(weights) + pull * float(((weights - self.centre) ** 2).sum())

        for start in starts:
            found = minimize(
                pulled, np.clip(start, low, high), method="L-BFGS-B", bounds=bounds,
                options={"ftol": 1e-14, "gtol": 1e-9},
            )  # fmt: skip
            if found.fun < pulled(best):
                best = np.clip(found.x, low, high)
        return best

    def curvature(self, at: Array, step: float = 0.02) -> Array:
        """The second derivatives of the model, [d, d]."""
        d = len(at)
        hessian, unit = np.zeros((d, d)), np.eye(d) * step
        for i in range(d):
            for j in range(i, d):
                corners = [
                    sign * self(at + a * unit[i] + b * unit[j])
                    for a, b, sign in ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1))
                ]
                hessian[i, j] = hessian[j, i] = sum(corners) / (4 * step**2)
        return hessian


def minimizer() -> Callable[..., Any]:
    """`scipy.optimize.minimize`. Raises ValueError if SciPy is missing."""
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise ValueError(
            f"The search needs SciPy, which ComfyUI's requirements install, but it cannot be "
            f"loaded ({error}). Install it with `pip install scipy` in ComfyUI's environment."
        ) from None
    return minimize


class Region:
    """The weights around a minimum at which J rises by no more than `rise`: an ellipsoid."""

    def __init__(self, centre: Array, curvature: Array, rise: float, low: Array, high: Array):
        self.centre, self.rise, self.low, self.high = centre, rise, low, high
        self.curvature = curvature
        values, self.axes = np.linalg.eigh(curvature)
        longest = float(np.linalg.norm(high - low))
        # Limited to the whole range, because a flat axis would be infinitely long.
        least = 2 * rise / longest**2
        self.values = np.where(values > least, values, 0.0)
        self.lengths = np.sqrt(2 * rise / np.maximum(values, least))

    def flattest(self) -> list[Array]:
        """The axes along which J bends so little, compared with the others, that it may be flat."""
        return [
            axis
            for value, axis in zip(self.values, self.axes.T, strict=True)
            if value < FLAT * self.values.max()
        ]

    def without(self, axis: Array) -> Region:
        """The region if J does not bend along an axis."""
        flat = np.eye(len(axis)) - np.outer(axis, axis)
        bent = flat @ self.curvature @ flat
        return Region(self.centre, bent, self.rise, self.low, self.high)

    def ranges(self) -> list[tuple[float, float]]:
        """The lowest and the highest value of each weight within the region."""
        half = np.sqrt(((self.axes * self.lengths) ** 2).sum(1))
        least = np.clip(self.centre - half, self.low, self.high)
        most = np.clip(self.centre + half, self.low, self.high)
        return [(float(a), float(b)) for a, b in zip(least, most, strict=True)]

    def width(self, direction: Array) -> float:
        """Half of the region's extent along a direction of length 1."""
        return float(np.sqrt(((self.axes.T @ direction * self.lengths) ** 2).sum()))

    def nearest(self, point: Array) -> Array:
        """The point of the region that is nearest to another."""
        c = self.axes.T @ (point - self.centre)

        def excess(multiplier: float) -> float:
            inside = c / (1 + multiplier * self.values)
            return float((self.values * inside**2).sum() / 2 - self.rise)

        if excess(0.0) <= 0:
            return np.clip(point, self.low, self.high)
        lower, upper = 0.0, 1.0
        while excess(upper) > 0:
            upper *= 4
        for _ in range(100):
            middle = (lower + upper) / 2
            lower, upper = (middle, upper) if excess(middle) > 0 else (lower, middle)
        nearest = self.centre + self.axes @ (c / (1 + upper * self.values))
        return np.clip(nearest, self.low, self.high)
