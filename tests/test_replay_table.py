import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rl_buffer.errors import InvalidInput
from rl_buffer.rate_limiters import MinSize, SampleToInsertRatio
from rl_buffer.replay_table import ReplayTableState
from rl_buffer.samplers import Prioritized, Uniform
from rl_buffer.spec import Field, TransitionSpec
from rl_buffer.tables import ReplayTable

SPEC = TransitionSpec(obs=Field((1,)), action=Field((1,)))
SAMPLERS = [Uniform(), Prioritized(alpha=1.0)]


def ints(*values):
    return np.array(values, np.int64)


def floats(*values):
    return np.array(values, np.float64)


def make_table(sampler=None, capacity=6, headroom=4, **arguments):
    config = ReplayTable(SPEC, capacity, sampler or Prioritized(alpha=1.0), headroom=headroom, seed=0, **arguments)
    return ReplayTableState(config, np.zeros(config.num_rows, np.int64))


def committed_table(*td_errors, sampler=None):
    table = make_table(sampler)
    rows = table.allocator.reserve(len(td_errors))
    table.commit(rows, floats(*td_errors))
    return table


def masses(table):
    return table._sampler.masses_of(np.arange(table.config.num_rows)).tolist()


def snapshot(table):
    return (
        table.allocator.committed().tolist(),
        table.allocator._free.peek(table.allocator._free.length).tolist(),
        table.allocator.num_reserved,
        table.generations.tolist(),
        masses(table),
        dict(vars(table.limiter)),
        table.num_stale_updates,
        table._rng.bit_generator.state,
    )


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_three_laps_never_hand_out_a_row_that_holds_another_step_than_was_committed(sampler):
    table = make_table(sampler, capacity=60, headroom=20)
    payload = np.full(table.config.num_rows, -1)  # the step that a writer wrote, by row
    committed, step = [], 0
    rng = np.random.default_rng(0)
    while step < 3 * table.config.num_rows:
        rows = table.allocator.reserve(int(rng.integers(1, 9)))
        payload[rows] = -1  # half written
        if committed:
            sample = table.draw(16, num_spares=5)
            assert set(payload[sample.rows].tolist()) <= set(committed)
            assert (sample.generations == table.generations[sample.rows]).all()
            assert (sample.num_items, len(sample.rows)) == (len(committed), 21)
        if rng.random() < 0.2:
            table.release(rows)
            continue
        payload[rows] = np.arange(step, step + len(rows))
        committed = [*committed, *range(step, step + len(rows))][-60:]
        step += len(rows)
        table.commit(rows, None)
        assert payload[table.allocator.committed()].tolist() == committed
        assert len(table) == min(step, 60)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_every_committed_row_can_be_drawn_and_no_other(sampler):
    table = make_table(sampler)
    for _ in range(5):
        table.commit(table.allocator.reserve(2), None)
    table.allocator.reserve(3)
    assert set(table.draw(500, 0).rows.tolist()) == set(table.allocator.committed().tolist())
    table.clear()
    with pytest.raises(InvalidInput, match="the table is empty"):
        table.draw(1, 0)
    assert table.limiter.num_samples == 500


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_batches_that_are_drawn_at_once_are_those_that_would_be_drawn_one_after_the_other(sampler):
    at_once, singly = (make_table(sampler, capacity=30, headroom=30) for _ in range(2))
    for table in (at_once, singly):
        table.commit(table.allocator.reserve(30), np.arange(1.0, 31.0))
    sample, singles = at_once.draw(16, 5, num_batches=3), [singly.draw(16, 5) for _ in range(3)]
    for column in ("rows", "generations", "masses"):
        assert getattr(sample, column).tolist() == np.concatenate([getattr(s, column) for s in singles]).tolist()
    assert (sample.total_mass, sample.num_items) == singles[0][3:]
    assert at_once.limiter.num_samples == singly.limiter.num_samples == 48


def test_a_generation_is_odd_while_its_row_is_committed_and_never_comes_back():
    table = make_table(capacity=2, headroom=2)
    seen = []
    for _ in range(9):
        rows = table.allocator.reserve(2)
        assert (table.generations[rows] % 2 == 0).all()
        table.commit(rows, None)
        assert (table.generations[rows] % 2 == 1).all()
        seen += [(row, int(table.generations[row])) for row in rows.tolist()]
    assert len(set(seen)) == len(seen)


def test_a_release_leaves_the_generation_as_it_was():
    table = make_table()
    table.release(table.allocator.reserve(3))
    assert not table.generations.any()


def test_an_update_reaches_the_row_that_was_sampled():
    table = committed_table(1.0, 2.0)
    assert table.update_priorities(ints(1, 0, 1), ints(1, 1, 1), floats(5.0, -7.0, 4.0)) == 0
    assert masses(table)[:2] == pytest.approx([7.0, 4.0], abs=1e-5)


def test_an_update_of_an_evicted_row_is_dropped_and_counted_and_the_others_pass():
    table = make_table(capacity=2, headroom=2)
    first = table.allocator.reserve(2)
    table.commit(first, floats(1.0, 1.0))
    stale = table.generations[first]
    table.commit(table.allocator.reserve(1), floats(3.0))  # evicts the first row
    assert table.update_priorities(first, stale, floats(9.0, 9.0)) == 1
    assert table.num_stale_updates == 1
    assert masses(table) == pytest.approx([0.0, 9.0, 3.0, 0.0], abs=1e-5)


def test_an_update_of_a_row_that_was_committed_again_is_dropped():
    table = make_table(capacity=1, headroom=1)
    for td_error in (1.0, 2.0, 3.0):
        table.commit(table.allocator.reserve(1), floats(td_error))
    assert table.update_priorities(ints(0), ints(1), floats(9.0)) == 1
    assert masses(table) == pytest.approx([3.0, 0.0], abs=1e-5)


@pytest.mark.parametrize("generation", [-2, -1, 0, 1, 2, 3, 2**62])
def test_no_forged_generation_makes_a_free_or_reserved_row_drawable(generation):
    table = make_table(capacity=1, headroom=2)
    table.commit(table.allocator.reserve(1), None)
    table.commit(table.allocator.reserve(1), None)  # row 0 is free again, generation 2
    table.allocator.reserve(1)  # row 2, generation 0
    before = masses(table)
    assert table.update_priorities(ints(0, 2), ints(generation, generation), floats(9.0, 9.0)) == 2
    assert masses(table) == before
    assert table.num_stale_updates == 2


@pytest.mark.parametrize(
    ("rows", "td_errors", "message"),
    [
        ((0, 1), (5.0, np.nan), "TD errors must be finite, got nan"),
        ((0, 1), (-np.inf, 5.0), "TD errors must be finite, got -inf"),
        ((0, 1), (5.0, 1e300), r"TD error 1e\+300 at position 1; expected .* at most 1e\+200"),
        ((0, 10), (5.0, 5.0), r"rows must be in \[0, 10\), got 0..10"),
        ((-1, 0), (5.0, 5.0), r"got -1..0"),
    ],
)
def test_a_bad_update_changes_nothing(rows, td_errors, message):
    table = committed_table(1.0, 2.0)
    before = snapshot(table)
    with pytest.raises(InvalidInput, match=message):
        table.update_priorities(ints(*rows), ints(1, 1), floats(*td_errors))
    assert snapshot(table) == before


def test_an_update_of_a_uniform_table_is_refused_and_not_counted():
    table = committed_table(1.0, sampler=Uniform())
    with pytest.raises(InvalidInput, match="no priorities"):
        table.update_priorities(ints(0), ints(99), floats(1.0))
    assert table.num_stale_updates == 0


@pytest.mark.parametrize("td_error", [np.inf, -np.inf, 1e300, -1e201])
def test_a_commit_with_a_td_error_beyond_any_mass_changes_nothing(td_error):
    table = committed_table(1.0, 2.0, 3.0, 4.0)
    rows = table.allocator.reserve(3)  # 4 + 3 would evict one
    before = snapshot(table)
    with pytest.raises(InvalidInput, match=r"finite"):
        table.commit(rows, floats(np.nan, 1.0, td_error))
    assert snapshot(table) == before


def test_a_commit_beyond_the_capacity_changes_nothing():
    table = make_table(capacity=2, headroom=4)
    rows = table.allocator.reserve(3)
    before = snapshot(table)
    with pytest.raises(InvalidInput, match="capacity is 2"):
        table.commit(rows, None)
    assert snapshot(table) == before


def test_a_row_without_a_td_error_gets_the_largest_mass_that_lives():
    table = make_table(capacity=2, headroom=2)
    table.commit(table.allocator.reserve(1), floats(50.0))
    table.commit(table.allocator.reserve(2), floats(3.0, np.nan))  # evicts the 50
    assert masses(table)[1:3] == pytest.approx([3.0, 1.0], abs=1e-5)  # nothing lived before it
    table.commit(table.allocator.reserve(1), None)  # evicts the 3
    assert masses(table)[3] == pytest.approx(1.0, abs=1e-5)


def test_the_limiter_counts_commits_evictions_and_draws_without_spares():
    table = make_table(rate_limiter=SampleToInsertRatio(2.0, 3, 8.0))
    for _ in range(4):
        table.commit(table.allocator.reserve(2), None)
    table.draw(5, num_spares=7)
    limiter = table.limiter
    assert (limiter.num_inserts, limiter.num_deletes, limiter.num_samples) == (8, 2, 5)
    table.clear()
    assert (limiter.num_inserts, limiter.num_deletes, limiter.size) == (8, 8, 0)


def test_the_same_seed_draws_the_same_rows():
    draws = []
    for _ in range(2):
        table = committed_table(1.0, 2.0, 3.0)
        draws.append([table.draw(8, 2).rows.tolist() for _ in range(3)])
    assert draws[0] == draws[1]
    assert draws[0][0] != draws[0][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capacity": 0}, r"capacity must be in \[1, "),
        ({"capacity": 2**41}, r"capacity must be in \[1, "),
        ({"n_step": 0}, r"n_step must be in \[1, 1024\], got 0"),
        ({"gamma": 1.01}, r"gamma must be in \[0.0, 1.0\], got 1.01"),
        ({"gamma": float("nan")}, r"gamma must be in"),
        ({"headroom": 0}, r"headroom must be in"),
        ({"capacity": 5, "rate_limiter": MinSize(6)}, "waits for 6 transitions, but capacity is 5"),
    ],
)
def test_a_table_that_could_not_work_is_refused(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        ReplayTable(SPEC, **{"capacity": 8} | arguments)


@pytest.mark.parametrize(("capacity", "headroom"), [(1, 4096), (4096, 4096), (160_000, 10_000)])
def test_the_default_headroom_is_a_sixteenth_within_bounds(capacity, headroom):
    assert ReplayTable(SPEC, capacity).headroom == headroom


def test_the_default_headroom_of_large_rows_is_bounded_in_bytes():
    image = TransitionSpec(obs=Field((4, 84, 84), "uint8"), action=Field((), "int64"))
    table = ReplayTable(image, 2000)
    assert table.headroom == (64 << 20) // table.layout.stride_nbytes == 1187


class TableMachine(RuleBasedStateMachine):
    """Reserve, commit, release, clear, draw and update in any order, against lists."""

    sampler = Prioritized(alpha=1.0, epsilon=0.5)

    @initialize(capacity=st.integers(1, 8), headroom=st.integers(1, 8))
    def start(self, capacity, headroom):
        self.table = make_table(self.sampler, capacity, headroom)
        self.reserved, self.committed = [], []
        self.generations = [0] * (capacity + headroom)
        self.mass = {}
        self.stale = self.drawn = self.inserts = 0
        self.samples = []

    def evict(self, n):
        for row in self.committed[:n]:
            self.generations[row] += 1
            del self.mass[row]
        del self.committed[:n]

    @precondition(lambda self: self.table.allocator.num_reservable)
    @rule(data=st.data())
    def reserve(self, data):
        rows = self.table.allocator.reserve(data.draw(st.integers(1, self.table.allocator.num_reservable))).tolist()
        assert not set(rows) & set(self.committed)
        self.reserved.append(rows)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def commit(self, data):
        rows = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        n = data.draw(st.integers(1, min(len(rows), self.table.config.capacity)))
        rows, left = rows[:n], rows[n:]
        if left:
            self.reserved.append(left)
        known = data.draw(st.sampled_from([None, [-2.0, np.nan, 0.0]]))
        td_errors = None if known is None else [known[i % 3] for i in range(n)]
        self.table.commit(ints(*rows), None if known is None else floats(*td_errors))
        self.evict(max(0, len(self.committed) + n - self.table.config.capacity))
        largest = max(self.mass.values(), default=1.0)
        for row, td_error in zip(rows, td_errors or [np.nan] * n, strict=True):
            self.mass[row] = largest if np.isnan(td_error) else abs(td_error) + 0.5
            self.generations[row] += 1
        self.committed += rows
        self.inserts += n

    @precondition(lambda self: self.reserved)
    @rule()
    def release(self):
        self.table.release(ints(*self.reserved.pop()))

    @rule()
    def clear(self):
        self.table.clear()
        self.evict(len(self.committed))

    @precondition(lambda self: self.committed)
    @rule(n=st.integers(1, 6))
    def draw(self, n):
        sample = self.table.draw(n, num_spares=2)
        rows = sample.rows.tolist()
        assert set(rows) <= set(self.committed)
        assert sample.generations.tolist() == [self.generations[row] for row in rows]
        expected = [self.mass[row] if isinstance(self.sampler, Prioritized) else 1.0 for row in rows]
        assert sample.masses.tolist() == pytest.approx(expected)
        total = sum(self.mass.values()) if isinstance(self.sampler, Prioritized) else len(self.committed)
        assert (sample.total_mass, sample.num_items) == (pytest.approx(total), len(self.committed))
        self.drawn += n
        self.samples.append(sample)

    @precondition(lambda self: self.samples and isinstance(self.sampler, Prioritized))
    @rule(data=st.data(), shift=st.sampled_from([0, 0, 0, -1, 1, 2]))
    def update(self, data, shift):
        """Of any sample so far; a shift makes the generations forged."""
        sample = data.draw(st.sampled_from(self.samples[-4:]))
        td_errors = [float(i) for i in range(len(sample.rows))]
        fresh = [
            self.generations[row] == generation + shift and (generation + shift) % 2 == 1
            for row, generation in zip(sample.rows, sample.generations, strict=True)
        ]
        num_stale = self.table.update_priorities(sample.rows, sample.generations + shift, floats(*td_errors))
        assert num_stale == len(fresh) - sum(fresh)
        self.stale += num_stale
        for row, td_error, is_fresh in zip(sample.rows.tolist(), td_errors, fresh, strict=True):
            if is_fresh:
                self.mass[row] = td_error + 0.5

    @invariant()
    def the_table_is_what_the_lists_are(self):
        table, allocator = self.table, self.table.allocator
        assert allocator.committed().tolist() == self.committed
        assert len(table) == len(self.committed) == min(table.config.capacity, len(self.committed))
        assert allocator.num_reserved == sum(map(len, self.reserved))
        assert allocator._free.length + allocator.num_reserved + len(table) == table.config.num_rows
        assert table.generations.tolist() == self.generations
        assert sorted(np.flatnonzero(table.generations % 2).tolist()) == sorted(self.committed)
        assert table._sampler.num_items == len(self.committed) == table.limiter.size
        assert (table.limiter.num_inserts, table.limiter.num_samples) == (self.inserts, self.drawn)
        assert table.num_stale_updates == self.stale
        if isinstance(self.sampler, Prioritized):
            assert masses(table) == pytest.approx([self.mass.get(row, 0.0) for row in range(table.config.num_rows)])


class UniformTableMachine(TableMachine):
    sampler = Uniform()


for _machine in (TableMachine, UniformTableMachine):
    _machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
TestPrioritizedTable = TableMachine.TestCase
TestUniformTable = UniformTableMachine.TestCase
