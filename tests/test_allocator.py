import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rl_buffer.allocator import RowAllocator, RowQueue
from rl_buffer.errors import InvalidInput


def ints(*values):
    return np.array(values, np.int64)


@given(st.integers(1, 7), st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=60))
def test_a_queue_gives_what_a_list_gives_however_often_it_wraps(capacity, steps):
    queue, model, pushed = RowQueue(capacity), [], 0
    for is_push, n in steps:
        if is_push:
            n = min(n, capacity - len(model))
            new = list(range(pushed, pushed + n))
            pushed += n
            queue.push(ints(*new))
            model += new
        else:
            n = min(n, len(model))
            assert queue.peek(n).tolist() == model[:n]
            assert queue.pop(n).tolist() == model[:n]
            del model[:n]
        assert queue.length == len(model)
        assert queue.peek(queue.length).tolist() == model


def test_peeked_rows_are_a_copy():
    queue = RowQueue(3)
    queue.push(ints(1, 2))
    queue.peek(2)[:] = 9
    assert queue.pop(2).tolist() == [1, 2]


def test_a_full_table_keeps_exactly_its_capacity_over_three_laps_and_evicts_in_commit_order():
    allocator = RowAllocator(capacity=6, headroom=4)
    ages = []
    for _ in range(3 * 10 // 2):
        rows = allocator.reserve(2)
        evicted = allocator.commit(rows)
        ages += rows.tolist()
        assert evicted.tolist() == ages[: len(evicted)]
        del ages[: len(evicted)]
        assert allocator.committed().tolist() == ages
        assert allocator.num_committed == min(6, len(ages))
    assert len(ages) == 6


def test_the_oldest_is_what_was_committed_first_and_not_what_was_reserved_first():
    allocator = RowAllocator(capacity=4, headroom=4)
    early, late = allocator.reserve(2), allocator.reserve(2)
    allocator.commit(late)
    allocator.commit(early)
    assert allocator.commit(allocator.reserve(2)).tolist() == late.tolist()


def test_a_holder_that_never_commits_keeps_its_rows_and_nobody_waits_for_them():
    allocator = RowAllocator(capacity=4, headroom=4)
    kept = allocator.reserve(3)
    for _ in range(50):
        rows = allocator.reserve(1)
        assert rows[0] not in kept
        allocator.commit(rows)
    assert (allocator.num_reserved, allocator.num_committed) == (3, 4)


def test_rows_that_are_being_copied_are_reserved_again_in_the_order_in_which_they_were_copied():
    allocator = RowAllocator(capacity=4, headroom=4)
    allocator.commit(allocator.reserve(4))
    assert [row for view in allocator.freeze() for row in view.tolist()] == [0, 1, 2, 3]
    for left in (2, 0):
        allocator.commit(allocator.reserve(2))
        assert allocator.num_reservable == left
    assert allocator.committed().tolist() == [4, 5, 6, 7], "writers go on in the headroom"
    assert allocator.num_held == 4
    allocator.copied(1)
    assert (allocator.num_held, allocator.reserve(1).tolist()) == (3, [0])
    allocator.copied(4)
    assert (allocator.num_held, allocator.reserve(3).tolist()) == (0, [1, 2, 3])


@pytest.mark.parametrize("num_rows", [3, -1, 2**40])
def test_more_rows_than_the_headroom_has_left_are_refused_and_nothing_changes(num_rows):
    allocator = RowAllocator(capacity=8, headroom=4)
    allocator.reserve(2)
    with pytest.raises(InvalidInput, match=f"cannot reserve {num_rows} rows: 2 of 4 are left"):
        allocator.reserve(num_rows)
    assert (allocator.num_reserved, allocator.num_reservable) == (2, 2)
    assert allocator.reserve(2).tolist() == [2, 3]


def test_a_commit_beyond_the_capacity_is_refused_and_nothing_changes():
    allocator = RowAllocator(capacity=2, headroom=4)
    allocator.commit(allocator.reserve(1))
    rows = allocator.reserve(3)
    with pytest.raises(InvalidInput, match="cannot commit 3 rows at once: capacity is 2"):
        allocator.commit(rows)
    assert (allocator.num_reserved, allocator.committed().tolist()) == (3, [0])


@pytest.mark.parametrize(("capacity", "headroom"), [(0, 1), (1, 0), (-1, 1)])
def test_a_table_without_rows_is_refused(capacity, headroom):
    with pytest.raises(InvalidInput, match=f"must be >= 1 row, got {capacity} and {headroom}"):
        RowAllocator(capacity, headroom)


class AllocatorMachine(RuleBasedStateMachine):
    """Reservations of several holders against lists."""

    @initialize(capacity=st.integers(1, 9), headroom=st.integers(1, 9))
    def start(self, capacity, headroom):
        self.allocator = RowAllocator(capacity, headroom)
        self.free = list(range(capacity + headroom))
        self.reserved, self.committed = [], []  # lists of rows, rows
        self.uncopied = []  # frozen rows, oldest first

    @rule(data=st.data())
    def reserve(self, data):
        n = data.draw(st.integers(0, self.allocator.num_reservable))
        rows = self.allocator.reserve(n).tolist()
        assert rows == self.free[:n], "the longest free come first"
        assert not set(rows) & set(self.uncopied), "a row is written to that is being copied"
        del self.free[:n]
        self.reserved.append(rows)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def commit(self, data):
        rows = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        n = data.draw(st.integers(0, min(len(rows), self.allocator.capacity)))
        if rows[n:]:
            self.reserved.append(rows[n:])
        evicted = self.allocator.commit(ints(*rows[:n])).tolist()
        self.committed += rows[:n]
        surplus = max(0, len(self.committed) - self.allocator.capacity)
        assert evicted == self.committed[:surplus]
        self.free += self.committed[:surplus]
        del self.committed[:surplus]

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def release(self, data):
        rows = self.reserved.pop(data.draw(st.integers(0, len(self.reserved) - 1)))
        self.allocator.release(ints(*rows))
        self.free += rows

    @precondition(lambda self: not self.uncopied)
    @rule()
    def freeze(self):
        self.uncopied = [row for view in self.allocator.freeze() for row in view.tolist()]
        assert self.uncopied == self.committed

    @rule(num_rows=st.integers(0, 12))
    def copy(self, num_rows):
        self.allocator.copied(num_rows)
        del self.uncopied[:num_rows]

    @rule()
    def clear(self):
        assert self.allocator.clear().tolist() == self.committed
        self.free += self.committed
        self.committed = []

    @invariant()
    def every_row_is_in_one_place(self):
        allocator = self.allocator
        assert allocator.committed().tolist() == self.committed
        assert allocator.num_reserved == sum(map(len, self.reserved)) <= allocator.headroom
        assert allocator.num_committed == len(self.committed) <= allocator.capacity
        assert allocator._free.peek(allocator._free.length).tolist() == self.free
        assert allocator.num_held == len(set(self.uncopied) & set(self.free))
        num_left = allocator.headroom - allocator.num_reserved
        assert 0 <= allocator.num_reservable <= num_left
        assert allocator.num_reservable == num_left or allocator.num_held, "a copy that is ahead costs nothing"
        everything = sorted([*self.free, *self.committed, *(row for rows in self.reserved for row in rows)])
        assert everything == list(range(allocator.num_rows))


AllocatorMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
TestAllocator = AllocatorMachine.TestCase
