"""A batch in one kernel against the same in steps, and rows against NumPy's."""

import numpy as np
import pytest

from rl_buffer.importance import importance_weights
from rl_buffer.replay_table import ReplayTableState
from rl_buffer.row_copies import NO_WORDS, gather_rows, replace_rows
from rl_buffer.samplers import Prioritized
from rl_buffer.spec import Field, TransitionSpec
from rl_buffer.tables import ReplayTable


def filled(num_rows):
    spec = TransitionSpec(obs=Field((1,)), action=Field(()))
    table = ReplayTable(spec, capacity=num_rows, headroom=num_rows, sampler=Prioritized(), seed=0)
    state = ReplayTableState(table, np.zeros(table.num_rows, np.int64))
    for _ in range(2):  # a second lap, so that generations differ
        for num in (num_rows // 2, num_rows // 3):
            state.commit(state.reserve(num), np.random.default_rng(num).normal(size=num))
    return state


@pytest.mark.parametrize("row_words", [8, 24, 504])
@pytest.mark.parametrize(("num_rows", "batch_size"), [(9, 1), (100, 7), (5_000, 256)])
def test_a_batch_at_once_is_the_batch_in_steps(num_rows, batch_size, row_words):
    at_once, in_steps = filled(num_rows), filled(num_rows)
    source = np.random.default_rng(1).integers(1 << 62, size=(len(at_once.generations), row_words))
    for beta in (0.0, 0.4, 1.0):
        sample = in_steps.draw(batch_size, num_spares=0)
        target = np.zeros((batch_size, row_words), np.int64)
        rows, generations, weights = at_once.draw_batch(batch_size, beta, source.reshape(-1), target.reshape(-1))
        assert np.array_equal(rows, sample.rows)
        assert np.array_equal(generations, sample.generations)
        assert np.array_equal(weights, importance_weights(sample.masses, beta))
        assert np.array_equal(target, source[rows])
        assert np.array_equal(at_once.draw_batch(3, beta, NO_WORDS, NO_WORDS)[0], in_steps.draw(3, 0).rows)
    assert at_once.state()[1] == in_steps.state()[1], "counts and random state"


@pytest.mark.parametrize("row_words", [8, 24, 400, 1024])
@pytest.mark.parametrize("batch_size", [1, 5, 300])
def test_gathered_rows_are_those_of_numpy(batch_size, row_words):
    rng = np.random.default_rng(0)
    source = rng.integers(1 << 62, size=(1_000, row_words))
    rows = rng.integers(1_000, size=batch_size)
    target = np.zeros((batch_size, row_words), np.int64)
    gather_rows(source.reshape(-1), rows, target.reshape(-1))
    assert np.array_equal(target, source[rows])
    places = rng.permutation(batch_size)[: 1 + batch_size // 2]
    others, expected = rng.integers(1_000, size=len(places)), target.copy()
    replace_rows(source.reshape(-1), others, target.reshape(-1), places, row_words)
    expected[places] = source[others]
    assert np.array_equal(target, expected)


def test_a_row_that_is_not_there_reads_no_memory_of_others():
    source, target = np.arange(80), np.zeros(32, np.int64)
    gather_rows(source, np.array([10, -1, 1 << 62, 2]), target)
    assert target.reshape(4, 8)[:, 0].tolist() == [72, 72, 72, 16]
    replace_rows(source, np.array([-1, 1]), target, np.array([3, 0]), 8)
    assert target.reshape(4, 8)[:, 0].tolist() == [8, 72, 72, 72]
