"""Rollout tables: every fragment is free, written, finished or read, and handed out once."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rl_buffer.errors import InvalidInput
from rl_buffer.rollout_table import Fragment, RolloutTableState
from rl_buffer.spec import Field, TransitionSpec
from rl_buffer.tables import RolloutTable

SPEC = TransitionSpec(obs=Field((3,)), action=Field((), "int64"))


def table(**options):
    return RolloutTable(SPEC, **{"num_steps": 4, "num_envs": 2, "num_fragments": 3} | options)


def state(**options):
    return RolloutTableState(table(**options))


def rows(*numbers):
    return np.array(numbers, np.int64)


def write(table, version=0):
    """Begin and finish one fragment; its row."""
    (row,) = table.reserve(1)
    table.commit(rows(row), version)
    return int(row)


def test_fragments_are_handed_out_once_in_the_order_of_their_commits():
    fragments = state()
    first, second = fragments.reserve(1), fragments.reserve(1)
    fragments.commit(second, version=0)
    fragments.commit(first, version=0)
    leased = fragments.lease(5, newest_version=0).fragments
    assert [fragment.row for fragment in leased] == [*second, *first]
    assert fragments.lease(5, newest_version=0).fragments == []
    fragments.finish(rows(*second))
    assert (fragments.num_free, fragments.num_reading, len(fragments)) == (2, 1, 0)


def test_what_a_dead_reader_held_comes_before_everything_that_was_finished_since():
    fragments = state(num_fragments=4)
    held = [write(fragments) for _ in range(2)]
    assert len(fragments.lease(2, 0).fragments) == 2
    later = write(fragments)
    fragments.give_back(rows(*reversed(held)))
    assert [fragment.row for fragment in fragments.lease(9, 0).fragments] == [*held, later]
    assert fragments.num_handed_out == 5


def test_fragments_with_too_much_lag_are_dropped_and_counted():
    fragments = state(max_version_lag=1)
    write(fragments, version=3)
    fresh = write(fragments, version=4)
    assert [fragment.row for fragment in fragments.lease(2, newest_version=5).fragments] == [fresh]
    assert (fragments.num_dropped, fragments.num_free) == (1, 2)


def test_without_lag_writers_begin_together_after_the_release():
    """Two actors, two fragments an update: synchronous training."""
    fragments = state(num_fragments=8, max_version_lag=0, when_late="wait", fragments_per_update=2)
    assert fragments.num_reservable == 2
    first = write(fragments)
    assert fragments.num_reservable == 1, "the first actor does not get a second one"
    second = write(fragments)
    assert fragments.num_reservable == 0
    fragments.lease(2, 0)
    assert fragments.num_reservable == 0, "the learner has not published yet"
    fragments.finish(rows(first, second))
    assert fragments.num_reservable == 2


@pytest.mark.parametrize("max_version_lag", [0, 1, 2])
@pytest.mark.parametrize("fragments_per_update", [1, 2, 3])
def test_where_writers_wait_no_fragment_has_more_lag_than_allowed(max_version_lag, fragments_per_update):
    options = {"max_version_lag": max_version_lag, "when_late": "wait", "fragments_per_update": fragments_per_update}
    fragments = state(num_fragments=64, **options)
    rng = np.random.default_rng(0)
    version, writing, lags, held = 1, [], [], []
    for _ in range(2000):
        if rng.random() < 0.5 and fragments.num_reservable:  # actors are eager: each begins with the newest parameters
            writing.append((fragments.reserve(1), version))
        elif writing:
            fragments.commit(*writing.pop(rng.integers(len(writing))))
        leased = fragments.lease(fragments_per_update - len(held), version).fragments
        lags += [version - fragment.version for fragment in leased]
        held += [fragment.row for fragment in leased]
        if len(held) == fragments_per_update:
            version += 1
            fragments.finish(rows(*held))
            held = []
    assert len(lags) > 100
    assert max(lags) <= max_version_lag


def test_where_writers_wait_a_slow_one_is_not_overtaken_but_a_dead_one_is():
    fragments = state(max_version_lag=1, when_late="wait", fragments_per_update=1)
    slow = fragments.reserve(1)
    fast = write(fragments)
    assert fragments.lease(2, 0).fragments == []
    fragments.release(slow)
    assert [fragment.row for fragment in fragments.lease(2, 0).fragments] == [fast]


def test_what_is_not_held_cannot_be_given_away():
    fragments = state()
    row = write(fragments)
    with pytest.raises(InvalidInput, match="cannot begin 3 fragments: 2 may be begun"):
        fragments.reserve(3)
    with pytest.raises(InvalidInput, match=f"fragment {row} is not being read"):
        fragments.finish(rows(row))
    fragments.lease(1, 0)
    with pytest.raises(InvalidInput, match="named twice"):
        fragments.finish(rows(row, row))
    with pytest.raises(InvalidInput, match="fragment 2 is not being read"):
        fragments.give_back(rows(row, 2))
    assert (fragments.num_reading, fragments.num_free, len(fragments)) == (1, 2, 0)


def test_clear_drops_what_is_finished_and_nothing_else():
    fragments = state()
    write(fragments)
    fragments.lease(1, 0)
    write(fragments)
    fragments.reserve(1)
    fragments.clear()
    assert (len(fragments), fragments.num_reading, fragments.num_writing, fragments.num_free) == (0, 1, 1, 1)


def test_what_an_earlier_server_had_goes_on_in_its_order_and_new_fragments_come_after_it():
    fragments = state(num_fragments=5, max_version_lag=5, when_late="wait")
    fragments.resume(
        [Fragment(4, 7, 1), Fragment(0, 5, 1)],
        [Fragment(2, 6, 1)],
        rows(3),
        num_commits=8,
        num_handed_out=6,
        num_dropped=0,
    )
    assert (len(fragments), fragments.num_reading, fragments.num_writing, fragments.num_free) == (2, 1, 1, 1)
    assert fragments.reserve(1).tolist() == [1]
    fragments.give_back(rows(2))
    assert [fragment.row for fragment in fragments.lease(5, 1).fragments] == [0, 2, 4]
    fragments.commit(rows(1), 1)
    assert [fragment[:2] for fragment in fragments.lease(5, 1).fragments] == [(1, 8)]
    fragments.release(rows(3))
    assert (fragments.num_writing, fragments.num_free, fragments.num_commits, fragments.num_handed_out) == (0, 1, 9, 10)


def test_nobody_waits_for_a_fragment_whose_writer_will_not_commit_it():
    fragments = state(max_version_lag=0, when_late="wait")  # one at a time
    fragments.resume([], [], rows(0), num_commits=0, num_handed_out=0, num_dropped=0)
    assert fragments.num_reservable == 1
    written = write(fragments)
    assert [fragment.row for fragment in fragments.lease(1, 0).fragments] == [written]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, r"RolloutTable num_steps must be in \[1, \d+\], got 0"),
        ({"num_envs": 1.5}, "RolloutTable num_envs must be an integer, got 1.5"),
        ({"gae_lambda": 1.1}, r"gae_lambda must be in \[0.0, 1.0\], got 1.1"),
        ({"max_version_lag": -1}, r"max_version_lag must be in \[0, \d+\], got -1"),
        ({"when_late": "skip"}, "when_late must be 'drop' or 'wait', got 'skip'"),
        ({"when_late": "wait"}, "needs max_version_lag="),
        ({"fragments_per_update": 4}, "has 3 fragments, fewer than the 4 that an update takes"),
    ],
)
def test_a_table_that_could_not_work_is_refused(options, message):
    with pytest.raises(InvalidInput, match=message):
        table(**options)


@pytest.mark.parametrize("options", [{}, {"max_version_lag": 1, "when_late": "wait", "fragments_per_update": 2}])
def test_a_cut_is_taken_over_with_what_was_being_read_and_without_what_was_being_written(options):
    fragments = state(num_fragments=4, **options)
    gone = write(fragments, version=1)
    fragments.lease(1, 1)
    fragments.finish(rows(gone))
    write(fragments, version=2)
    write(fragments, version=3)
    fragments.lease(1, 3)
    fragments.reserve(1)
    cut = fragments.freeze()
    other = state(num_fragments=5, **options)
    other.restore_cut(2, None, cut.values)
    assert (other.num_free, other.num_writing, len(other), other.num_reading) == (3, 0, 2, 0)
    assert (other.num_commits, other.num_handed_out) == (3, 2)
    assert other.generations.tolist() == [1, 1, 0, 0, 0]
    later = write(other, version=3)
    assert [(f.row, f.version) for f in other.lease(9, 3).fragments] == [(0, 2), (1, 3), (later, 3)]
    small = state(num_fragments=2)
    for wrong in ((1, cut.values), (2, cut.values | {"fragments": [(2, 2), (1, 3)]})):
        with pytest.raises(InvalidInput, match="fragments have the numbers"):
            small.restore_cut(wrong[0], None, wrong[1])
    assert (small.num_free, len(small)) == (2, 0)


class Machine(RuleBasedStateMachine):
    """Against four plain lists."""

    def __init__(self):
        super().__init__()
        self.state = state(num_fragments=5, max_version_lag=2)
        self.free, self.writing, self.finished, self.reading = list(range(5)), [], [], []
        self.version = self.number = 0
        self.uncopied, self.held = [], []

    def freed(self, row):
        (self.held if row in self.uncopied else self.free).append(row)

    @precondition(lambda self: not self.uncopied)
    @rule()
    def freeze(self):
        fragments = sorted([*self.finished, *self.reading])
        cut = self.state.freeze()
        self.uncopied = cut.rows[0].tolist()
        assert self.uncopied == [row for _, row, _ in fragments]
        assert cut.values["fragments"] == [(number, version) for number, _, version in fragments]

    @rule(num_fragments=st.integers(0, 6))
    def copy(self, num_fragments):
        self.state.copied(num_fragments)
        del self.uncopied[:num_fragments]
        self.free += [row for row in self.held if row not in self.uncopied]
        self.held = [row for row in self.held if row in self.uncopied]

    @precondition(lambda self: self.free)
    @rule()
    def reserve(self):
        (row,) = self.state.reserve(1)
        assert row == self.free.pop(0)
        self.writing.append(int(row))

    @precondition(lambda self: self.writing)
    @rule(data=st.data(), lag=st.integers(0, 3))
    def commit(self, data, lag):
        row = self.writing.pop(data.draw(st.integers(0, len(self.writing) - 1)))
        self.state.commit(rows(row), self.version - lag)
        self.finished.append((self.number, row, self.version - lag))
        self.number += 1

    @precondition(lambda self: self.writing)
    @rule()
    def release(self):
        row = self.writing.pop()
        self.state.release(rows(row))
        self.free.append(row)

    @rule()
    def publish(self):
        self.version += 1

    @rule(most=st.integers(0, 4))
    def lease(self, most):
        expected = []
        while self.finished and len(expected) < most:
            number, row, version = self.finished.pop(0)
            if self.version - version > 2:
                self.freed(row)
            else:
                expected.append((number, row, version))
        assert [(f.number, f.row, f.version) for f in self.state.lease(most, self.version).fragments] == expected
        self.reading += expected

    @precondition(lambda self: self.reading)
    @rule(died=st.booleans(), data=st.data())
    def end_reading(self, died, data):
        fragment = self.reading.pop(data.draw(st.integers(0, len(self.reading) - 1)))
        if died:
            self.state.give_back(rows(fragment[1]))
            self.finished = sorted([fragment, *self.finished])
        else:
            self.state.finish(rows(fragment[1]))
            self.freed(fragment[1])

    @invariant()
    def every_fragment_is_in_one_place(self):
        state = self.state
        numbers = (state.num_free, state.num_held, state.num_writing, len(state), state.num_reading)
        assert numbers == tuple(map(len, (self.free, self.held, self.writing, self.finished, self.reading)))
        assert sum(numbers) == 5
        assert state.num_reservable == state.num_free


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
