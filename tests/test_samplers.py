import math
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_buffer.errors import InvalidInput
from rl_buffer.samplers import Prioritized, Uniform, make_sampler

CONFIGS = [Uniform(), Prioritized()]


def ints(*values):
    return np.array(values, np.int64)


def floats(*values):
    return np.array(values, np.float64)


def prioritized(*td_errors, alpha=1.0, epsilon=1e-6, num_rows=None):
    sampler = make_sampler(Prioritized(alpha, epsilon), num_rows or len(td_errors))
    sampler.insert(np.arange(len(td_errors)), floats(*td_errors))
    return sampler


def chi_square_statistic(counts, probabilities):
    expected = counts.sum() * probabilities
    return ((counts - expected) ** 2 / expected).sum()


def counts_of(sampler, num_rows, seed, batch_size=1):
    rng = np.random.default_rng(seed)
    num_batches = 64_000 // batch_size
    if batch_size == 1:
        # Spares are independent of each other, as the chi-square distribution assumes.
        rows = sampler.draw(1, rng, num_spares=num_batches - 1).rows
    else:
        rows = np.concatenate([sampler.draw(batch_size, rng).rows for _ in range(num_batches)])
    return np.bincount(rows, minlength=num_rows)


# 99.9 % of the chi-square distribution with 99 degrees of freedom lies below: scipy.stats.chi2.ppf(0.999, 99).
CRITICAL_99 = 148.23
TD_ERRORS = np.linspace(-3.0, 3.0, 100)


def test_prioritized_frequencies_are_those_of_the_masses():
    sampler = prioritized(*TD_ERRORS, alpha=0.6, epsilon=0.01)
    masses = (np.abs(TD_ERRORS) + 0.01) ** 0.6
    counts = counts_of(sampler, 100, seed=0)
    assert chi_square_statistic(counts, masses / masses.sum()) < CRITICAL_99


@pytest.mark.parametrize("wrong_alpha", [0.0, 0.5, 0.78])
def test_the_frequency_test_rejects_a_sampler_with_another_distribution(wrong_alpha):
    sampler = prioritized(*TD_ERRORS, alpha=wrong_alpha, epsilon=0.01)
    masses = (np.abs(TD_ERRORS) + 0.01) ** 0.6
    counts = counts_of(sampler, 100, seed=0)
    assert chi_square_statistic(counts, masses / masses.sum()) > CRITICAL_99


def test_uniform_frequencies_are_equal():
    sampler = make_sampler(Uniform(), 120)
    sampler.insert(np.arange(120), None)
    sampler.remove(np.arange(0, 120, 6))
    counts = counts_of(sampler, 120, seed=0)
    assert (counts[::6] == 0).all()
    assert chi_square_statistic(counts[counts > 0], np.full(100, 0.01)) < CRITICAL_99


def test_stratification_leaves_the_frequencies_and_lowers_their_variance():
    sampler = prioritized(*TD_ERRORS, alpha=0.6, epsilon=0.01)
    masses = (np.abs(TD_ERRORS) + 0.01) ** 0.6
    counts = counts_of(sampler, 100, seed=0, batch_size=64)
    # Independent draws have an expectation of 99; 1000 batches of 64 strata stay far below.
    assert chi_square_statistic(counts, masses / masses.sum()) < 99


@pytest.mark.parametrize("seed", range(5))
def test_each_equal_part_of_the_total_gives_one_draw_of_the_batch(seed):
    sampler = prioritized(*np.ones(8), epsilon=1.0)
    draws = sampler.draw(8, np.random.default_rng(seed), num_spares=3)
    assert draws.rows[:8].tolist() == list(range(8))
    assert draws.rows.shape == draws.masses.shape == (11,)
    assert draws.total == 16.0


def test_masses_are_the_priorities_to_the_power_of_alpha():
    sampler = prioritized(0.0, 3.0, -15.0, alpha=0.5, epsilon=1.0)
    assert sampler.masses_of(ints(0, 1, 2)).tolist() == [1.0, 2.0, 4.0]
    draws = sampler.draw(100, np.random.default_rng(0))
    assert draws.masses.tolist() == floats(1.0, 2.0, 4.0)[draws.rows].tolist()
    assert draws.total == 7.0


def test_update_and_insert_give_the_same_mass():
    inserted = prioritized(-0.3, 7.0, alpha=0.6)
    updated = prioritized(1.0, 1.0, alpha=0.6)
    updated.update(ints(1, 0), floats(7.0, -0.3))
    assert inserted.masses_of(ints(0, 1)).tolist() == updated.masses_of(ints(0, 1)).tolist()


def test_rows_without_a_priority_get_the_largest_live_one():
    sampler = make_sampler(Prioritized(alpha=1.0, epsilon=1.0), 10)
    sampler.insert(ints(0, 1), None)
    assert sampler.masses_of(ints(0, 1)).tolist() == [1.0, 1.0]
    sampler.insert(ints(2, 3, 4), floats(4.0, math.nan, 99.0))  # 1.0 was the largest before this call
    assert sampler.masses_of(ints(2, 3, 4)).tolist() == [5.0, 1.0, 100.0]
    sampler.insert(ints(5), None)
    assert sampler.masses_of(ints(5)).tolist() == [100.0]
    sampler.remove(ints(4, 5))  # the outliers
    sampler.insert(ints(6), None)
    assert sampler.masses_of(ints(6)).tolist() == [5.0]


def test_an_update_names_a_row_twice_and_the_last_counts():
    sampler = prioritized(1.0, 1.0, epsilon=1.0)
    sampler.update(ints(0, 1, 0), floats(5.0, 6.0, 7.0))
    assert sampler.masses_of(ints(0, 1)).tolist() == [8.0, 7.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_an_update_that_is_not_finite_is_refused_and_changes_nothing(bad, alpha):
    sampler = prioritized(1.0, 2.0, 3.0, alpha=alpha)
    before = sampler.masses_of(np.arange(3)).tolist()
    with pytest.raises(InvalidInput, match=f"TD error {bad} at position 1; expected a finite number"):
        sampler.update(ints(0, 1), floats(5.0, bad))
    assert sampler.masses_of(np.arange(3)).tolist() == before


def test_an_infinite_initial_td_error_is_refused_and_changes_nothing():
    sampler = make_sampler(Prioritized(), 3)
    with pytest.raises(InvalidInput, match="TD error inf at position 2"):
        sampler.insert(ints(0, 1, 2), floats(1.0, math.nan, math.inf))
    assert sampler.num_items == 0


def test_a_mass_that_would_overflow_the_total_is_refused():
    sampler = prioritized(1.0, alpha=3.0)
    with pytest.raises(
        InvalidInput,
        match=r"TD error 1e\+150 at position 0; expected a finite number of at most 4.64e\+66 at alpha 3.0",
    ):
        sampler.update(ints(0), floats(1e150))
    assert sampler.masses_of(ints(0))[0] == pytest.approx(1.0, rel=1e-5)


def test_an_item_whose_mass_would_vanish_stays_live():
    sampler = prioritized(0.0, alpha=100.0)  # 1e-600 without the floor
    assert sampler.num_items == 1
    assert sampler.draw(4, np.random.default_rng(0)).rows.tolist() == [0, 0, 0, 0]


def test_an_update_does_not_bring_a_removed_row_back():
    sampler = prioritized(1.0, 2.0, 3.0)
    sampler.remove(ints(1))
    with pytest.raises(InvalidInput, match="row 1 at position 1 is not live"):
        sampler.update(ints(0, 1), floats(9.0, 9.0))
    assert sampler.num_items == 2
    assert sampler.masses_of(ints(0))[0] == pytest.approx(1.0, rel=1e-5)


def test_a_uniform_table_refuses_priorities():
    sampler = make_sampler(Uniform(), 3)
    sampler.insert(ints(0), floats(4.0))
    with pytest.raises(InvalidInput, match="a uniform table has no priorities"):
        sampler.update(ints(0), floats(1.0))


def test_uniform_draws_have_mass_one():
    sampler = make_sampler(Uniform(), 9)
    sampler.insert(ints(2, 4, 8), None)
    draws = sampler.draw(5, np.random.default_rng(0), num_spares=2)
    assert draws.masses.tolist() == [1.0] * 7
    assert draws.total == 3.0


@pytest.mark.parametrize("config", CONFIGS)
@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(0, 19), unique=True, max_size=20)),
        max_size=12,
    )
)
def test_exactly_the_live_rows_are_drawn(config, steps):
    sampler, live = make_sampler(config, 20), set()
    rng = np.random.default_rng(0)
    for inserts, batch in steps:
        if inserts:
            sampler.insert(ints(*batch), None)
            live |= set(batch)
        else:
            sampler.remove(ints(*batch))
            live -= set(batch)
        assert sampler.num_items == len(live)
        if live:
            # A live row is missed by 400 independent draws with probability 20 * 0.95^400 < 1e-7 at most.
            assert set(sampler.draw(1, rng, num_spares=400).rows.tolist()) == live


@pytest.mark.parametrize("config", CONFIGS)
def test_the_same_seed_draws_the_same_rows(config):
    sampler = make_sampler(config, 50)
    sampler.insert(np.arange(50), None)
    first, again = (sampler.draw(32, np.random.default_rng(7), num_spares=8).rows for _ in range(2))
    assert first.tolist() == again.tolist()


@pytest.mark.parametrize("config", CONFIGS)
def test_an_empty_sampler_refuses_to_draw(config):
    sampler = make_sampler(config, 5)
    with pytest.raises(InvalidInput, match="the table is empty"):
        sampler.draw(1, np.random.default_rng(0))
    sampler.insert(ints(1), None)
    sampler.remove(ints(1))
    with pytest.raises(InvalidInput, match="the table is empty"):
        sampler.draw(1, np.random.default_rng(0))


@pytest.mark.parametrize("config", CONFIGS)
def test_a_draw_of_nothing_is_refused(config):
    sampler = make_sampler(config, 5)
    sampler.insert(ints(1), None)
    with pytest.raises(InvalidInput, match="num_draws is 0"):
        sampler.draw(0, np.random.default_rng(0))


@pytest.mark.parametrize("config", CONFIGS)
def test_a_row_out_of_range_is_refused_and_changes_nothing(config):
    sampler = make_sampler(config, 5)
    with pytest.raises(InvalidInput, match="5 at position 1; expected 0 <="):
        sampler.insert(ints(1, 5), None)
    assert sampler.num_items == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, "alpha is -0.1; expected a finite number >= 0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"alpha": math.inf}, "alpha is inf"),
        ({"epsilon": 0.0}, "epsilon is 0.0; expected a finite number > 0"),
        ({"epsilon": math.inf}, "epsilon is inf"),
    ],
)
def test_a_config_without_a_distribution_is_refused(arguments, message):
    with pytest.raises(InvalidInput, match=message):
        Prioritized(**arguments)


@pytest.mark.parametrize("config", [Uniform(), Prioritized(0.7, 0.1)])
def test_configs_travel_in_a_tagged_union(config):
    wire = msgspec.msgpack.encode(config)
    assert msgspec.msgpack.decode(wire, type=Uniform | Prioritized) == config


def test_naming_a_config_does_not_load_numba():
    code = "import sys; from rl_buffer.samplers import Prioritized; Prioritized(); assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
