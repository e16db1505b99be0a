import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_buffer.errors import InvalidInput
from rl_buffer.rate_limiters import LimiterConfig, MinSize, Queue, RateLimiter, SampleToInsertRatio, Stack


def limiter(samples_per_insert=8.0, min_size=1000, error_buffer=100.0):
    return RateLimiter(SampleToInsertRatio(samples_per_insert, min_size, error_buffer))


def test_min_size_never_holds_an_insert_back_and_samples_from_the_minimum_on():
    table = RateLimiter(MinSize(3))
    table.inserted(2)
    assert not table.can_sample(1)  # size 2
    assert table.num_insertable(10**9) == 10**9
    table.inserted(1)
    assert table.can_sample(10**9)  # size 3
    table.deleted(1)
    assert not table.can_sample(1)  # size 2


def test_inserts_pass_freely_up_to_the_minimum_size():
    table = limiter(min_size=10, error_buffer=(0.0, 16.0))  # max_diff 16 is below 10 * 8
    assert table.num_insertable(11) == 10  # 11 * 8 = 88 > 16


def test_the_cursor_stays_between_its_bounds():
    table = limiter(samples_per_insert=2.0, min_size=4, error_buffer=5.0)  # 3 <= cursor <= 13
    table.inserted(4)
    assert table.cursor == 8.0
    assert table.num_insertable(9) == 2  # 12; the third would be 14
    assert table.can_sample(5)  # 3
    assert not table.can_sample(6)  # 2
    table.sampled(5)
    assert table.cursor == 3.0
    assert not table.can_sample(1)  # 2
    assert table.num_insertable(9) == 5  # 13
    table.inserted(5)
    assert table.cursor == 13.0
    assert table.num_insertable(1) == 0  # 15
    assert table.can_sample(10)  # 3


def test_overwriting_moves_the_cursor_and_not_the_size():
    table = limiter(samples_per_insert=2.0, min_size=4, error_buffer=5.0)
    table.inserted(4)
    table.inserted(1)
    table.deleted(1)
    assert (table.size, table.cursor) == (4, 10.0)


def test_below_the_minimum_size_inserts_pass_whatever_the_cursor():
    table = limiter(samples_per_insert=2.0, min_size=4, error_buffer=5.0)
    table.inserted(6)  # cursor 12
    table.deleted(4)  # size 2, cursor 12
    assert not table.can_sample(1)  # size 2
    assert table.num_insertable(3) == 2  # cursor 16 > 13, but size 4


def test_a_pair_is_the_bounds_themselves():
    assert SampleToInsertRatio(1.0, 1, (0.0, 5.0)).bounds == (0.0, 5.0)
    assert SampleToInsertRatio(8.0, 1000, 100.0).bounds == (7900.0, 8100.0)


@given(
    st.floats(0.1, 32.0),
    st.integers(1, 50),
    st.floats(1.01, 4.0),
    st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=200),
)
def test_no_sequence_of_granted_requests_leaves_the_bounds(ratio, min_size, slack, requests):
    config = SampleToInsertRatio(ratio, min_size, slack * max(1.0, ratio))
    min_diff, max_diff = config.bounds
    table = RateLimiter(config)
    for is_insert, n in requests:
        if is_insert:
            table.inserted(table.num_insertable(n))
            assert table.size <= min_size or table.cursor <= max_diff
        elif not is_insert and table.can_sample(n):
            table.sampled(n)
            assert table.size >= min_size
            assert table.cursor >= min_diff
        # Requests of one, Reverb's only kind, never wait for each other.
        assert table.num_insertable(1) or table.can_sample(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 0, 10.0), "min_size_to_sample is 0; expected at least 1"),
        ((0.0, 1, 10.0), "samples_per_insert is 0.0"),
        ((math.nan, 1, 10.0), "samples_per_insert is nan"),
        ((math.inf, 1, 10.0), "samples_per_insert is inf"),
        ((8.0, 1000, 7.9), r"from 7992.1 to 8007.9; expected a range of at least 16.0"),
        ((0.5, 1000, 0.9), r"expected a range of at least 2.0"),
        ((1.0, 10, math.nan), r"expected a range of at least 2.0"),
        ((1.0, 10, (5.0, 1.0)), r"from 5.0 to 1.0; expected a range of at least 2.0"),
        ((2.0, 10, (21.0, 99.0)), r"min_diff 21.0, so sampling would never start; expected at most 20.0"),
    ],
)
def test_bounds_that_would_block_for_ever_are_refused(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        SampleToInsertRatio(*arguments)


def test_the_narrowest_error_buffer_is_reverbs():
    SampleToInsertRatio(8.0, 1000, 8.0)
    SampleToInsertRatio(0.5, 1000, 1.0)


def test_a_minimum_size_below_one_is_refused():
    with pytest.raises(InvalidInput, match="min_size_to_sample is 0"):
        MinSize(0)


@given(st.floats(0.1, 32.0), st.integers(1, 50), st.floats(1.01, 4.0), st.integers(0, 99), st.integers(0, 999))
def test_a_commit_passes_as_far_as_its_items_would_one_by_one(ratio, min_size, slack, num_items, num_samples):
    config = SampleToInsertRatio(ratio, min_size, slack * max(1.0, ratio))
    table = RateLimiter(config)
    table.sampled(num_samples)
    passing = table.num_insertable(num_items)
    for _ in range(passing):
        assert table.num_insertable(1) == 1
        table.inserted(1)
    assert passing == num_items or table.num_insertable(1) == 0


def test_a_batch_that_learner_and_writers_could_both_wait_for_is_refused_at_once():
    table = limiter(error_buffer=100.0)
    table.check_sample_possible(192)
    with pytest.raises(InvalidInput, match=r"193 \+ samples_per_insert 8.0 > 200.0 = .*; sample at most 192"):
        table.check_sample_possible(193)


@given(st.floats(0.1, 32.0), st.integers(1, 50), st.floats(1.01, 9.0), st.lists(st.booleans(), max_size=300))
def test_somebody_can_always_go_on_with_a_batch_that_is_not_refused(ratio, min_size, slack, inserts):
    table = RateLimiter(SampleToInsertRatio(ratio, min_size, slack * max(1.0, ratio)))
    batch_size = math.floor(2 * slack * max(1.0, ratio) - ratio - 1e-9)
    if batch_size < 1:
        return
    table.check_sample_possible(batch_size)
    for is_insert in inserts:
        if is_insert:
            table.inserted(table.num_insertable(1))
        elif table.can_sample(batch_size):
            table.sampled(batch_size)
        assert table.num_insertable(1) or table.can_sample(batch_size)


def test_min_size_refuses_no_request():
    table = RateLimiter(MinSize())
    table.inserted(1)
    table.check_sample_possible(10**9)


def test_the_explanation_says_what_is_missing():
    table = limiter()  # 7900 <= cursor <= 8100
    table.inserted(812)
    assert table.explain_sample(1) == "sampling waits: 812 of 1000 items"
    table.inserted(188)  # cursor 8000
    assert table.explain_sample(256) == (
        "sampling waits: cursor 8000.0 - 256 < 7900.0 = min_diff; the writers must insert 20 more"
    )
    assert table.explain_insert(64) == (
        "inserting waits: cursor 8000.0 + 64 * 8.0 > 8100.0 = max_diff; the learner must sample 412 more"
    )


@pytest.mark.parametrize(("ratio", "n"), [(8.0, 20), (0.3, 7), (1.7, 30)])
def test_what_the_explanation_asks_for_is_enough_and_nothing_less_is(ratio, n):
    table = limiter(ratio, 100, 60.0)
    table.inserted(100 + int(50 / ratio))
    missing = int(table.explain_insert(n).split()[-2])
    table.sampled(missing - 1)
    assert table.num_insertable(n) < n
    table.sampled(1)
    assert table.num_insertable(n) == n

    table = limiter(ratio, 100, 60.0)
    table.inserted(100)
    table.sampled(60 - n)
    missing = int(table.explain_sample(2 * n).split()[-2])
    table.inserted(missing - 1)
    assert not table.can_sample(2 * n)
    table.inserted(1)
    assert table.can_sample(2 * n)


def test_a_commit_across_the_minimum_size_passes_as_far_as_sampling_needs():
    table = limiter(samples_per_insert=8.0, min_size=1000, error_buffer=100.0)
    table.inserted(990)  # cursor 7920, size 990: no sample can lower the cursor
    assert table.num_insertable(64) == 22  # size 1012, cursor 8096
    table.inserted(22)
    assert table.can_sample(100)


@pytest.mark.parametrize(
    "config",
    [
        MinSize(5),
        SampleToInsertRatio(8.0, 9, 50.0),
        SampleToInsertRatio(8.0, 9, (1.0, 90.0)),
        Queue(7),
        Stack(7),
    ],
)
def test_configs_travel_in_a_tagged_union(config):
    wire = msgspec.msgpack.encode(config)
    assert msgspec.msgpack.decode(wire, type=LimiterConfig) == config


def test_a_bad_config_is_refused_when_it_arrives():
    with pytest.raises(msgspec.ValidationError, match="min_size_to_sample is 0"):
        msgspec.json.decode(b'{"type": "MinSize", "min_size_to_sample": 0}', type=LimiterConfig)


# ---- against the rules as Reverb states them -----------------------------------------------------------------------


class Model:
    """The two rules, item by item, from lists of what happened."""

    def __init__(self, ratio, min_size, min_diff, max_diff):
        self.ratio, self.min_size, self.min_diff, self.max_diff = ratio, min_size, min_diff, max_diff
        self.inserts = self.samples = self.deletes = 0

    def may_insert(self, n):
        if self.inserts - self.deletes + n <= self.min_size:
            return True
        return (self.inserts + n) * self.ratio - self.samples <= self.max_diff

    def may_sample(self, n):
        if self.inserts - self.deletes < self.min_size:
            return False
        return self.inserts * self.ratio - self.samples - n >= self.min_diff


ratios = st.sampled_from([0.1, 0.25, 0.3, 1.0, 1.7, 3.0, 8.0]) | st.floats(0.05, 32.0)


@st.composite
def configs(draw):
    """A config, and the numbers that its model takes."""
    kind = draw(st.sampled_from([MinSize, SampleToInsertRatio, Queue, Stack]))
    if kind is MinSize:
        min_size = draw(st.integers(1, 20))
        return MinSize(min_size), (1.0, min_size, -math.inf, math.inf)
    if kind in (Queue, Stack):
        capacity = draw(st.integers(1, 20))
        return kind(capacity), (1.0, 1, 0.0, float(capacity))
    ratio, min_size = draw(ratios), draw(st.integers(1, 20))
    least = max(1.0, ratio)
    if draw(st.booleans()):
        error_buffer = draw(st.floats(1.0, 5.0)) * least
        centre = ratio * min_size
        if (centre + error_buffer) - (centre - error_buffer) < 2 * least:  # rounding at the narrowest
            error_buffer *= 1.01
        return SampleToInsertRatio(ratio, min_size, error_buffer), (
            ratio,
            min_size,
            centre - error_buffer,
            centre + error_buffer,
        )
    low = draw(st.floats(-20.0, ratio * min_size))
    high = low + 2 * least * draw(st.floats(1.01, 5.0))
    return SampleToInsertRatio(ratio, min_size, (low, high)), (ratio, min_size, low, high)


requests = st.lists(st.tuples(st.sampled_from(["insert", "sample", "delete"]), st.integers(1, 30)), max_size=100)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(configs(), requests)
def test_what_passes_is_what_the_rules_let_pass(config_and_numbers, played):
    config, numbers = config_and_numbers
    table, model = RateLimiter(config), Model(*numbers)
    for request, n in played:
        if request == "insert":
            passing = table.num_insertable(n)
            for number in range(n):
                assert model.may_insert(1) == (number < passing)
                if number == passing:
                    break
                model.inserts += 1
            table.inserted(passing)
        elif request == "sample":
            assert table.can_sample(n) == model.may_sample(n)
            if model.may_sample(n):
                model.samples += n
                table.sampled(n)
        else:
            num_deleted = min(n, model.inserts - model.deletes)
            model.deletes += num_deleted
            table.deleted(num_deleted)
        assert (table.num_inserts, table.num_samples, table.size) == (
            model.inserts,
            model.samples,
            model.inserts - model.deletes,
        )
        assert table.cursor == model.inserts * model.ratio - model.samples


def test_a_quotient_that_is_rounded_down_holds_no_item_back():
    """(8.3 + 0) / 0.1 is 83.00000000000001 or 82.99999999999999, depending on the numbers; the rule knows better."""
    held_back = []
    for tenths in range(20, 400):
        table = RateLimiter(SampleToInsertRatio(0.1, 1, (-2.0, tenths * 0.1)))
        passing = next(n for n in range(500) if (n + 1) * 0.1 > tenths * 0.1)
        held_back.append(passing - table.num_insertable(500))
    assert held_back == [0] * len(held_back)


# ---- by hand -------------------------------------------------------------------------------------------------------


def play(table, *steps):
    """Each step is (what, n, how many of n pass)."""
    for number, (what, n, expected) in enumerate(steps):
        if what == "insert":
            passing = table.num_insertable(n)
            table.inserted(passing)
        elif what == "sample":
            passing = n * table.can_sample(n)
            table.sampled(passing)
        elif what == "clear":
            passing = n
            table.cleared(n)
        else:
            passing = n
            table.deleted(n)
        assert passing == expected, f"step {number}: {passing} of {what} {n} passed, cursor {table.cursor}"


def test_a_ratio_by_hand():
    play(
        RateLimiter(SampleToInsertRatio(4.0, 3, 6.0)),  # 6 <= cursor <= 18
        ("sample", 1, 0),  # size 0
        ("insert", 2, 2),  # size 2, cursor 8
        ("sample", 1, 0),  # size 2
        ("insert", 9, 2),  # size 4, cursor 16; the next would be 20
        ("sample", 11, 0),  # 16 - 11 = 5
        ("sample", 10, 10),  # cursor 6
        ("sample", 1, 0),  # 5
        ("insert", 4, 3),  # cursor 18; the next would be 22
        ("delete", 3, 3),  # size 4: overwriting leaves the cursor at 18
        ("insert", 1, 0),  # 22
        ("delete", 2, 2),  # size 2, cursor 18
        ("sample", 1, 0),  # size 2
        ("insert", 2, 1),  # size 3, cursor 22: the minimum passes whatever the cursor
        ("sample", 16, 16),  # cursor 6
    )


def test_a_queue_by_hand():
    table = RateLimiter(Queue(3))
    play(
        table,
        ("sample", 1, 0),  # cursor 0
        ("insert", 5, 3),  # cursor 3
        ("sample", 4, 0),  # 3 - 4 = -1
        ("sample", 2, 2),  # cursor 1
        ("delete", 2, 2),  # size 1: with their only use they are gone
        ("insert", 5, 2),  # cursor 3, size 3
        ("clear", 3, 3),  # size 0, cursor 0: nobody will take them
        ("insert", 5, 3),  # cursor 3
        ("sample", 3, 3),  # cursor 0
        ("delete", 3, 3),  # size 0
    )
    assert (table.num_inserts, table.num_samples, table.cursor, table.size) == (8, 5, 0.0, 0)


def test_another_limiter_counts_as_if_the_table_had_just_been_filled():
    table = RateLimiter(MinSize(2))
    play(table, ("insert", 100, 100), ("sample", 1000, 1000), ("delete", 90, 90))  # size 10
    table.set(SampleToInsertRatio(2.0, 4, 4.0))  # 4 <= cursor <= 12
    assert (table.cursor, table.size, table.num_inserts, table.num_samples) == (8.0, 10, 100, 1000)
    play(
        table,
        ("insert", 5, 2),  # cursor 12
        ("sample", 9, 0),  # 3
        ("sample", 8, 8),  # cursor 4
    )
    table.set(Queue(20))
    assert table.cursor == table.size == 12
    table.set(SampleToInsertRatio(1.0, 50, (0.0, 60.0)))  # size 12 is below the minimum
    assert table.cursor == 12.0
    play(table, ("sample", 1, 0), ("insert", 40, 40))  # size 52, cursor 52


@given(configs(), configs(), requests)
def test_restored_counters_and_rules_are_the_same(before, after, played):
    table = RateLimiter(before[0])
    for what, n in played:
        if what == "insert":
            table.inserted(table.num_insertable(n))
        elif what == "sample" and table.can_sample(n):
            table.sampled(n)
            table.deleted(min(n, table.size) if isinstance(before[0], Queue | Stack) else 0)
    table.set(after[0])
    again = RateLimiter(before[0])
    again.restore(msgspec.json.decode(msgspec.json.encode(table.state())))
    assert vars(again) == vars(table)


def test_the_largest_batch_of_a_queue_is_all_of_it():
    RateLimiter(Queue(8)).check_sample_possible(8)
    with pytest.raises(InvalidInput, match=r"a batch of 9 items could never pass Queue\(8\)"):
        RateLimiter(Queue(8)).check_sample_possible(9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Queue(0), "capacity is 0; expected at least 1"),
        (lambda: Stack(-3), "capacity is -3; expected at least 1"),
        (lambda: Queue(2.5), "capacity is 2.5; expected an integer"),
        (lambda: MinSize(1.5), "min_size_to_sample is 1.5; expected an integer"),
        (lambda: SampleToInsertRatio("x", 1, 8.0), "samples_per_insert is 'x'; expected a number"),
        (lambda: SampleToInsertRatio(1.0, 1, "wide"), "error_buffer is 'wide'; expected a number"),
        (lambda: SampleToInsertRatio(1.0, 1, (0.0,)), r"error_buffer is \(0.0,\); expected a number or \(min_diff"),
        (lambda: SampleToInsertRatio(1.0, 1, math.inf), "error_buffer is inf; expected finite numbers, or use MinSize"),
        (lambda: SampleToInsertRatio(1.0, 1, (0.0, math.inf)), "expected finite numbers, or use MinSize"),
    ],
)
def test_what_is_not_a_limiter_is_refused_with_the_value(make, message):
    with pytest.raises(InvalidInput, match=message):
        make()


def test_numbers_of_numpy_and_lists_become_plain_ones_that_travel():
    config = SampleToInsertRatio(np.float32(2.0), np.int64(3), [np.float64(0.0), 9])
    assert msgspec.structs.astuple(config) == (2.0, 3, (0.0, 9.0))
    assert msgspec.json.decode(msgspec.json.encode(config), type=LimiterConfig) == config


def test_a_limiter_describes_itself_in_plain_values():
    table = RateLimiter(SampleToInsertRatio(2.0, 4, 5.0))
    table.inserted(4)
    assert table.describe() == {
        "kind": "SampleToInsertRatio",
        "parameters": {"samples_per_insert": 2.0, "min_size_to_sample": 4, "error_buffer": 5.0},
        "cursor": 8.0,
        "min_diff": 3.0,
        "max_diff": 13.0,
        "min_size": 4,
    }
    unbounded = RateLimiter(MinSize(4)).describe()
    assert (unbounded["min_diff"], unbounded["max_diff"]) == (None, None)


def test_a_queue_says_how_full_it_is():
    table = RateLimiter(Queue(8))
    table.inserted(3)
    assert table.explain_sample(4) == "sampling waits: 3 of 4 items"
    table.inserted(5)
    assert table.explain_insert(2) == "inserting waits: 8 of 8 items are there and not taken"
