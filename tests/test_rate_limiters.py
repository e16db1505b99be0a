import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_buffer.errors import InvalidInput
from rl_buffer.rate_limiters import MinSize, RateLimiter, SampleToInsertRatio


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
    "config", [MinSize(5), SampleToInsertRatio(8.0, 9, 50.0), SampleToInsertRatio(8.0, 9, (1.0, 90.0))]
)
def test_configs_travel_in_a_tagged_union(config):
    wire = msgspec.msgpack.encode(config)
    assert msgspec.msgpack.decode(wire, type=MinSize | SampleToInsertRatio) == config


def test_a_bad_config_is_refused_when_it_arrives():
    with pytest.raises(msgspec.ValidationError, match="min_size_to_sample is 0"):
        msgspec.json.decode(b'{"type": "MinSize", "min_size_to_sample": 0}', type=MinSize | SampleToInsertRatio)
