"""n-step assembly: hand-computed histories, and a plain Python model under random ends and chunk sizes."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_buffer.errors import InvalidInput
from rl_buffer.n_step import Windows, assemble, td_errors

NAN = float("nan")


def column(values, dtype=np.bool_):
    return np.array(values, dtype)[:, None]


def windows_of(rewards, *, terminated=(), truncated=(), resets=(), dummies=(), emitted=(), n_step, gamma, **options):
    """Assemble one environment; the flags are given as the steps at which they hold."""
    steps = np.arange(len(rewards))
    ends = np.isin(steps, [*terminated, *truncated])
    return assemble(
        column(rewards, np.float32),
        column(np.isin(steps, terminated)),
        column(np.isin(steps, truncated)),
        column(ends | np.isin(steps, resets)),
        column(~np.isin(steps, [*dummies, *emitted])),
        n_step=n_step,
        gamma=gamma,
        **options,
    )


def steps_and_envs(numbers, windows):
    """Where the numbers of `starts` or `ends` are in the history [H, E]."""
    return numbers // windows.num_envs, numbers % windows.num_envs


def last_steps(windows):
    return steps_and_envs(windows.ends, windows)[0].tolist()


def rows(windows):
    """(first, last, reward, n_steps, discount, terminated, truncated) of each window."""
    names = ("rewards", "n_steps", "discounts", "terminated", "truncated")
    first, _ = steps_and_envs(windows.starts, windows)
    columns = (first.tolist(), last_steps(windows), *(getattr(windows, name).tolist() for name in names))
    return list(zip(*columns, strict=True))


def test_one_step_windows_are_the_steps_themselves():
    windows = windows_of([1, 2, 3], terminated=[1], truncated=[2], n_step=1, gamma=0.5)
    assert rows(windows) == [
        (0, 0, 1.0, 1, 0.5, False, False),
        (1, 1, 2.0, 1, 0.0, True, False),
        (2, 2, 3.0, 1, 0.5, False, True),
    ]


def test_a_termination_cuts_the_bootstrap_of_its_tail_and_of_nothing_else():
    windows = windows_of([1, 2, 4, 8, 16], terminated=[2], n_step=2, gamma=0.5)
    assert rows(windows) == [
        (0, 1, 2.0, 2, 0.25, False, False),
        (1, 2, 4.0, 2, 0.0, True, False),
        (2, 2, 4.0, 1, 0.0, True, False),
        (3, 4, 16.0, 2, 0.25, False, False),  # start 4 is open
    ]


def test_a_truncation_keeps_the_bootstrap_with_the_discount_of_the_steps_summed():
    windows = windows_of([1, 2, 4, 8, 16], truncated=[3], n_step=3, gamma=0.5)
    assert rows(windows) == [
        (0, 2, 3.0, 3, 0.125, False, False),
        (1, 3, 6.0, 3, 0.125, False, True),
        (2, 3, 8.0, 2, 0.25, False, True),
        (3, 3, 8.0, 1, 0.5, False, True),
    ]


def test_both_flags_at_once_are_kept_apart_and_do_not_bootstrap():
    windows = windows_of([1, 2], terminated=[1], truncated=[1], n_step=3, gamma=0.5)
    assert rows(windows) == [(0, 1, 2.0, 2, 0.0, True, True), (1, 1, 2.0, 1, 0.0, True, True)]


def test_two_ends_in_a_row_give_two_episodes():
    windows = windows_of([1, 2, 4], truncated=[1], terminated=[2], n_step=3, gamma=1.0)
    assert rows(windows) == [
        (0, 1, 3.0, 2, 1.0, False, True),
        (1, 1, 2.0, 1, 1.0, False, True),
        (2, 2, 4.0, 1, 0.0, True, False),
    ]


def test_an_end_on_the_last_step_of_the_history_emits_all_its_tails():
    windows = windows_of([1, 2, 4], terminated=[2], n_step=3, gamma=1.0)
    assert rows(windows) == [(s, 2, r, 3 - s, 0.0, True, False) for s, r in enumerate([7.0, 6.0, 4.0])]


def test_a_manual_reset_cuts_without_a_flag():
    windows = windows_of([1, 2, 4], resets=[1], n_step=2, gamma=1.0)
    assert rows(windows) == [(0, 1, 3.0, 2, 1.0, False, False), (1, 1, 2.0, 1, 1.0, False, False)]


def test_no_window_contains_a_dummy_step_whatever_its_reward():
    windows = windows_of([1, 2, NAN, 4, 8], truncated=[1], dummies=[2], n_step=2, gamma=1.0)
    assert rows(windows) == [
        (0, 1, 3.0, 2, 1.0, False, True),
        (1, 1, 2.0, 1, 1.0, False, True),
        (3, 4, 12.0, 2, 1.0, False, False),
    ]


def test_open_windows_wait_until_close_emits_them_with_the_steps_that_there_are():
    history = {"rewards": [1, 2, 4], "n_step": 3, "gamma": 0.5}
    assert rows(windows_of(**history)) == [(0, 2, 3.0, 3, 0.125, False, False)]
    assert rows(windows_of(**history, emitted=[0], close=True)) == [
        (1, 2, 4.0, 2, 0.25, False, False),
        (2, 2, 4.0, 1, 0.5, False, False),
    ]


@pytest.mark.parametrize("needs_next", [True, np.array([[False], [False], [True]])])
def test_a_window_that_needs_the_next_step_waits_for_it_but_not_at_close(needs_next):
    history = {"rewards": [1, 2, 4], "n_step": 2, "gamma": 1.0, "needs_next": needs_next}
    assert last_steps(windows_of(**history)) == [1]
    assert last_steps(windows_of(**history, close=True)) == [1, 2, 2]
    assert last_steps(windows_of(**history, truncated=[2])) == [1]


def test_windows_are_sorted_by_first_step_then_environment():
    flags = np.zeros((3, 2), np.bool_)
    windows = assemble(np.ones((3, 2)), flags, flags, flags, ~flags, n_step=2, gamma=1.0)
    assert list(zip(*(places.tolist() for places in steps_and_envs(windows.starts, windows)), strict=True)) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]


def test_dtypes_are_as_promised_also_for_no_window_and_no_history():
    promised = {"starts": "int64", "ends": "int64", "rewards": "float32", "n_steps": "int32"}
    promised |= {"discounts": "float32", "terminated": "bool", "truncated": "bool"}
    for num_steps in (0, 1, 5):
        windows = windows_of([1.0] * num_steps, n_step=3, gamma=0.99)
        assert {f.name: str(getattr(windows, f.name).dtype) for f in fields(Windows)[1:]} == promised
        assert len(windows) == max(num_steps - 2, 0)


def test_rewards_are_summed_in_double_precision():
    # In float32 1e8 + 1 is 1e8, so the ones would be lost one by one.
    windows = windows_of([1e8, *[1.0] * 64], n_step=65, gamma=1.0)
    assert windows.rewards.tolist() == [1e8 + 64]


def test_the_history_of_the_caller_is_not_written():
    arrays = [np.ones((4, 1)), *(np.zeros((4, 1), np.bool_) for _ in range(3)), np.ones((4, 1), np.bool_)]
    for array in arrays:
        array.flags.writeable = False
    assert len(assemble(*arrays, n_step=3, gamma=0.9)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_step": 0}, "n_step"),
        ({"gamma": 1.5}, "gamma"),
        ({"gamma": NAN}, "gamma"),
        ({"startable": np.ones((3, 2), np.bool_)}, r"\(3, 2\)"),
        ({"rewards": np.ones(3)}, r"\(3,\)"),
        ({"terminated": np.ones((3, 1), np.bool_)}, "cut must hold"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, message):
    flags = dict.fromkeys(("terminated", "truncated", "cut", "startable"), np.zeros((3, 1), np.bool_))
    with pytest.raises(InvalidInput, match=message):
        assemble(**({"rewards": np.ones((3, 1)), **flags, "n_step": 2, "gamma": 0.9} | change))


# A model: one environment at a time, one step at a time, no arrays.

STEP = st.sampled_from(["", "", "", "", "terminated", "truncated", "both", "reset", "dummy"])


def model(steps, rewards, n_step, gamma):
    """Transitions of one environment, by start, as rows of (last, reward, n_steps, discount, flags)."""
    transitions, window = {}, []

    def emit(last):
        start = window.pop(0)
        count = last - start + 1
        terminated, truncated = (steps[last] in (flag, "both") for flag in ("terminated", "truncated"))
        total = sum(gamma**k * rewards[start + k] for k in range(count))
        transitions[start] = (last, total, count, 0.0 if terminated else gamma**count, terminated, truncated)

    for now, kind in enumerate(steps):
        if kind == "dummy":
            continue
        window.append(now)
        if len(window) == n_step:
            emit(now)
        while window and kind:
            emit(now)
    while window:
        emit(len(steps) - 1)
    return transitions


@st.composite
def streams(draw):
    num_envs, num_steps = draw(st.integers(1, 3)), draw(st.integers(1, 25))
    stream = []
    for _ in range(num_envs):
        kinds = draw(st.lists(STEP, min_size=num_steps, max_size=num_steps))
        # A dummy comes only after an end.
        for i, kind in enumerate(kinds):
            if kind == "dummy" and (i == 0 or kinds[i - 1] not in ("terminated", "truncated", "both")):
                kinds[i] = ""
        if kinds[-1] == "dummy":  # the model closes on the last real step, as the writer's history would
            kinds[-1] = ""
        stream.append(kinds)
    return np.array(stream, dtype=object).T  # [T, E]


@given(
    stream=streams(),
    chunks=st.lists(st.integers(1, 9), min_size=25, max_size=25),
    n_step=st.integers(1, 6),
    gamma=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    waits=st.booleans(),
    seed=st.integers(0, 99),
)
def test_however_the_stream_is_cut_into_chunks_the_same_transitions_come_out_once(
    stream, chunks, n_step, gamma, waits, seed
):
    num_steps, num_envs = stream.shape
    rewards = np.random.default_rng(seed).normal(size=stream.shape)
    terminated, truncated = np.isin(stream, ["terminated", "both"]), np.isin(stream, ["truncated", "both"])
    cut = terminated | truncated | (stream == "reset")
    startable = stream != "dummy"
    emitted = {}
    begin = end = 0
    for size in chunks:
        end = min(end + size, num_steps)
        history = slice(begin, end)
        windows = assemble(
            *(array[history] for array in (rewards, terminated, truncated, cut, startable)),
            n_step=n_step,
            gamma=gamma,
            needs_next=waits,
            close=end == num_steps,
        )
        firsts, envs = steps_and_envs(windows.starts, windows)
        for env, (first, last, *rest) in zip(envs.tolist(), rows(windows), strict=True):
            key = (first + begin, env)
            assert key not in emitted
            assert not cut[key[0] : last + begin, env].any()
            emitted[key] = (last + begin, *rest)
        startable[firsts + begin, envs] = False
        left = np.flatnonzero(startable[begin:end].any(axis=1))
        # As the writer does; what comes before the earliest start that is left is gone.
        begin = begin + int(left[0]) if len(left) else end
        if end == num_steps:
            break
    expected = {
        (start, env): transition
        for env in range(num_envs)
        for start, transition in model(stream[:, env], rewards[:, env], n_step, gamma).items()
    }
    assert emitted.keys() == expected.keys()
    for key, (last, total, count, discount, *flags) in expected.items():
        assert emitted[key] == (
            last,
            pytest.approx(total, rel=1e-6, abs=1e-6),
            count,
            np.float32(discount),
            *flags,
        )


# TD errors.


def td_of(windows, num_steps, *, state_values, final_values=None, q_taken=None, cut=(), dummies=()):
    steps = np.arange(num_steps)
    return td_errors(
        windows,
        column([0.0] * num_steps if q_taken is None else q_taken, np.float64),
        column(state_values, np.float64),
        column([NAN] * num_steps if final_values is None else final_values, np.float64),
        cut=column(np.isin(steps, cut)),
        dummy=column(np.isin(steps, dummies)),
    ).tolist()


def test_the_td_error_bootstraps_from_the_state_after_the_window():
    windows = windows_of([1, 2, 4, 8], n_step=2, gamma=0.5)
    # Windows 0-1, 1-2, 2-3; the state after step 3 is not there.
    errors = td_of(windows, 4, state_values=[10, 20, 40, 80], q_taken=[1, 2, 3, 4])
    assert errors == [2 + 0.25 * 40 - 1, 4 + 0.25 * 80 - 2, pytest.approx(NAN, nan_ok=True)]


def test_an_unknown_value_does_not_poison_a_terminated_window():
    windows = windows_of([1, 2], terminated=[1], n_step=2, gamma=0.5)
    assert td_of(windows, 2, state_values=[NAN, NAN], q_taken=[0.5, 3], cut=[1]) == [1.5, -1.0]
    assert td_of(windows, 2, state_values=[NAN, NAN], final_values=[NAN, np.inf], cut=[1]) == [2.0, 2.0]


def test_an_unknown_q_value_gives_an_unknown_error():
    windows = windows_of([1], terminated=[0], n_step=1, gamma=0.5)
    assert np.isnan(td_of(windows, 1, state_values=[0], q_taken=[NAN], cut=[0])).all()


def test_in_next_step_mode_the_dummy_brings_the_value_of_the_true_final_observation():
    windows = windows_of([1, 2, 0, 4], truncated=[1], dummies=[2], n_step=2, gamma=0.5)
    errors = td_of(windows, 4, state_values=[10, 20, 40, 80], cut=[1], dummies=[2])
    assert errors == [2 + 0.25 * 40, 2 + 0.5 * 40]


def test_in_same_step_mode_the_next_step_belongs_to_another_episode():
    windows = windows_of([1, 2, 4], truncated=[1], n_step=1, gamma=0.5)
    unknown = pytest.approx(NAN, nan_ok=True)
    assert td_of(windows, 3, state_values=[10, 20, 40], cut=[1]) == [1 + 0.5 * 20, unknown, unknown]
    given_value = td_of(windows, 3, state_values=[10, 20, 40], final_values=[NAN, 6, NAN], cut=[1])
    assert given_value == [1 + 0.5 * 20, 2 + 0.5 * 6, unknown]


def test_after_a_manual_reset_the_next_state_is_not_the_next_observation():
    windows = windows_of([1, 2, 4], resets=[0], n_step=1, gamma=0.5)
    unknown = pytest.approx(NAN, nan_ok=True)
    assert td_of(windows, 3, state_values=[10, 20, 40], cut=[0]) == [unknown, 2 + 0.5 * 40, unknown]


def test_a_given_final_value_comes_before_that_of_the_dummy():
    windows = windows_of([1, 0], truncated=[0], dummies=[1], n_step=1, gamma=0.5)
    assert td_of(windows, 2, state_values=[0, 40], final_values=[6, NAN], cut=[0], dummies=[1]) == [4.0]


def test_values_are_taken_from_the_environment_of_the_window():
    flags = np.zeros((2, 2), np.bool_)
    windows = assemble(np.zeros((2, 2)), flags, flags, flags, ~flags, n_step=1, gamma=1.0, needs_next=True)
    values = np.array([[1.0, 2.0], [3.0, 4.0]])
    errors = td_errors(windows, values, values, np.full((2, 2), NAN), cut=flags, dummy=flags)
    assert errors.tolist() == [3 - 1, 4 - 2]
    assert errors.dtype == np.float64
