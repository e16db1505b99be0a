"""Overtaken rows against plain lists."""

import numpy as np
import pytest

from rl_buffer.importance import importance_weights
from rl_buffer.overtaken_rows import NOTHING_LEFT, describe_kept, keep_intact, substitute

NUM_ROWS = 40


def expected_substitutes(intact, batch_size):
    """Which draw is at each place: spares in their order, then the batch's own, each time round."""
    good = [i for i in [*range(batch_size, len(intact)), *range(batch_size)] if intact[i]]
    lacking = [i for i in range(batch_size) if not intact[i]]
    substitutes = dict(zip(lacking, good * len(lacking), strict=False))
    return [substitutes.get(i, i) for i in range(batch_size)]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
@pytest.mark.parametrize(("batch_size", "num_spares"), [(1, 0), (4, 1), (16, 5), (16, 40)])
def test_overtaken_draws_give_their_places_to_spares_and_then_to_others(batch_size, num_spares, share):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rows = rng.permutation(NUM_ROWS)[: batch_size + num_spares]
        generations = rng.integers(100, size=NUM_ROWS)
        drawn = generations[rows]
        generations[rows[rng.random(len(rows)) < share]] += 2
        intact = generations[rows] == drawn
        kept, places = np.full(batch_size, 999), np.full(batch_size, 999)  # as the batch before left them
        num_changed, candidate = keep_intact(generations, rows, drawn, kept, places)
        if not intact.any():
            assert num_changed == NOTHING_LEFT
            continue
        assert kept.tolist() == expected_substitutes(intact, batch_size)
        assert places[:num_changed].tolist() == np.flatnonzero(~intact[:batch_size]).tolist()
        # A second look at these finds them intact, unless they are overtaken as well.
        again = places[:num_changed].copy()
        assert substitute(generations, rows, drawn, kept, again, candidate)[0] == 0
        if num_changed:
            generations[rows[kept[again[-1]]]] += 2
            num_again, _ = substitute(generations, rows, drawn, kept, again, candidate)
            is_left = (generations[rows] == drawn).any()
            assert num_again >= 1 if is_left else num_again == NOTHING_LEFT
            assert not is_left or (generations[rows[kept]] == drawn[kept])[again].all()


def test_rows_that_are_not_there_count_as_overtaken():
    generations = np.ones(3, np.int64)
    for row in (3, -1, 1 << 62):
        kept, places = np.empty(2, np.int64), np.empty(2, np.int64)
        assert keep_intact(generations, np.array([0, row]), np.ones(2, np.int64), kept, places)[0] == 1
        assert kept.tolist() == [0, 0]
        kept[:] = 0, 1
        assert substitute(generations, np.array([0, row]), np.ones(2, np.int64), kept, np.arange(2), 0)[0] == 1
        assert kept.tolist() == [0, 0]


def test_a_batch_is_described_by_the_draws_that_it_was_made_of():
    rng = np.random.default_rng(0)
    rows, drawn, masses = rng.integers(100, size=9), rng.integers(100, size=9), rng.random(9)
    kept = np.array([0, 8, 2, 0, 7])
    described = np.empty(5, np.int64), np.empty(5, np.int64), np.empty(5, np.float32)
    describe_kept(rows, drawn, masses, kept, 0.7, *described)
    assert described[0].tolist() == rows[kept].tolist()
    assert described[1].tolist() == drawn[kept].tolist()
    assert described[2].tolist() == importance_weights(masses[kept], 0.7).tolist()
