"""Running moments against NumPy over everything at once, and discounted returns against the plain sum."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from learner.normalization import DiscountedReturns, RunningMoments

torch.set_num_threads(1)


def test_moments_of_parts_are_those_of_everything_at_once():
    rng = np.random.default_rng(0)
    parts = [rng.normal(1e4, [1.0, 0.01], (num, 2)) for num in (1, 2, 100, 7)]
    moments = RunningMoments((2,))
    for part in parts:
        moments.update(torch.from_numpy(part))
    everything = np.concatenate(parts)
    assert moments.count == len(everything)
    assert moments.mean.numpy() == pytest.approx(everything.mean(0), rel=1e-12)
    assert moments.deviation.numpy() == pytest.approx(np.sqrt(everything.var(0) + 1e-8), rel=1e-5)


def test_before_the_first_value_nothing_is_changed_and_a_constant_does_not_divide_by_zero():
    moments = RunningMoments((3,))
    values = torch.randn(4, 3)
    assert torch.equal(moments.standardized(values, 10.0), values)
    moments.update(torch.full((5, 3), 2.0))
    assert torch.equal(moments.standardized(torch.full((1, 3), 2.0), 10.0), torch.zeros(1, 3))


def test_what_is_far_out_is_cut_off_at_the_limit():
    moments = RunningMoments()
    moments.update(torch.tensor([-1.0, 1.0]))
    assert moments.standardized(torch.tensor([-50.0, 0.5, 50.0]), 5.0).tolist() == pytest.approx([-5.0, 0.5, 5.0])


def test_moments_travel_with_the_parameters():
    one, other = RunningMoments((2,)), RunningMoments((2,))
    one.update(torch.randn(9, 2))
    other.load_state_dict(one.state_dict())
    values = torch.randn(4, 2)
    assert torch.equal(one.standardized(values, 10.0), other.standardized(values, 10.0))


GAMMA = 0.5


def fragments(writers, rewards, ended, mask):
    """Columns side by side, as `rb.Rollouts` has them."""
    arrays = {"rewards": np.array(rewards, np.float32).T, "ended": np.array(ended, bool).T}
    return SimpleNamespace(writers=np.array(writers), mask=np.array(mask, bool).T, **arrays)


def test_returns_are_discounted_within_episodes_and_go_on_in_the_same_writers_next_fragment():
    discounted = DiscountedReturns(GAMMA)
    # Writer 1: an episode of two steps, a dummy step, another of one so far. Writer 4: one without an end.
    first = fragments(
        [1, 4],
        rewards=[[1, 2, 99, 8], [1, 1, 1, 1]],
        ended=[[0, 1, 0, 0], [0, 0, 0, 0]],
        mask=[[1, 1, 0, 1], [1, 1, 1, 1]],
    )
    # Step by step, writer 1 beside writer 4: G = r + G / 2.
    assert discounted.of(first).tolist() == [1, 1, 2.5, 1.5, 1.75, 8, 1.875]
    # The next of writer 4 comes first, alone, and ends; then both.
    assert discounted.of(fragments([4], [[1, 0]], [[0, 1]], [[1, 1]])).tolist() == [1.9375, 0.96875]
    assert discounted.of(fragments([1, 4], [[0], [3]], [[0], [0]], [[1], [1]])).tolist() == [4, 3]
