"""GAE: hand-computed rollouts, the identities of lambda = 0 and 1, and the sum of equation 16 written out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_buffer.errors import InvalidInput
from rl_buffer.gae import explained_variance, generalized_advantages

NAN = float("nan")


def column(values, dtype=np.bool_):
    return np.array(values, dtype)[:, None]


def gae_of(
    rewards,
    values,
    last_value,
    *,
    terminated=(),
    truncated=(),
    dummies=(),
    finals=None,
    gamma=0.5,
    gae_lambda=0.5,
    **options,
):
    """(advantages, returns) of one environment; the flags are given as the steps at which they hold."""
    steps = np.arange(len(rewards))
    advantages, returns = generalized_advantages(
        column(rewards, np.float32),
        column(values, np.float32),
        column(np.isin(steps, terminated)),
        column(np.isin(steps, truncated)),
        column(~np.isin(steps, dummies)),
        column([(finals or {}).get(step, NAN) for step in steps], np.float32),
        np.array([last_value], np.float64),
        gamma=gamma,
        gae_lambda=gae_lambda,
        **options,
    )
    return advantages[:, 0].tolist(), returns[:, 0].tolist()


# By hand: gamma = lambda = 1/2, so A_t = delta_t + A_{t+1} / 4.


def test_without_an_end_the_recursion_starts_at_last_values():
    # deltas: 1 + 4/2 - 2 = 1;  2 + 8/2 - 4 = 2;  4 + 16/2 - 8 = 4
    advantages, returns = gae_of([1, 2, 4], [2, 4, 8], 16)
    assert advantages == [1 + 3 / 4, 2 + 4 / 4, 4]
    assert returns == [2 + 1.75, 4 + 3, 8 + 4]


def test_a_termination_cuts_the_bootstrap_and_the_recursion():
    # deltas: 1;  2 + 0 - 4 = -2;  4
    assert gae_of([1, 2, 4], [2, 4, 8], 16, terminated=[1])[0] == [1 - 2 / 4, -2, 4]


def test_a_truncation_cuts_the_recursion_and_bootstraps_from_the_final_value():
    # deltas: 1;  2 + 10/2 - 4 = 3;  4
    assert gae_of([1, 2, 4], [2, 4, 8], 16, truncated=[1], finals={1: 10})[0] == [1 + 3 / 4, 3, 4]


def test_where_both_flags_are_true_the_episode_terminated():
    both = gae_of([1, 2, 4], [2, 4, 8], 16, terminated=[1], truncated=[1], finals={1: 10})
    assert both == gae_of([1, 2, 4], [2, 4, 8], 16, terminated=[1])
    assert gae_of([1], [2], 16, terminated=[0], truncated=[0])[0] == [1 - 2]


def test_a_dummy_brings_the_value_of_the_true_final_observation_and_has_no_advantage():
    # deltas: 1;  2 + 8/2 - 4 = 2 from the dummy's value 8;  the dummy;  8 + 16/2 - 32 = -16
    advantages, returns = gae_of([1, 2, 99, 8], [2, 4, 8, 32], 16, truncated=[1], dummies=[2])
    assert advantages == [1 + 2 / 4, 2, 0, -16]
    assert returns == [2 + 1.5, 4 + 2, 8, 32 - 16]


def test_a_given_final_value_comes_before_that_of_the_dummy():
    assert gae_of([2, 0], [4, 8], 16, truncated=[0], dummies=[1], finals={0: 10})[0] == [3, 0]


def test_a_row_masked_out_after_no_end_bootstraps_and_joins_nothing():
    # The delta before it takes its value; what comes after it does not reach back.
    assert gae_of([1, 0, 4], [2, 4, 8], 16, dummies=[1])[0] == [1, 0, 4]


def test_the_flags_of_a_row_that_is_masked_out_are_not_read():
    assert gae_of([1, 0], [2, 4], 16, dummies=[1], truncated=[1])[0] == [1, 0]


def test_a_dummy_at_row_0_leaves_the_rest_alone():
    assert gae_of([0, 2, 4], [9, 4, 8], 16, dummies=[0])[0] == [0, *gae_of([2, 4], [4, 8], 16)[0]]


def test_last_values_are_not_read_where_the_last_row_terminated():
    assert gae_of([1, 2], [2, 4], 1e30, terminated=[1])[0] == [1 - 2 / 4, -2]


def test_a_truncated_last_row_takes_the_final_value_and_never_last_values():
    for last_is_final in (False, True):
        cut = gae_of([1, 2], [2, 4], 1e30, truncated=[1], finals={1: 10}, last_is_final=last_is_final)
        assert cut[0] == [1 + 3 / 4, 3]


def test_a_truncated_last_row_without_a_final_value_takes_last_values_only_where_these_are_final():
    assert gae_of([1, 2], [2, 4], 10, truncated=[1], last_is_final=True)[0] == [1 + 3 / 4, 3]
    with pytest.raises(InvalidInput, match=r"step 1 of environment 0 was truncated.*final_values=.*autoreset="):
        gae_of([1, 2], [2, 4], 10, truncated=[1], last_is_final=False)


def test_a_truncated_step_before_another_episodes_row_needs_its_final_value_in_every_mode():
    for last_is_final in (False, True):
        with pytest.raises(InvalidInput, match="step 0 of environment 0"):
            gae_of([1, 2], [2, 4], 10, truncated=[0], last_is_final=last_is_final)


def test_the_unknown_step_is_named_in_its_own_environment():
    flags = np.zeros((3, 2), np.bool_)
    truncated = flags.copy()
    truncated[1, 1] = True
    zeros = np.zeros((3, 2), np.float32)
    with pytest.raises(InvalidInput, match="step 1 of environment 1"):
        generalized_advantages(zeros, zeros, flags, truncated, ~flags, zeros + NAN, [0, 0], gamma=0.9, gae_lambda=0.9)


def test_a_final_value_where_nothing_ended_is_not_read():
    assert gae_of([1, 2], [2, 4], 8, finals={0: 99, 1: 99}) == gae_of([1, 2], [2, 4], 8)


# Identities.

RNG = np.random.default_rng(0)
REWARDS, VALUES = RNG.normal(size=(2, 9, 3)).astype(np.float32)
FINALS = RNG.normal(size=(9, 3)).astype(np.float32)
LAST_VALUES = RNG.normal(size=3)
TERMINATED, TRUNCATED = (RNG.random((2, 9, 3)) < 0.2) & np.array([1, 1, 0], np.bool_)  # the last environment never ends
EVERYWHERE = np.ones((9, 3), np.bool_)
ARGUMENTS = (REWARDS, VALUES, TERMINATED, TRUNCATED, EVERYWHERE, FINALS, LAST_VALUES)


def test_lambda_0_is_the_one_step_td_error():
    next_values = np.where(TRUNCATED, FINALS, np.vstack([VALUES[1:], LAST_VALUES]))
    advantages, _ = generalized_advantages(*ARGUMENTS, gamma=0.9, gae_lambda=0.0)
    np.testing.assert_allclose(advantages, REWARDS + 0.9 * next_values * ~TERMINATED - VALUES, rtol=1e-5, atol=1e-6)


def test_lambda_1_is_the_discounted_return_minus_the_value():
    _, returns = generalized_advantages(*ARGUMENTS, gamma=0.9, gae_lambda=1.0)
    for env in range(3):
        for start in range(9):
            total, discount = 0.0, 1.0
            for step in range(start, 9):
                total += discount * REWARDS[step, env]
                discount *= 0.9
                if TERMINATED[step, env]:
                    discount = 0.0
                if TERMINATED[step, env] or TRUNCATED[step, env]:
                    break
            rest = FINALS[step, env] if TRUNCATED[step, env] else LAST_VALUES[env]
            assert returns[start, env] == pytest.approx(total + discount * rest, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("flag", ["terminated", "truncated"])
@pytest.mark.parametrize("step", range(9))
def test_an_end_at_a_step_changes_that_step_and_those_before_it_in_its_environment_and_nothing_else(flag, step):
    never = np.zeros((9, 3), np.bool_)
    ends = never.copy()
    ends[step, 1] = True
    flags = (ends, never) if flag == "terminated" else (never, ends)
    rest = (EVERYWHERE, FINALS, LAST_VALUES)
    before, _ = generalized_advantages(REWARDS, VALUES, never, never, *rest, gamma=0.9, gae_lambda=0.9)
    after, _ = generalized_advantages(REWARDS, VALUES, *flags, *rest, gamma=0.9, gae_lambda=0.9)
    changed = np.zeros((9, 3), np.bool_)
    changed[: step + 1, 1] = True
    assert ((before != after) == changed).all()


def test_long_rollouts_are_added_up_in_float64():
    num_steps = 10_000
    advantages, _ = gae_of([0.1] * num_steps, [0.0] * num_steps, 0.0, gamma=1.0, gae_lambda=1.0)
    assert advantages[0] == np.float32(num_steps * float(np.float32(0.1)))  # in float32 it would be 999.9


# The sum of equation 16, without a recursion.


def written_out(kinds, rewards, values, finals, last_values, last_is_final, gamma, gae_lambda):
    """A_t = sum over k of (gamma * lambda)^k * delta_{t+k}, up to the end of the episode or of what happened."""
    num_steps, num_envs = kinds.shape
    advantages = np.zeros(kinds.shape)

    def delta(step, env):
        kind = kinds[step, env]
        if kind in ("terminated", "both"):
            return rewards[step, env] - values[step, env]
        following = last_values[env] if step == num_steps - 1 else values[step + 1, env]
        if kind == "truncated" and not np.isnan(finals[step, env]):
            following = finals[step, env]
        elif kind == "truncated":
            is_known = last_is_final if step == num_steps - 1 else kinds[step + 1, env] == "dummy"
            assert is_known, "the rollout is to be refused"
        return rewards[step, env] + gamma * following - values[step, env]

    for env in range(num_envs):
        for step in range(num_steps):
            k = 0
            while step + k < num_steps and kinds[step + k, env] != "dummy":
                advantages[step, env] += (gamma * gae_lambda) ** k * delta(step + k, env)
                if kinds[step + k, env] != "step":
                    break
                k += 1
    return advantages


@st.composite
def rollouts(draw):
    num_steps, num_envs = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    kind = st.sampled_from(["step", "step", "step", "terminated", "truncated", "both", "dummy"])
    kinds = np.array(draw(st.lists(kind, min_size=num_steps * num_envs, max_size=num_steps * num_envs)), dtype=object)
    return kinds.reshape(num_steps, num_envs)


@given(
    kinds=rollouts(),
    last_is_final=st.booleans(),
    share_of_finals=st.sampled_from([0.0, 0.5, 1.0]),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    gae_lambda=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_advantages_are_the_sum_written_out_or_the_rollout_is_refused(
    kinds, last_is_final, share_of_finals, gamma, gae_lambda, seed
):
    rng = np.random.default_rng(seed)
    rewards, values, finals = rng.normal(size=(3, *kinds.shape)).astype(np.float32)
    finals[rng.random(kinds.shape) >= share_of_finals] = NAN
    last_values = rng.normal(size=kinds.shape[1])
    terminated, truncated = np.isin(kinds, ["terminated", "both"]), np.isin(kinds, ["truncated", "both"])
    arguments = (rewards, values, terminated, truncated, kinds != "dummy", finals, last_values)
    options = {"gamma": gamma, "gae_lambda": gae_lambda, "last_is_final": last_is_final}
    try:
        expected = written_out(kinds, rewards, values, finals, last_values, last_is_final, gamma, gae_lambda)
    except AssertionError:
        with pytest.raises(InvalidInput, match="unknown"):
            generalized_advantages(*arguments, **options)
        return
    before = [array.copy() for array in arguments]
    advantages, returns = generalized_advantages(*arguments, **options)
    assert (advantages.dtype, returns.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(returns, expected + values, rtol=1e-5, atol=1e-5)
    for array, copy in zip(arguments, before, strict=True):
        np.testing.assert_array_equal(array, copy)


# Arguments.


def test_the_layout_of_the_inputs_does_not_matter_and_out_is_what_is_returned():
    expected = generalized_advantages(*ARGUMENTS, gamma=0.9, gae_lambda=0.9)
    out = (np.empty((9, 3), np.float32), np.empty((9, 3), np.float32))
    columns = [np.asfortranarray(array) for array in ARGUMENTS]
    returned = generalized_advantages(*columns, gamma=0.9, gae_lambda=0.9, out=out)
    assert returned[0] is out[0]
    assert returned[1] is out[1]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("position", range(7))
def test_an_array_of_another_shape_is_refused(position):
    arguments = list(ARGUMENTS)
    arguments[position] = arguments[position][..., :-1]
    with pytest.raises(InvalidInput, match=r"expected arrays \[T, E\] alike and last_values \[E\]"):
        generalized_advantages(*arguments, gamma=0.9, gae_lambda=0.9)


@pytest.mark.parametrize(
    ("argument", "value"), [("gamma", -0.1), ("gamma", 1.1), ("gae_lambda", NAN), ("gae_lambda", 2)]
)
def test_a_discount_out_of_range_is_refused_by_name(argument, value):
    with pytest.raises(InvalidInput, match=f"{argument} must be in 0..1, got {value}"):
        generalized_advantages(*ARGUMENTS, **({"gamma": 0.9, "gae_lambda": 0.9} | {argument: value}))


# Explained variance.


def test_explained_variance_is_1_for_the_returns_0_for_a_constant_and_negative_for_worse():
    returns = np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)
    mask = np.ones((2, 2), np.bool_)
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(returns + 7, returns, mask) == 1.0  # a bias is not variance
    assert explained_variance(np.zeros((2, 2), np.float32), returns, mask) == 0.0
    assert explained_variance(-returns, returns, mask) == -3.0
    # Var([1, 2, 3, 6]) = 3.5; the residuals [0, 0, 0, 2] have variance 0.75.
    assert explained_variance(np.minimum(returns, 4), returns, mask) == pytest.approx(1 - 0.75 / 3.5)


def test_explained_variance_counts_rows_in_the_mask_only():
    returns = np.array([[1.0, 2.0], [3.0, 1e9]], np.float32)
    mask = np.array([[True, True], [True, False]])
    assert explained_variance(np.minimum(returns, 3), returns, mask) == 1.0
    assert explained_variance(np.zeros((2, 2), np.float32), returns, mask) == 0.0


def test_explained_variance_is_nan_where_the_returns_do_not_vary():
    returns = np.full((2, 2), 0.1, np.float32)
    mask = np.ones((2, 2), np.bool_)
    assert np.isnan(explained_variance(np.zeros((2, 2), np.float32), returns, mask))
    assert np.isnan(explained_variance(returns, returns, ~mask))
