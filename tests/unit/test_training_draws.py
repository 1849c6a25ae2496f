"""Random draws depend only on (seed, step, place), and every row has its turn."""

from collections import Counter

import pytest
import torch
from lcm_lora.training.data.draws import Shuffle, draw

SHAPE = (4, 8, 8)


def test_a_place_draws_the_same_alone_and_in_a_batch():
    eps, index, cfg = draw(7, 3, range(6), SHAPE, (3.0, 9.0))
    for place in range(6):
        alone = draw(7, 3, [place], SHAPE, (3.0, 9.0))
        assert torch.equal(eps[place], alone[0][0])
        assert index[place] == alone[1][0] and cfg[place] == alone[2][0]


@pytest.mark.parametrize("other", [(8, 3, 0), (7, 4, 0), (7, 3, 1)])
def test_another_seed_step_or_place_draws_something_else(other):
    seed, step, place = other
    one = draw(7, 3, [0], SHAPE, (7.5,))[0]
    assert not torch.equal(one, draw(seed, step, [place], SHAPE, (7.5,))[0])


def test_the_draws_are_distributed_as_they_should():
    eps, index, cfg = draw(0, 0, range(4000), (4, 2, 2), (3.0, 9.0))
    assert abs(eps.mean()) < 0.02 and abs(eps.std() - 1) < 0.02
    assert set(index.tolist()) == set(range(50))
    assert 3 <= cfg.min() and cfg.max() <= 9 and abs(cfg.mean() - 6) < 0.1
    assert (draw(0, 0, range(5), SHAPE, (7.5,))[2] == 7.5).all()


def test_each_epoch_has_every_row_and_its_own_order():
    order = Shuffle([SHAPE] * 24, batch=4, seed=1)
    epochs = [[row for i in range(6) for row in order.rows(6 * e + i)] for e in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert Shuffle([SHAPE] * 24, batch=4, seed=1).rows(13) == order.rows(13)


def test_a_batch_has_one_shape_and_is_always_full():
    shapes = [(4, 8, 8)] * 10 + [(4, 6, 10)] * 3 + [(4, 10, 6)]
    order = Shuffle(shapes, batch=4, seed=0)
    seen = Counter()
    for step in range(order.per_epoch):
        rows = order.rows(step)
        assert len(rows) == 4
        assert len({shapes[row] for row in rows}) == 1
        seen.update(rows)
    assert set(seen) == set(range(14))
    assert order.per_epoch == 3 + 1 + 1


def test_two_processes_share_the_batch_of_one():
    """Rank r takes its part of the rows and of the places: together they are the one batch."""
    order = Shuffle([SHAPE] * 30, batch=8, seed=2)
    rows = order.rows(2)
    parts = rows[:4], rows[4:]
    assert not set(parts[0]) & set(parts[1])
    eps = draw(2, 2, range(8), SHAPE, (7.5,))[0]
    halves = [draw(2, 2, range(4 * r, 4 * r + 4), SHAPE, (7.5,))[0] for r in (0, 1)]
    assert torch.equal(torch.cat(halves), eps)


def test_a_batch_is_used_in_so_many_passes_and_no_more():
    order = Shuffle([SHAPE] * 24, batch=4, seed=1)  # 6 steps per pass
    assert [order.original(step, 1) for step in range(20)] == list(range(20))
    assert [order.original(step, 3) for step in (0, 5, 6, 11, 17, 18, 23, 24)] == [
        0, 5, 0, 5, 5, 18, 23, 18,
    ]  # fmt: skip
