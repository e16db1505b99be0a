import warnings

import numpy as np
import pytest

from rl_buffer.errors import InvalidInput
from rl_buffer.inputs import copy_numbers
from rl_buffer.samplers import Prioritized
from rl_buffer.spec import Field, TransitionSpec
from rl_buffer.step_leaves import StepLeaves
from rl_buffer.tables import ReplayTable
from rl_buffer.transition_history import TransitionHistory

FIELDS = {
    "observations/a": Field((2,), "float32"),
    "observations/b": Field((), "float64"),
    "actions": Field((), "int8"),
}


def leaves(num_envs=1):
    leaves = StepLeaves(FIELDS, 3, num_envs)
    return leaves, leaves.copier("obs", "observations"), leaves.copier("action", "actions")


@pytest.mark.parametrize("a", [np.array([1, 2], np.float32), np.array([[1.0, 2.0]]), [1, 2]])
@pytest.mark.parametrize("action", [5, np.int64(5), np.array(5, np.int8), np.array([5])])
def test_a_step_lies_in_its_row_in_whatever_form_it_came(a, action):
    steps, copy_obs, copy_action = leaves()
    copy_obs(1, {"a": a, "b": 3.0})
    copy_action(1, action)
    assert steps.arrays["observations/a"].tolist() == [[[0, 0]], [[1, 2]], [[0, 0]]]
    assert steps.arrays["observations/b"].tolist() == [[0], [3], [0]]
    assert steps.arrays["actions"].tolist() == [[0], [5], [0]]


@pytest.mark.parametrize("action", [128, -129, 1000])
def test_an_integer_that_the_field_cannot_hold_is_refused(action):
    _, _, copy_action = leaves()
    with pytest.raises(InvalidInput, match=r"action has values from .* which int8 cannot hold"):
        copy_action(0, action)


@pytest.mark.parametrize(("leaf", "where"), [("a", r"\(1, 0\)"), ("b", r"\(1,\)")])
def test_a_number_that_is_not_finite_is_refused_by_the_name_of_its_leaf(leaf, where):
    steps, copy_obs, _ = leaves(num_envs=2)
    obs = {"a": np.ones((2, 2), np.float32), "b": np.ones(2)}
    obs[leaf][1] = np.inf
    copy_obs(2, obs)
    steps.require_finite(1)
    with pytest.raises(InvalidInput, match=rf"obs\['{leaf}'\] is inf at {where}; expected finite numbers"):
        steps.require_finite(2)


def test_numbers_whose_squares_overflow_are_finite_all_the_same():
    steps, copy_obs, _ = leaves()
    copy_obs(0, {"a": np.full(2, 3e38, np.float32), "b": 1e300})
    steps.require_finite(0)


@pytest.mark.parametrize("warnings_are", ["error", "ignore"])
def test_infinities_of_both_signs_do_not_make_up_for_each_other(warnings_are):
    steps, copy_obs, _ = leaves()
    copy_obs(0, {"a": np.array([np.inf, -np.inf], np.float32), "b": 1.0})
    with (
        warnings.catch_warnings(action=warnings_are),
        pytest.raises(InvalidInput, match=r"obs\['a'\] is inf at \(0, 0\)"),
    ):
        steps.require_finite(0)


@pytest.mark.parametrize("warnings_are", ["error", "ignore"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 1e200, -2e34])
def test_a_number_that_is_too_large_is_refused(bad, warnings_are):
    with (
        warnings.catch_warnings(action=warnings_are),
        pytest.raises(InvalidInput, match=r"reward is .* at \(1,\); expected finite numbers within"),
    ):
        copy_numbers("reward", np.zeros(3), np.array([1.0, bad, 2.0]))


def test_a_missing_branch_is_named():
    _, copy_obs, _ = leaves()
    with pytest.raises(InvalidInput, match="obs must be a mapping with 'b', got dict"):
        copy_obs(0, {"a": np.ones(2, np.float32)})


@pytest.fixture
def history():
    spec = TransitionSpec(Field((1,), "float32"), Field((), "int64"))
    return TransitionHistory(ReplayTable(spec, 8, sampler=Prioritized(), n_step=1), 1, None, 4)


def stage(history, priority=None, infos=None, done=False):
    obs = np.ones(1, np.float32)
    return history.stage(obs, 0, 1.0, done, obs, None, None, priority, None, None, None, None, infos, None)


def test_a_refused_step_leaves_no_priority_to_the_step_that_comes_instead(history):
    with pytest.raises(InvalidInput, match="priority must be >= 0"):
        stage(history, priority=-3.0)
    history.accept(stage(history, priority=2.0))
    stage(history, priority=5.0, done=True)  # and whoever staged it refused it
    history.accept(stage(history))
    items = history.complete(close=True)
    np.testing.assert_array_equal(history.td_errors(items), [2.0, np.nan])
    assert not items.terminated.any()


def test_nor_to_a_step_that_comes_after_the_next_items(history):
    for _ in range(2):
        history.accept(stage(history, priority=2.0))
    stage(history, priority=5.0)  # in the third place, and refused by whoever staged it
    history.emitted(history.complete(close=False))
    for _ in range(3):
        history.accept(stage(history))
    np.testing.assert_array_equal(history.td_errors(history.complete(close=True)), [np.nan] * 3)


def test_steps_after_an_emptied_history_begin_as_the_first_ones_did():
    spec = TransitionSpec(Field((1,), "float32"), Field((), "int64"))
    history = TransitionHistory(ReplayTable(spec, 8, n_step=1), 2, None, 4)
    obs = np.ones((2, 1), np.float32)
    for done in ([True, False], [False, False]):
        for _ in range(4):
            staged = history.stage(obs, np.zeros(2, np.int64), np.ones(2), np.array(done), obs, *[None] * 9)
            history.accept(staged)
        items = history.complete(close=False)
        assert items.terminated.tolist() == done * 4
        assert (items.starts % 2).tolist() == [0, 1] * 4
        assert (items.starts // 2).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        history.emitted(items)
        assert history.num_steps == 0
