"""Powers against the C library's."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_buffer.powers import power

power(1.0, 1.0)  # compiles it, which takes a second

# Both ends of what a float64 holds in full precision.
bases = st.floats(2.0**-1022, 2.0**1023)


@given(bases, st.floats(-1.0, 1.0))
def test_a_power_is_that_of_the_c_library(base, exponent):
    # As near as the exponent of 2 can be told: 10 bits of it leave the fraction 42.
    assert power(base, exponent) == pytest.approx(math.pow(base, exponent), rel=2e-13)


@given(st.floats(0.01, 100.0), st.floats(0.0, 1.0))
def test_of_ordinary_numbers_it_differs_in_the_last_digits_only(base, exponent):
    assert power(base, exponent) == pytest.approx(math.pow(base, exponent), rel=3e-15)


@given(bases)
def test_one_and_the_exponent_zero_give_exactly_one(number):
    assert power(number, 0.0) == 1.0
    assert power(1.0, min(number, 1e6)) == 1.0


@given(st.floats(1e-3, 1e3), st.floats(1.0, 1.5), st.floats(0.1, 1.0))
def test_a_larger_base_has_no_smaller_power_but_for_rounding(base, factor, exponent):
    assert power(base * factor, exponent) >= power(base, exponent) * (1 - 1e-14)


def test_what_a_float_cannot_hold_is_the_nearest_that_it_can():
    assert power(1e-300, 3.0) == 2.0**-1022
    assert power(1e300, 3.0) == 2.0**1023
    # Of numbers below full precision something is left that is above zero and tiny.
    assert 0.0 < power(5e-324, 1.0) < 1e-307
    assert power(0.0, 1.0) < 1e-307


@pytest.mark.parametrize("size", [1, 7, 256])
def test_vectors_hold_the_same_numbers_as_single_calls(size):
    from rl_buffer.priority_updates import to_masses

    magnitudes = np.random.default_rng(0).lognormal(0.0, 5.0, size)
    masses = magnitudes.copy()
    to_masses(masses, 0.6)
    assert masses == pytest.approx([power(magnitude, 0.6) for magnitude in magnitudes], rel=1e-15)
