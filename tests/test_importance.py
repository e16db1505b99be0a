"""Importance weights against hand-computed numbers and the identity that they are for."""

import math

import numpy as np
import pytest

from rl_buffer.errors import InvalidInput
from rl_buffer.importance import importance_weights


def test_importance_weights_by_hand():
    # 4 items, total 8: num_items * mass / total = 0.5, 1, 2; to the power of -1/2, over the largest.
    weights = importance_weights(np.array([1.0, 2.0, 4.0]), beta=0.5)
    assert weights.dtype == np.float32
    assert weights == pytest.approx([1.0, math.sqrt(0.5), 0.5])


def test_importance_weights_of_equal_masses_or_without_correction_are_one():
    assert importance_weights(np.full(5, 0.3), beta=1.0).tolist() == [1.0] * 5
    assert importance_weights(np.array([1.0, 9.0]), beta=0.0).tolist() == [1.0, 1.0]


def test_full_importance_weights_make_the_prioritized_mean_that_of_the_uniform_draw():
    masses, values = np.array([1.0, 2.0, 5.0]), np.array([3.0, -1.0, 4.0])
    weights = importance_weights(masses, beta=1.0).astype(np.float64)
    probabilities = masses / masses.sum()
    assert (probabilities * weights * values).sum() / (probabilities * weights).sum() == pytest.approx(2.0)


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan, math.inf])
def test_a_beta_out_of_range_is_refused(beta):
    with pytest.raises(InvalidInput, match=rf"beta must be in \[0, 1\], got {beta}"):
        importance_weights(np.array([1.0]), beta)
