"""A search finds weights that are known, says what it cannot know, and ends in time."""

import numpy as np
import pytest
import torch
from lcm_lora.search.find import Point, Search
from lcm_lora.search.objective import statistics, style_shown
from lcm_lora.search.strength import at_least
from lcm_lora.tests.unit.planted import Process

SEEDS = range(5)
PAPER = (1.0, 0.8)


def run(measure, default=PAPER, low=0.0, high=2.0, budget=40):
    search = Search(measure, default, low, high, budget)
    list(search.steps())
    assert len(search.points) <= budget
    return search.found()


@pytest.mark.parametrize("seed", SEEDS)
def test_it_finds_the_weights_that_made_the_targets(seed):
    goal = np.random.default_rng(seed).uniform(0.3, 1.3, 2)
    found = run(Process(seed).against(goal))
    assert np.abs(found.best.weights - goal).max() < 0.01
    assert np.abs(found.taken.weights - goal).max() < 0.01
    assert found.best.j < 1e-3 < found.default.j


@pytest.mark.parametrize("seed", SEEDS)
def test_if_a_file_is_scaled_its_weight_moves_the_other_way(seed):
    """The same changes in files of other scales: the optimum is where it was, divided by them."""
    process = Process(seed)
    scales = 1.25, 0.8
    plain = run(process.against((1.1, 0.9), blurred=True))
    scaled = Process(seed)
    scaled.changes = [scale * d for scale, d in zip(scales, process.changes, strict=True)]
    default = np.divide(PAPER, scales)  # in whose units J is
    moved = run(scaled.against((1.1 / scales[0], 0.9 / scales[1]), blurred=True), default)
    assert moved.best.weights * scales == pytest.approx(plain.best.weights, abs=0.015)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_style_takes_of_the_acceleration_is_given_back(seed):
    process = Process(seed)
    fast, style = process.changes
    process.changes = [fast, style - 0.3 * fast]
    goal = np.array([0.9, 0.7])
    aim = process.against((0.9 + 0.3 * 0.7, 0.7))  # the acceleration gives what the style takes
    found = run(aim)
    assert found.best.weights == pytest.approx((goal[0] + 0.3 * goal[1], goal[1]), abs=0.01)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_style_of_zeros_keeps_its_default(seed):
    process = Process(seed)
    process.changes[1] = torch.zeros_like(process.changes[1])
    found = run(process.against((1.2, 0.3), blurred=True))
    assert found.taken.weights[1] == pytest.approx(PAPER[1], abs=0.005)
    least, most = found.region.ranges()[1]
    assert least == 0 and most == 2


@pytest.mark.parametrize("seed", SEEDS)
def test_of_two_halves_of_a_style_only_the_sum_is_known(seed):
    process = Process(seed, 3)
    process.changes[2] = process.changes[1]
    found = run(process.against((1.1, 0.6, 0.7)), (1.0, 0.8, 0.8))
    assert found.tied == [(1, 2)]
    weights = found.taken.weights
    assert weights[0] == pytest.approx(1.1, abs=0.01)
    assert weights[1] + weights[2] == pytest.approx(1.3, abs=0.01)
    assert weights[1] == pytest.approx(weights[2], abs=0.02), "nearest to the default"


def test_taken_is_as_good_as_the_best_and_nearer_to_the_default():
    found = run(Process(7).against((1.2, 1.2), blurred=True))
    assert found.taken.j < 1.04 * found.best.j
    away = [np.linalg.norm(point.weights - PAPER) for point in (found.taken, found.best)]
    assert away[0] < away[1]


def test_a_default_that_is_best_stays():
    assert run(Process(3).against(PAPER)).taken.weights == pytest.approx(PAPER, abs=1e-6)


def test_an_optimum_outside_of_the_range_is_found_at_its_edge():
    found = run(Process(2).against((1.4, 0.7)), high=1.1)
    assert found.best.weights[0] == pytest.approx(1.1)
    assert all(0 <= w <= 1.1 for point in found.points for w in point.weights)


def test_a_search_that_is_stopped_knows_its_best():
    search = Search(Process(4).against((0.6, 0.6)), PAPER, 0.0, 2.0, 40)
    steps = search.steps()
    for _ in range(4):
        next(steps)
    found = search.found(stopped=True)
    assert len(found.points) == 4 and found.taken is found.best
    assert found.best.j == min(point.j for point in found.points)


@pytest.mark.parametrize("budget", [6, 8, 12])
def test_no_more_is_measured_than_the_budget_allows(budget):
    search = Search(Process(7).against((1.2, 1.2), blurred=True), PAPER, 0.0, 2.0, budget)
    list(search.steps())
    assert len(search.found().points) <= budget


def test_every_measurement_is_in_a_narrow_range():
    search = Search(Process(4).against((1.0, 1.0)), (1.0, 1.0), 0.9, 1.1, 40)
    list(search.steps())
    weights = np.array([point.weights for point in search.found().points])
    assert weights.min() >= 0.9 and weights.max() <= 1.1


def test_it_needs_fewer_measurements_than_scipys_own_search():
    """COBYQA of SciPy, from the same start to the same precision."""
    minimize = pytest.importorskip("scipy", "1.14").optimize.minimize
    ours, theirs = [], []
    for seed in SEEDS:
        measure = Process(seed).against((0.7, 1.1))
        search = Search(measure, PAPER, 0.0, 2.0, 40)
        list(search.steps())
        ours.append(len(search.points))
        first = search.points[0].residuals

        def j(weights, measure=measure, first=first):
            at = measure(weights)
            return at.d_path / first.d_path + at.d_spec / first.d_spec

        theirs.append(
            minimize(
                j, PAPER, method="COBYQA", bounds=[(0, 2)] * 2,
                options={"initial_tr_radius": 0.2, "final_tr_radius": 0.005},
            ).nfev
        )  # fmt: skip
    assert sum(ours) < sum(theirs), (ours, theirs)


@pytest.mark.parametrize(
    ("seed", "wanted"),
    [
        (0, 0.9),
        (0, 1.1),
        (1, 0.9),
        (1, 1.1),
        (2, 0.9),
        (2, 1.1),
        (3, 0.9),
        (3, 1.1),
        (4, 0.9),
        (4, 1.1),
    ],
)
def test_the_best_weights_at_which_enough_of_a_style_shows(seed, wanted):
    """Against all weights of a fine grid: as good as the best of those at which enough shows."""
    process = Process(seed)
    measure = process.against((1.0, 0.6), blurred=True)
    search = Search(measure, PAPER, 0.0, 2.0, 40)
    list(search.steps())
    search.found()
    styled, plain = (statistics(process.drawn((1.0, weight))) for weight in (0.8, 0.0))

    def share(point: Point) -> float:
        without = statistics(process.drawn((point.weights[0], 0.0)))
        return style_shown(point.residuals.shown, without, styled, plain)

    assert share(search.best) < wanted - 0.02, "or nothing is asked for"
    new = []
    taken = at_least(search, share, wanted, new.append)
    assert share(taken) >= wanted - 0.005 and 0 < len(new) <= 4
    assert all(any(point is known for known in search.points) for point in new)
    first = search.points[0].residuals
    grid = [np.array([x, y]) for x in np.linspace(0.7, 1.3, 7) for y in np.linspace(0.4, 1.6, 13)]
    points = [Point(at, r, r.d_path / first.d_path, r.d_spec / first.d_spec)
              for at in grid for r in [measure(at)]]  # fmt: skip
    best = min(point.j for point in points if share(point) >= wanted)
    assert taken.j < 1.02 * best


def test_if_no_weights_show_enough_of_a_style_those_that_show_most_are_taken():
    process = Process(3)
    search = Search(process.against((1.0, 0.6), blurred=True), PAPER, 0.0, 1.5, 40)
    list(search.steps())
    taken = at_least(search, lambda point: float(point.weights[1]), 9.0, lambda point: None)
    assert taken.weights[1] == max(point.weights[1] for point in search.points) > 1.2
