"""Fragments of a rollout: what is written where, what carries over, and what is refused without a trace."""

import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_buffer.errors import InvalidInput
from rl_buffer.rollout_fragment import RolloutFragment
from rl_buffer.spec import Field, RowLayout, TransitionSpec

NAN = float("nan")
SPEC = TransitionSpec(obs=Field((3,)), action=Field((), "int64"))
MODES = [None, "next_step", "same_step", "disabled"]


def views_of(spec, num_steps, num_envs):
    """Views of one row of memory that holds rubbish, as a shared table would hand them out."""
    layout = RowLayout(spec.rollout_fields(num_steps, num_envs))
    views = {path: view[0] for path, view in layout.view(bytearray(layout.stride_nbytes), 1).items()}
    for view in views.values():
        view[...] = 1
    return views


def make(num_steps=4, num_envs=2, spec=SPEC, *, gamma=0.5, gae_lambda=0.5, **options):
    fragment = RolloutFragment(num_steps, num_envs, gamma=gamma, gae_lambda=gae_lambda, **options)
    views = views_of(spec, num_steps, num_envs)
    fragment.begin(views)
    return fragment, views


def step_of(num_envs=2, number=1, **changes):
    """A good step; every number in it depends on `number`."""
    envs = np.arange(num_envs)
    step = {
        "obs": np.full((num_envs, 3), number) + envs[:, None] / 8,
        "action": number + envs,
        "reward": number + envs / 8,
        "done": np.zeros(num_envs, np.bool_),
        "value": 2 * number + envs / 8,
        "log_prob": -number - envs / 8,
    }
    return step | changes


def add_all(fragment, steps):
    for number, changes in enumerate(steps, 1):
        fragment.add(**step_of(fragment.num_envs, number, **changes))


def copies(views):
    return {path: view.copy() for path, view in views.items()}


def assert_same(views, expected, rows=slice(None)):
    for path, view in views.items():
        np.testing.assert_array_equal(view[rows], expected[path][rows], err_msg=path)


# Fields.


def test_every_leaf_of_a_rollout_is_steps_by_environments():
    spec = TransitionSpec(obs={"image": Field((2, 2), "uint8"), "state": Field(())}, action=Field((5,), "int64"))
    flags, numbers = Field((7, 3), "bool"), Field((7, 3), "float32")
    assert spec.rollout_fields(7, 3) == {
        "observations/image": Field((7, 3, 2, 2), "uint8"),
        "observations/state": Field((7, 3), "float32"),
        "actions": Field((7, 3, 5), "int64"),
        **dict.fromkeys(("rewards", "values", "log_probs", "final_values", "advantages", "returns"), numbers),
        **dict.fromkeys(("terminateds", "truncateds", "mask"), flags),
    }


@pytest.mark.parametrize("kept", [{"extras": {"x": Field(1)}}, {"recurrent_state": Field(1)}], ids=str)
def test_what_a_rollout_does_not_keep_is_refused(kept):
    with pytest.raises(InvalidInput, match="keeps neither extras nor a recurrent_state"):
        TransitionSpec(obs=Field(1), action=Field(1), **kept).rollout_fields(1, 1)


# Writing.


def test_a_step_is_written_into_its_row_and_nowhere_else():
    fragment, views = make()
    fragment.add(**step_of(number=1))
    before = copies(views)
    fragment.add(**step_of(number=5, final_values=[NAN, 7]))
    assert_same(views, before, [0, 2, 3])
    row = {path: view[1].tolist() for path, view in views.items()}
    assert row["observations"] == [[5.0] * 3, [5.125] * 3]
    assert row["actions"] == [5, 6]
    assert row["rewards"] == [5.0, 5.125]
    assert row["values"] == [10.0, 10.125]
    assert row["log_probs"] == [-5.0, -5.125]
    assert row["mask"] == [True, True]
    assert row["terminateds"] == row["truncateds"] == [False, False]
    assert row["final_values"] == [pytest.approx(NAN, nan_ok=True), 7.0]
    assert np.isnan(views["final_values"][0]).all()


def test_dictionary_observations_and_actions_keep_the_dtype_of_each_leaf():
    spec = TransitionSpec(
        obs={"camera": {"rgb": Field((2, 2), "uint8")}, "speed": Field(())},
        action={"gear": Field((), "int64"), "wheel": Field((1,), "float64")},
    )
    fragment, views = make(2, 2, spec)
    obs = {"camera": {"rgb": np.full((2, 2, 2), 200, np.uint8)}, "speed": [1.0, 2.0], "ignored": None}
    action = {"gear": torch.tensor([1, 2]), "wheel": np.array([[0.1], [0.2]])}
    fragment.add(**step_of(obs=obs, action=action))
    assert views["observations/camera/rgb"].dtype == np.uint8
    assert views["observations/camera/rgb"][0].tolist() == obs["camera"]["rgb"].tolist()
    assert views["observations/speed"][0].tolist() == [1.0, 2.0]
    assert views["actions/gear"][0].tolist() == [1, 2]
    assert views["actions/wheel"][0].tolist() == [[0.1], [0.2]]
    with pytest.raises(InvalidInput, match=r"obs\['camera/rgb'\] has shape \(2, 2\), expected \(2, 2, 2\)"):
        fragment.add(**step_of(obs=obs | {"camera": {"rgb": np.zeros((2, 2), np.uint8)}}, action=action))
    del obs["camera"]
    with pytest.raises(InvalidInput, match="obs must be a mapping with 'camera/rgb', got dict"):
        fragment.add(**step_of(obs=obs, action=action))
    with pytest.raises(InvalidInput, match="action must be a mapping with 'gear', got int"):
        fragment.add(**step_of(obs={"camera": {"rgb": np.zeros((2, 2, 2), np.uint8)}, "speed": [0, 0]}, action=3))


SAME_STEPS = {
    "lists": lambda array: array.tolist(),
    "tensors": torch.as_tensor,
    "tensors that require grad": lambda array: (
        torch.as_tensor(array).requires_grad_() if array.dtype.kind == "f" else torch.as_tensor(array)
    ),
    "columns": lambda array: array[:, None] if array.ndim == 1 else array,
}


@pytest.mark.parametrize("form", SAME_STEPS)
def test_a_step_may_come_as(form):
    changes = {"truncated": np.array([0, 1]), "final_values": np.array([NAN, 3]), "mask": np.array([1.0, 1.0])}
    step = step_of(**changes)
    fragment, expected = make(1)
    fragment.add(**step)
    fragment.finish(np.array([1.0, 2.0]), np.array([False, True]))
    fragment, views = make(1)
    fragment.add(**{name: SAME_STEPS[form](value) for name, value in step.items()})
    fragment.finish(SAME_STEPS[form](np.array([1.0, 2.0])), SAME_STEPS[form](np.array([False, True])))
    assert_same(views, expected)


def test_one_environment_may_come_without_its_dimension():
    fragment, expected = make(1, 1)
    fragment.add(**step_of(1, truncated=[True], final_values=[3], mask=[True]))
    fragment.finish([1.0], [True])
    fragment, views = make(1, 1)
    scalars = {name: value[0] for name, value in step_of(1).items()}
    fragment.add(**scalars | {"truncated": True, "final_values": 3, "mask": True, "log_prob": torch.tensor(-1.0)})
    fragment.finish(1.0, True)
    assert_same(views, expected)


def test_what_was_given_is_copied():
    fragment, views = make(1)
    flags = {"truncated": np.ones(2, np.bool_), "terminated": np.zeros(2, np.bool_), "mask": np.ones(2, np.bool_)}
    step = step_of(**flags, final_values=np.zeros(2))
    fragment.add(**step)
    before = copies(views)
    for array in step.values():
        array[...] = 1 - array
    assert_same(views, before)
    fragment.finish([0, 0], [0, 0])  # what `done` was, or this would warn


# Flags.


@pytest.mark.parametrize(
    ("done", "truncated", "terminated", "terminateds", "truncateds"),
    [
        (0, None, None, False, False),
        (1, None, None, True, False),
        (0, 1, None, False, True),
        (1, 1, None, False, True),
        (0, 0, 1, True, False),
        (1, 0, 1, True, False),
        (1, 1, 1, True, True),
        (0, 1, 1, True, True),
        (1, 0, 0, False, True),  # ended, and not by terminating
        (1, None, 0, False, True),
    ],
)
def test_the_episode_ends_by_any_flag_and_done_terminates_unless_truncated_or_told(
    done, truncated, terminated, terminateds, truncateds
):
    fragment, views = make(1, 1)
    fragment.add(**step_of(1, done=done, truncated=truncated, terminated=terminated))
    assert (views["terminateds"].item(), views["truncateds"].item()) == (terminateds, truncateds)


# Dummies and masks.


def test_in_next_step_mode_the_row_after_an_end_is_a_dummy_whose_value_counts():
    fragment, views = make(4, 3, autoreset="next_step")
    ends = {"done": [1, 0, 0], "truncated": [0, 1, 0]}
    add_all(fragment, [ends, {"reward": [50, 50, 1]} | ends | {"truncated": [0, 1, 1]}, {}, {}])
    assert views["mask"].tolist() == [[1, 1, 1], [0, 0, 1], [1, 1, 0], [1, 1, 1]]
    assert views["rewards"][1].tolist() == [0, 0, 1]
    assert views["terminateds"].tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert views["truncateds"].tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert views["values"][1].tolist() == [4, 4.125, 4.25]


@pytest.mark.parametrize("autoreset", [None, "same_step", "disabled"])
def test_in_other_modes_the_row_after_an_end_is_a_step(autoreset):
    fragment, views = make(2, 2, autoreset=autoreset)
    add_all(fragment, [{"done": [1, 1]}, {"done": [1, 0]}])
    assert views["mask"].all()
    assert views["terminateds"].tolist() == [[1, 1], [1, 0]]


def test_the_first_row_of_the_next_fragment_is_the_dummy_of_an_end_in_the_last_row():
    fragment, first = make(2, 2, autoreset="next_step")
    add_all(fragment, [{}, {"truncated": [0, 1]}])
    fragment.finish([0, 0])
    before = copies(first)
    second = views_of(SPEC, 2, 2)
    fragment.begin(second)
    add_all(fragment, [{"reward": [3, 4]}, {"reward": [3, 4]}])
    assert second["mask"].tolist() == [[1, 0], [1, 1]]
    assert second["rewards"].tolist() == [[3, 0], [3, 4]]
    fragment.finish([0, 0])
    assert second["advantages"][0, 1] == 0
    assert_same(first, before)


def test_a_mask_is_taken_together_with_the_dummies():
    fragment, views = make(3, 3, autoreset="next_step")
    add_all(fragment, [{"done": [1, 1, 0]}, {"mask": [1, 0, 0], "done": [1, 1, 1]}, {}])
    assert views["mask"].tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 1]]
    assert views["terminateds"][1].tolist() == [0, 0, 0]


def test_where_the_caller_says_that_no_step_happened_nothing_ended_either():
    fragment, views = make(2, 2)
    add_all(fragment, [{"mask": [1, 0], "done": [1, 1], "truncated": [0, 1], "terminated": [1, 1]}])
    assert views["mask"][0].tolist() == [1, 0]
    assert views["rewards"][0].tolist() == [1, 0]
    assert views["terminateds"][0].tolist() == [1, 0]
    assert views["truncateds"][0].tolist() == [0, 0]


# Finishing.


def test_finish_writes_advantages_and_returns_of_every_row():
    fragment, views = make(2, 2)
    add_all(fragment, [{"reward": [1, 1], "value": [2, 2], "done": [0, 1]}, {"reward": [2, 2], "value": [4, 4]}])
    fragment.finish([8, 8])
    # deltas: 1 + 4/2 - 2 = 1 or, terminated, 1 - 2 = -1; then 2 + 8/2 - 4 = 2
    assert views["advantages"].tolist() == [[1 + 2 / 4, -1], [2, 2]]
    assert views["returns"].tolist() == [[3.5, 1], [6, 6]]


def test_a_fragment_finished_early_has_the_advantages_of_its_rows_and_masks_out_the_rest():
    steps = [{}, {"done": [1, 0]}, {"truncated": [0, 1], "final_values": [0, 3]}]
    short, expected = make(3)
    add_all(short, steps)
    short.finish([5, 6])
    long, views = make(5)
    add_all(long, steps)
    long.finish([5, 6])
    assert_same({path: view[:3] for path, view in views.items()}, expected)
    for path in ("mask", "advantages", "returns"):
        assert not views[path][3:].any()


def test_finishing_again_after_further_steps_equals_finishing_once():
    steps = [{}, {"done": [1, 0]}, {}, {}]
    once, expected = make()
    add_all(once, steps)
    once.finish([5, 6])
    twice, views = make()
    for number, changes in enumerate(steps, 1):
        twice.add(**step_of(2, number, **changes))
        twice.finish([5, 6])
    assert_same(views, expected)


@pytest.mark.parametrize("autoreset", MODES)
def test_an_episode_truncated_in_the_last_row_takes_last_values_only_where_they_are_final(autoreset):
    fragment, views = make(1, 1, autoreset=autoreset)
    add_all(fragment, [{"reward": [1], "value": [2], "truncated": [True]}])
    if autoreset in ("next_step", "disabled"):
        fragment.finish([8])
        assert views["advantages"].item() == 1 + 8 / 2 - 2
    else:
        with pytest.raises(InvalidInput, match=r"step 0 of environment 0 was truncated.*pass final_values="):
            fragment.finish([8])
    fragment, views = make(1, 1, autoreset=autoreset)
    add_all(fragment, [{"reward": [1], "value": [2], "truncated": [True], "final_values": [4]}])
    fragment.finish([8])
    assert views["advantages"].item() == 1 + 4 / 2 - 2


@pytest.mark.parametrize("autoreset", ["same_step", "disabled", None])
def test_an_episode_truncated_before_the_last_row_needs_its_final_value(autoreset):
    fragment, views = make(2, 1, autoreset=autoreset)
    add_all(fragment, [{"truncated": [True]}, {}])
    with pytest.raises(InvalidInput, match="step 0 of environment 0"):
        fragment.finish([8])
    fragment.begin(views)
    add_all(fragment, [{"reward": [1], "value": [2], "truncated": [True], "final_values": [4]}, {}])
    fragment.finish([8])
    assert views["advantages"][0].item() == 1 + 4 / 2 - 2


def test_last_dones_that_differ_are_warned_of_and_the_stored_flags_win():
    fragment, expected = make(1)
    add_all(fragment, [{"done": [1, 0]}])
    fragment.finish([5, 6])
    fragment, views = make(1)
    add_all(fragment, [{"done": [1, 0]}])
    with pytest.warns(UserWarning, match=r"last_dones\[1\] is True.*done stored before the step\?"):
        fragment.finish([5, 6], [1, 1])
    assert_same(views, expected)
    with pytest.warns(UserWarning, match=r"last_dones\[0\] is False.*done stored before the step\?"):
        fragment.finish([5, 6], [0, 0])
    assert_same(views, expected)


@pytest.mark.parametrize(
    ("changes", "last_dones"),
    [
        ({"done": [1, 0]}, [1, 0]),
        ({"done": [0, 0], "truncated": [1, 0], "final_values": [0, 0]}, [0, 0]),  # `done` as given
        ({"done": [0, 0], "truncated": [1, 0], "final_values": [0, 0]}, [1, 0]),  # whether it ended
        ({"done": [1, 0], "truncated": [1, 0], "final_values": [0, 0]}, [1, 0]),
        ({"done": [0, 0], "mask": [0, 1]}, [1, 0]),  # nothing happened there
    ],
)
def test_last_dones_that_repeat_done_or_say_that_the_episode_ended_are_not_warned_of(changes, last_dones):
    fragment, _ = make(1)
    add_all(fragment, [changes])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fragment.finish([5, 6], last_dones)


def test_an_end_given_by_both_flags_and_denied_by_last_dones_is_warned_of():
    fragment, _ = make(1)
    add_all(fragment, [{"done": [1, 0], "truncated": [1, 0], "final_values": [0, 0]}])
    with pytest.warns(UserWarning, match="done stored before the step"):
        fragment.finish([5, 6], [0, 0])


@given(
    autoreset=st.sampled_from(["next_step", "same_step", "disabled"]),
    ends=st.lists(st.sampled_from(["", "", "terminated", "truncated", "both"]), min_size=2, max_size=24),
    sizes=st.lists(st.integers(1, 7), min_size=24, max_size=24),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_however_a_stream_is_cut_into_fragments_its_one_step_td_errors_are_the_same(autoreset, ends, sizes, seed):
    values, finals = np.random.default_rng(seed).normal(size=(2, len(ends) + 1)).astype(np.float32)

    def td_errors(sizes):
        fragment = RolloutFragment(max(sizes), 1, gamma=0.9, gae_lambda=0.0, autoreset=autoreset)
        rows, begin = [], 0
        for size in sizes:
            views = views_of(SPEC, max(sizes), 1)
            fragment.begin(views)
            stop = min(begin + size, len(ends))
            for i in range(begin, stop):
                fragment.add(
                    **step_of(1, i, value=[values[i]], done=[ends[i] != ""]),
                    terminated=[ends[i] in ("terminated", "both")],
                    truncated=[ends[i] in ("truncated", "both")],
                    final_values=None if autoreset == "next_step" else [finals[i]],
                )
            fragment.finish([values[stop]])
            rows += zip(views["advantages"][: stop - begin, 0], views["mask"][: stop - begin, 0], strict=True)
            begin = stop
            if begin == len(ends):
                return rows
        return rows

    assert td_errors(sizes) == td_errors([len(ends)])


# Refusals.

BAD_STEPS = [
    ({"obs": np.zeros((2, 4))}, "obs has shape (2, 4), expected (2, 3)"),
    ({"obs": np.zeros(3)}, "obs has shape (3,), expected (2, 3)"),
    ({"obs": np.full((2, 3), NAN)}, "obs is nan at (0, 0)"),
    ({"obs": np.zeros((2, 3), complex)}, "obs has dtype complex128, expected float32"),
    ({"action": np.zeros((2, 2), int)}, "action has shape (2, 2), expected (2,)"),
    ({"action": np.zeros(2)}, "action has dtype float64, expected int64"),
    ({"reward": np.zeros(3)}, "reward has shape (3,), expected (2,)"),
    ({"reward": [0, NAN]}, "reward is nan at (1,)"),
    ({"reward": [1e35, 0]}, "reward is 1e+35 at (0,)"),
    ({"done": [0, 0, 0]}, "done has shape (3,), expected (2,)"),
    ({"done": [0, 2]}, "done must be bool, 0 or 1"),
    ({"done": [0, NAN]}, "done must be bool, 0 or 1"),
    ({"value": 0.0}, "value has shape (), expected (2,)"),
    ({"value": [0, float("inf")]}, "value is inf at (1,)"),
    ({"log_prob": np.zeros((1, 2))}, "log_prob has shape (1, 2), expected (2,)"),
    ({"log_prob": [-float("inf"), 0]}, "log_prob is -inf at (0,)"),
    ({"log_prob": ["a", "b"]}, "log_prob has dtype"),
    ({"truncated": [1]}, "truncated has shape (1,), expected (2,)"),
    ({"truncated": [0.5, 0]}, "truncated must be bool, 0 or 1"),
    ({"terminated": np.zeros((2, 2))}, "terminated has shape (2, 2), expected (2,)"),
    ({"terminated": [-1, 0]}, "terminated must be bool, 0 or 1"),
    ({"final_values": [1.0]}, "final_values has shape (1,), expected (2,)"),
    ({"final_values": [NAN, -float("inf")]}, "final_values is -inf at (1,)"),
    ({"final_values": [1e35, NAN]}, "final_values is 1e+35 at (0,)"),
    ({"mask": [1, 1, 1]}, "mask has shape (3,), expected (2,)"),
    ({"mask": [1, 7]}, "mask must be bool, 0 or 1"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_STEPS, ids=[message for _, message in BAD_STEPS])
def test_a_step_is_refused_by_name_and_leaves_no_trace(changes, message):
    steps = [{}, {"done": [1, 0]}, {}, {"truncated": [1, 0]}]
    undisturbed, expected = make(autoreset="next_step")
    add_all(undisturbed, steps)
    undisturbed.finish([5, 6])
    fragment, views = make(autoreset="next_step")
    for number, step in enumerate(steps, 1):
        before = copies(views)
        with pytest.raises(InvalidInput, match=re.escape(message)):
            fragment.add(**step_of(2, 99, done=[1, 1]) | changes)
        assert fragment.num_filled == number - 1
        assert_same(views, before, slice(0, number - 1))
        fragment.add(**step_of(2, number, **step))
    fragment.finish([5, 6])
    assert_same(views, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0],), "last_values has shape (1,), expected (2,)"),
        (([1.0, NAN],), "last_values is nan at (1,)"),
        (([1.0, 1e35],), "last_values is 1e+35 at (1,)"),
        (([1, 1], [0]), "last_dones has shape (1,), expected (2,)"),
        (([1, 1], [0, 3]), "last_dones must be bool, 0 or 1"),
    ],
)
def test_bad_last_values_and_last_dones_are_refused_by_name_and_leave_no_trace(arguments, message):
    fragment, views = make(2)
    add_all(fragment, [{}, {}])
    fragment.finish([5, 6])
    before = copies(views)
    with pytest.raises(InvalidInput, match=re.escape(message)):
        fragment.finish(*arguments)
    assert_same(views, before)


def test_a_full_fragment_takes_no_step_and_neither_does_one_that_has_not_begun():
    fragment, views = make(2)
    add_all(fragment, [{}, {}])
    before = copies(views)
    with pytest.raises(InvalidInput, match=r"all 2 steps are taken.*begin\(\)"):
        fragment.add(**step_of())
    assert_same(views, before)
    fragment = RolloutFragment(2, 2, gamma=0.9, gae_lambda=0.9)
    assert fragment.is_full
    for call in (lambda: fragment.add(**step_of()), lambda: fragment.finish([0, 0])):
        with pytest.raises(InvalidInput):
            call()


def test_nothing_is_finished_before_the_first_step():
    fragment, views = make(2)
    before = copies(views)
    with pytest.raises(InvalidInput, match="no step"):
        fragment.finish([0, 0])
    assert_same(views, before)


def test_a_discount_out_of_range_is_refused_at_once():
    with pytest.raises(InvalidInput, match=r"gae_lambda must be in 0\.\.1, got 1\.5"):
        RolloutFragment(2, 2, gamma=0.9, gae_lambda=1.5)
