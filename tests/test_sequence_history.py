"""Sequences for recurrent policies: one episode by hand, then random ones against a model in plain lists."""

from dataclasses import dataclass, field
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rl_buffer as rb
from rl_buffer.sequence_history import SequenceHistory, sequence_td_errors

GAMMA = 0.5  # with whole rewards every sum is exact in float32
ETA = 0.75
DUMMY_REWARD = 1000.0  # Gymnasium returns 0; whatever it is, it must count nowhere
NAN = float("nan")
# Observations and recurrent states are (env, episode, step), counted from 1: zeros are nothing but padding.
SPEC = rb.TransitionSpec(
    obs=rb.Field((3,), "int16"),
    action=rb.Field((), "int64"),
    extras={"code": rb.Field((2,), "int32")},
    recurrent_state=rb.Field((3,), "float32"),
)


def table(spec=SPEC, **options):
    defaults = {"capacity": 64, "gamma": GAMMA, "seed": 0, "eta": ETA, "sampler": rb.Prioritized(alpha=1.0)}
    return rb.ReplayTable(spec, **defaults | options)


# ---- environments that follow a script -----------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What one environment does at one time."""

    env: int
    episode: int
    number: int
    terminated: bool = False
    truncated: bool = False
    reset: bool = False  # by hand, after the step
    dummy: bool = False

    @property
    def obs(self):
        return (self.env + 1, self.episode + 1, self.number + 1)

    @property
    def next_obs(self):
        return (self.env + 1, self.episode + 1, self.number + 2)

    @property
    def reset_obs(self):
        return (self.env + 1, self.episode + 2, 1)

    @property
    def action(self):
        return 1 + self.number + 1000 * self.episode + 1_000_000 * self.env

    @property
    def reward(self):
        return DUMMY_REWARD if self.dummy else float(self.action % 17 - 8)

    @property
    def ended(self):
        return self.terminated or self.truncated


ENDS = ["terminated", "truncated", "both", "reset", "truncated, reset", "truncated, dummy reset"]


def script(env, episodes, autoreset):
    """The steps of (length, end) episodes, with the dummy that next_step mode puts after an end."""
    for episode, (length, end) in enumerate(episodes):
        for number in range(length - 1):
            yield Step(env, episode, number)
        terminated, truncated = end in ("terminated", "both"), end.startswith(("truncated", "both"))
        reset = end in ("reset", "truncated, reset")
        yield Step(env, episode, length - 1, terminated, truncated, reset)
        if autoreset == "next_step" and not reset:
            yield Step(env, episode, length, dummy=True, reset=end == "truncated, dummy reset")


def value(obs):
    """V of an observation: no two are alike."""
    env, episode, number = obs
    return 0.5 * number + 50.0 * episode + 5000.0 * env


def q_taken(step):
    return value(step.obs) + step.action % 5


def add(history, steps, values=()):
    """Stage and accept one step of every environment; `values` names those that the actor knows."""
    at_end = [step.ended and history._autoreset == "same_step" for step in steps]
    next_obs = [
        step.reset_obs if step.dummy or ended else step.next_obs for step, ended in zip(steps, at_end, strict=True)
    ]
    final_obs = np.full(len(steps), None, object)
    for env, step in enumerate(steps):
        if at_end[env]:
            final_obs[env] = np.array(step.next_obs, np.int16)
    known = {
        "q_taken": [q_taken(step) for step in steps],
        "state_value": [value(step.obs) for step in steps],
        "final_value": [value(step.next_obs) for step in steps],
    }
    staged = history.stage(
        obs=np.array([step.obs for step in steps], np.int16),
        action=np.array([step.action for step in steps]),
        reward=[step.reward for step in steps],
        done=[step.ended for step in steps],
        next_obs=np.array(next_obs, np.int16),
        truncated=[step.truncated for step in steps],
        terminated=[step.terminated for step in steps],
        priority=None,
        extras={"code": np.array([(step.action, -step.action) for step in steps], np.int32)},
        infos={"final_obs": final_obs, "_final_obs": np.array(at_end)},
        recurrent_state=np.array([step.obs for step in steps], np.float32),
        **{name: known[name] if name in values else None for name in known},
    )
    history.accept(staged)


def stored(history, spans):
    """The rows of these spans by path, written over rows that held something else."""
    layout = history._table.layout
    memory = np.full((len(spans) + 1, layout.stride_nbytes), 0x55, np.uint8)
    views = layout.view(memory, len(memory))
    rows = np.arange(len(spans))[::-1].copy()
    history.copy_rows(spans, views, rows)
    assert (memory[len(spans)] == 0x55).all()
    return [{path: view[row].copy() for path, view in views.items()} for row in rows]


def emit(history, *, close=False):
    """The rows that are complete, taken out."""
    spans = history.complete(close=close)
    rows = stored(history, spans)
    history.emitted(spans)
    return rows


def play(history, steps_of_envs, *, close=True):
    """All rows of steps [num_steps][num_envs], taken out after each step."""
    rows = []
    for steps in steps_of_envs:
        add(history, steps)
        history.cut(np.array([step.reset for step in steps]))
        rows += emit(history)
    return rows + (emit(history, close=True) if close else [])


def one_env(*episodes, autoreset=None):
    return [[step] for step in script(0, episodes, autoreset)]


def numbers(row, mask="mask"):
    """The numbers of the steps of a row."""
    return (row["observations"][row[mask], 2] - 1).tolist()


# ---- by hand -------------------------------------------------------------------------------------------------


def test_an_episode_of_seven_steps_is_the_three_sequences_of_the_docstring():
    history = SequenceHistory(table(sequence_length=4, burn_in=2, overlap=2, n_step=1), 1, None, 64)
    for steps in one_env((7, "truncated")):
        add(history, steps)
    first, second, last = stored(history, history.complete(close=False))
    assert [numbers(row) for row in (first, second, last)] == [
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 5, 6],
        [1, 2, 3, 4, 5, 6],
    ]
    assert [numbers(row, "train_mask") for row in (first, second, last)] == [[0, 1, 2, 3], [2, 3, 4, 5], [3, 4, 5, 6]]
    assert first["train_mask"].tolist() == [True, True, True, True, False, False, False]
    assert second["train_mask"].tolist() == [False, False, True, True, True, True, False]
    assert last["train_mask"].tolist() == [False, False, True, True, True, True, False]
    # Of the first row nothing follows its lookahead; behind the last step of the last one lies the final observation.
    assert first["observations"][:, 2].tolist() == [1, 2, 3, 4, 5, 0, 0]
    assert second["observations"][:, 2].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert last["observations"][:, 2].tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert last["actions"].tolist() == [2, 3, 4, 5, 6, 7, 0]
    assert last["step_rewards"].tolist() == [-6, -5, -4, -3, -2, -1, 0]
    assert last["discounts"].tolist() == [0.5] * 6 + [0]
    assert last["truncateds"].tolist() == [False] * 5 + [True, False]
    assert last["dones"].tolist() == [0] * 7
    assert [row["recurrent_states"][2] for row in (first, second, last)] == [1, 1, 2]


def test_with_three_steps_the_windows_at_the_end_of_an_episode_are_shorter_and_do_not_bootstrap_behind_it():
    history = SequenceHistory(table(sequence_length=4, n_step=3), 1, None, 64)
    for steps in one_env((5, "terminated")):
        add(history, steps)
    first, last = stored(history, history.complete(close=False))
    # rewards are -7, -6, -5, -4, -3, discounts 1/2
    assert first["rewards"].tolist() == [-7 - 3 - 1.25, -6 - 2.5 - 1, -5 - 2 - 0.75, -4 - 1.5, -3, 0, 0]
    assert first["n_steps"].tolist() == [3, 3, 3, 2, 1, 0, 0]
    assert first["discounts"].tolist() == [0.125, 0.125, 0, 0, 0, 0, 0]
    assert first["dones"].tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert first["terminateds"].tolist() == [False, False, True, True, True, False, False]
    assert first["observations"][:, 2].tolist() == [1, 2, 3, 4, 5, 6, 0]
    assert last["n_steps"].tolist() == [3, 3, 2, 1, 0, 0, 0]
    assert last["observations"][:, 2].tolist() == [2, 3, 4, 5, 6, 0, 0]


def test_a_window_is_complete_with_its_lookahead_and_not_before():
    history = SequenceHistory(table(sequence_length=3, n_step=2, overlap=1), 1, None, 64)
    num_complete = []
    for steps in one_env((9, "reset")):
        add(history, steps)
        num_complete.append(len(history.complete(close=False)))
    assert num_complete == [0, 0, 0, 0, 1, 1, 2, 2, 3]
    history.cut(np.array([True]))
    assert len(history.complete(close=False)) == 4


@pytest.mark.parametrize(("pad", "expected"), [(True, [[0, 1], [0, 1, 2], [0]]), (False, [[0, 1, 2]])])
def test_an_episode_shorter_than_a_sequence_is_padded_or_dropped(pad, expected):
    options = {"sequence_length": 3, "burn_in": 2, "n_step": 2, "pad_short_episodes": pad}
    history = SequenceHistory(table(**options), 1, None, 64)
    rows = play(history, one_env((2, "terminated"), (3, "truncated"), (1, "reset")))
    assert [numbers(row, "train_mask") for row in rows] == expected
    assert history.complete(close=True) == []


def test_close_cuts_the_running_episode_and_a_later_step_begins_another():
    history = SequenceHistory(table(sequence_length=4, overlap=2), 1, None, 64)
    steps = one_env((9, "terminated"))
    before = play(history, steps[:6])
    assert [numbers(row, "train_mask") for row in before] == [[0, 1, 2, 3], [2, 3, 4, 5]]
    assert before[1]["observations"][:, 2].tolist() == [3, 4, 5, 6, 7]
    assert before[1]["discounts"].tolist() == [0.5, 0.5, 0.5, 0.5, 0]
    assert emit(history, close=True) == []
    history.cut(np.array([True]))  # that which close has cut already
    assert [numbers(row, "train_mask") for row in play(history, steps[6:])] == [[6, 7, 8]]


def test_a_close_that_found_no_rows_has_cut_nothing():
    history = SequenceHistory(table(sequence_length=4, overlap=2), 1, None, 64)
    steps = one_env((9, "terminated"))
    for step in steps[:6]:
        add(history, step)
    assert len(history.complete(close=True)) == 2
    rows = play(history, steps[6:])
    assert [numbers(row, "train_mask")[0] for row in rows] == [0, 2, 4, 5]


def test_items_come_out_the_oldest_first():
    history = SequenceHistory(table(sequence_length=2), 2, None, 64)
    scripts = [script(0, [(1, "terminated"), (5, "reset")], None), script(1, [(3, "terminated"), (3, "reset")], None)]
    for steps in zip(*scripts, strict=True):
        add(history, steps)
    rows = stored(history, history.complete(close=True))
    begins = [tuple(row["observations"][row["train_mask"]][0].tolist()) for row in rows]
    # env 0: steps 0 | 1-5; env 1: steps 0-2 | 3-5
    assert begins == [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 1, 2), (1, 2, 3), (2, 2, 1), (1, 2, 4), (2, 2, 2)]


def test_dictionaries_of_observations_and_states_and_plain_numbers_are_stored_by_path():
    spec = rb.TransitionSpec(
        obs={"camera": rb.Field((2, 2), "uint8"), "body": {"speed": rb.Field(())}},
        action={"arm": rb.Field((2,)), "grip": rb.Field((), "int64")},
        recurrent_state={"h": rb.Field((2, 3)), "num_calls": rb.Field((), "int64")},
    )
    history = SequenceHistory(table(spec, sequence_length=2, burn_in=1), 2, None, 64)
    for t in range(3):
        code = np.array([1, 11]) + t

        def obs(code):
            camera = np.broadcast_to(code[:, None, None], (2, 2, 2)).astype(np.uint8)
            return {"camera": camera, "body": {"speed": code.astype(np.float32)}}

        action = {"arm": np.stack([code, -code], axis=1).astype(np.float32), "grip": code}
        state = {"h": np.broadcast_to(code[:, None, None], (2, 2, 3)).astype(np.float32), "num_calls": code}
        zeros = np.zeros(2)
        staged = history.stage(
            obs(code), action, zeros, zeros, obs(code + 1), zeros, zeros, *[None] * 6, recurrent_state=state
        )
        history.accept(staged)
    spans = history.complete(close=True)
    assert [(span.env, span.train_start) for span in spans] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    full, shifted = stored(history, [spans[1], spans[3]])
    assert full["observations/body/speed"].tolist() == [11, 12, 13, 14]
    assert shifted["observations/camera"].tolist() == [[[c, c], [c, c]] for c in (11, 12, 13, 14)]
    assert shifted["actions/arm"].tolist() == [[11, -11], [12, -12], [13, -13], [0, 0]]
    assert shifted["actions/grip"].tolist() == [11, 12, 13, 0]
    assert shifted["train_mask"].tolist() == [False, True, True, False]
    assert shifted["recurrent_states/h"].tolist() == [[11] * 3] * 2
    assert shifted["recurrent_states/num_calls"] == 11


def test_a_saved_history_goes_on_where_it_was():
    options = {"sequence_length": 4, "burn_in": 2, "overlap": 2, "n_step": 2}
    steps = one_env((30, "reset"), (3, "terminated"), autoreset="next_step")
    whole = SequenceHistory(table(**options), 1, "next_step", 2)
    first = SequenceHistory(table(**options), 1, "next_step", 2)
    second = SequenceHistory(table(**options), 1, "next_step", 2)
    expected = play(whole, steps)
    rows = play(first, steps[:23], close=False)
    arrays, values = first.state()
    second.restore({name: array.copy() for name, array in arrays.items()}, values)
    assert not second.is_full
    rows += play(second, steps[23:])
    assert [numbers(row) for row in rows] == [numbers(row) for row in expected]
    assert all((a[path] == b[path]).all() for a, b in zip(rows, expected, strict=True) for path in a)


@pytest.mark.parametrize("n_step", [1, 2])
def test_a_priority_is_refused_for_sequences_by_name(n_step):
    history = SequenceHistory(table(sequence_length=4, n_step=n_step), 1, None, 4)
    with pytest.raises(rb.InvalidInput, match=r"priority= is for single transitions, this table's items are sequences"):
        history.stage(
            np.zeros((1, 3), np.int16),
            np.zeros(1, np.int64),
            *([0.0], [False], np.zeros((1, 3), np.int16), None, None),
            priority=[1.0],
            q_taken=None,
            state_value=None,
            final_value=None,
            extras={"code": np.zeros((1, 2), np.int32)},
            infos=None,
            recurrent_state=np.zeros((1, 3), np.float32),
        )


# ---- the mix of TD errors ------------------------------------------------------------------------------------


def test_a_sequence_has_the_mix_of_its_largest_and_mean_td_error():
    errors = np.array([[1.0, -5.0, 3.0, NAN], [NAN, 2.0, 100.0, NAN]])
    mask = np.array([[True, True, True, False], [False, True, False, False]])
    assert sequence_td_errors(errors, mask, 0.9).tolist() == [pytest.approx(0.9 * 5 + 0.1 * 3), 2.0]
    assert sequence_td_errors(errors, mask, 1.0).tolist() == [5.0, 2.0]
    assert sequence_td_errors(errors.astype(np.float32), mask, 0.0).tolist() == [3.0, 2.0]
    assert sequence_td_errors(errors.astype(np.float32), mask, 0.0).dtype == np.float64


def test_the_mix_is_unknown_where_one_trained_td_error_is():
    errors = np.array([[1.0, NAN], [1.0, NAN]])
    mask = np.array([[True, True], [True, False]])
    assert np.isnan(sequence_td_errors(errors, mask, 0.9)).tolist() == [True, False]


def test_no_sequences_have_no_td_errors():
    assert sequence_td_errors(np.zeros((0, 4)), np.zeros((0, 4), np.bool_), 0.9).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 3)), np.ones((2, 2), np.bool_), 0.9), r"\[N, T\] alike, not \(2, 3\), \(2, 2\)"),
        ((np.zeros(3), np.ones(3, np.bool_), 0.9), r"\[N, T\] alike"),
        ((np.zeros((1, 3)), np.ones((1, 3), np.bool_), 1.5), r"eta must be in \[0, 1\], got 1.5"),
        ((np.zeros((2, 2)), np.array([[True, False], [False, False]]), 0.9), "sequence 1 has no trained step"),
    ],
)
def test_a_mix_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(rb.InvalidInput, match=message):
        sequence_td_errors(*arguments)


def test_td_errors_are_none_unless_values_came_to_a_prioritized_table():
    for sampler, values, expected in [
        (rb.Uniform(), ("q_taken", "state_value"), False),
        (rb.Prioritized(), (), False),
        (rb.Prioritized(), ("q_taken",), True),
    ]:
        history = SequenceHistory(table(sequence_length=1, sampler=sampler), 1, None, 4)
        add(history, *one_env((1, "terminated")), values)
        errors = history.td_errors(history.complete(close=False))
        assert (errors is not None) == expected


def test_in_next_step_mode_an_end_waits_for_the_value_that_its_dummy_brings_but_not_at_close():
    history = SequenceHistory(table(sequence_length=2, eta=1.0), 1, "next_step", 4)
    end, dummy = one_env((1, "truncated"), autoreset="next_step")
    add(history, end, ("q_taken", "state_value"))
    assert history.complete(close=False) == []
    assert len(history.complete(close=True)) == 1
    history.emitted(history.complete(close=False))
    add(history, dummy, ("state_value",))
    spans = history.complete(close=False)
    assert history.td_errors(spans).tolist() == [abs(-7 + 0.5 * value((1, 1, 2)) - q_taken(end[0]))]
    history.emitted(spans)
    assert history.complete(close=True) == []


def test_only_the_end_that_is_the_last_step_waits():
    history = SequenceHistory(table(sequence_length=2), 1, "next_step", 8)
    for steps in one_env((1, "truncated"), (2, "truncated"), (1, "truncated"), autoreset="next_step")[:-1]:
        add(history, steps, ("q_taken", "state_value"))
    assert [numbers(row) for row in stored(history, history.complete(close=False))] == [[0], [0, 1]]


def test_a_whole_window_whose_last_lookahead_step_is_an_end_has_the_final_observation_even_if_that_end_still_waits():
    history = SequenceHistory(table(sequence_length=2, burn_in=1, n_step=2), 1, "next_step", 4)
    for steps in one_env((4, "truncated"), autoreset="next_step")[:4]:
        add(history, steps, ("q_taken", "state_value"))
    (row,) = stored(history, history.complete(close=False))
    assert numbers(row, "train_mask") == [0, 1]
    assert row["observations"][:, 2].tolist() == [1, 2, 3, 4, 5]
    assert row["mask"].tolist() == [True] * 4 + [False]


# ---- a model: one environment at a time, one step at a time, no arrays ----------------------------------------


@dataclass
class Episode:
    steps: list = field(default_factory=list)
    times: list = field(default_factory=list)
    ended: bool = False
    reset: bool = False
    dummy_time: int | None = None


class Model:
    """Keeps every step for ever, and says what a history should have as complete."""

    def __init__(self, config, num_envs, autoreset):
        self.config = config
        self.autoreset = autoreset
        self.episodes = [[Episode(ended=True)] for _ in range(num_envs)]
        self.known = []  # what values came at each time
        self.emitted = set()

    def add(self, steps, values):
        now = len(self.known)
        self.known.append(values)
        for step, episodes in zip(steps, self.episodes, strict=True):
            if step.dummy:
                episodes[-1].dummy_time = now
                continue
            if episodes[-1].ended:
                episodes.append(Episode())
            episodes[-1].steps.append(step)
            episodes[-1].times.append(now)
            episodes[-1].ended = step.ended

    def cut(self, env):
        self.episodes[env][-1].ended = self.episodes[env][-1].reset = True

    def complete(self, close):
        """(time, env, episode, trained start) -> (row, TD errors of the trained steps), in the order of time."""
        items = {}
        for env, episodes in enumerate(self.episodes):
            for number, episode in enumerate(episodes):
                ended = close or (episode.ended and not self._waits(episode))
                for start, stop in self._trained(len(episode.steps), ended):
                    key = (episode.times[start], env, number, start)
                    if key not in self.emitted:
                        trained = range(start, stop)
                        errors = [self._td_error(episode, t, close) for t in trained]
                        items[key] = (self._row(episode, trained, close), errors)
        return dict(sorted(items.items()))

    def _waits(self, episode):
        if self.autoreset != "next_step" or not episode.steps or not any(self.known):
            return False
        last, known = episode.steps[-1], self.known[episode.times[-1]]
        needed = not last.terminated and "final_value" not in known and "state_value" in known
        return needed and not episode.reset and episode.times[-1] == len(self.known) - 1

    def _trained(self, num_steps, ended):
        length, n = self.config.sequence_length, self.config.n_step
        regular = {start: start + length for start in range(0, num_steps, length - self.config.overlap)}
        if not ended:
            return [(start, stop) for start, stop in regular.items() if stop + n <= num_steps]
        if 0 < num_steps < length:
            return [(0, num_steps)] if self.config.pad_short_episodes else []
        regular = {start: stop for start, stop in regular.items() if stop < num_steps}
        return [*regular.items(), (num_steps - length, num_steps)] if num_steps else []

    def _window(self, episode, first, row_stop):
        """(reward, steps, discount, terminated, truncated)"""
        steps = episode.steps[first : min(first + self.config.n_step, row_stop)]
        reward = sum(GAMMA**k * step.reward for k, step in enumerate(steps))
        terminated, truncated = steps[-1].terminated, steps[-1].truncated
        return reward, len(steps), 0.0 if terminated else GAMMA ** len(steps), terminated, truncated

    def _row(self, episode, trained, close):
        first = max(0, trained.start - self.config.burn_in)
        row_stop = min(trained.stop + self.config.n_step, len(episode.steps))
        steps = episode.steps[first:row_stop]
        windows = [self._window(episode, t, row_stop) for t in range(first, row_stop)]
        rewards, n_steps, discounts, terminateds, truncateds = zip(*windows, strict=True)
        observations = [step.obs for step in steps]
        if (episode.ended or close) and row_stop == len(episode.steps):
            observations.append(steps[-1].next_obs)
        row = {
            "observations": observations,
            "actions": [step.action for step in steps],
            "extras/code": [(step.action, -step.action) for step in steps],
            "step_rewards": [step.reward for step in steps],
            "rewards": rewards,
            "n_steps": n_steps,
            "discounts": discounts,
            "dones": terminateds,
            "terminateds": terminateds,
            "truncateds": truncateds,
            "mask": [True] * len(steps),
            "train_mask": [t in trained for t in range(first, row_stop)],
        }
        num_steps = self.config.burn_in + self.config.sequence_length + self.config.n_step
        for name, values in row.items():
            padding = (0, 0, 0) if name == "observations" else (0, 0) if name == "extras/code" else 0
            row[name] = [*values, *[padding] * (num_steps - len(values))][:num_steps]
        return row | {"recurrent_states": steps[0].obs}

    def _td_error(self, episode, first, close):
        reward, n_steps, discount, terminated, _ = self._window(episode, first, len(episode.steps))
        last = first + n_steps - 1
        if "q_taken" not in self.known[episode.times[first]]:
            return NAN
        if last + 1 < len(episode.steps):
            following = episode.times[last + 1]
        else:
            following = episode.dummy_time
        has_value = following is not None and "state_value" in self.known[following]
        has_final = episode.steps[last].ended and "final_value" in self.known[episode.times[last]]
        if not terminated and not has_value and not has_final:
            return NAN
        bootstrap = 0.0 if terminated else discount * value(episode.steps[last].next_obs)
        return reward + bootstrap - q_taken(episode.steps[first])


@st.composite
def configs(draw):
    length = draw(st.integers(1, 9))
    return table(
        sequence_length=length,
        overlap=draw(st.integers(0, length - 1)),
        burn_in=draw(st.integers(0, 5)),
        n_step=draw(st.integers(1, 4)),
        pad_short_episodes=draw(st.booleans()),
    )


EPISODE = st.tuples(st.one_of(st.integers(1, 4), st.integers(1, 40)), st.sampled_from(ENDS))


@st.composite
def scripts(draw):
    """(steps [num_steps][num_envs], autoreset)"""
    autoreset = draw(st.sampled_from([None, "next_step", "same_step", "disabled"]))
    episodes = st.lists(EPISODE, min_size=1, max_size=8)
    envs = [list(script(env, draw(episodes), autoreset)) for env in range(draw(st.integers(1, 3)))]
    return list(zip(*envs, strict=False)), autoreset


VALUES = [("q_taken", "state_value"), ("q_taken", "state_value", "final_value"), ("state_value",), ("q_taken",), ()]


def check_complete(history, model, *, close=False):
    """Compare what is complete with the model; return both."""
    spans = history.complete(close=close)
    expected = model.complete(close)
    rows = stored(history, spans)
    assert len(spans) <= history.max_items
    assert len(rows) == len(expected)
    for row, (wanted, _) in zip(rows, expected.values(), strict=True):
        assert {path: array.tolist() for path, array in row.items()} == {
            path: np.array(wanted[path], array.dtype).tolist() for path, array in row.items()
        }
    errors = history.td_errors(spans)
    if any(model.known):
        sizes = [np.abs(errors) for _, errors in expected.values()]
        mixes = [ETA * size.max() + (1 - ETA) * size.mean() for size in sizes]
        assert errors == pytest.approx(mixes, rel=1e-5, nan_ok=True)
    else:
        assert errors is None
    return spans, expected.keys()


@settings(max_examples=150, deadline=None)
@given(
    config=configs(), played=scripts(), chunk=st.integers(1, 12), with_values=st.booleans(), seed=st.integers(0, 999)
)
def test_whenever_it_is_asked_the_history_has_what_the_model_has(config, played, chunk, with_values, seed):
    steps_of_envs, autoreset = played
    num_envs = len(steps_of_envs[0])
    rng = np.random.default_rng(seed)
    asks, takes, steady = rng.random(3)
    history, model = SequenceHistory(config, num_envs, autoreset, chunk), Model(config, num_envs, autoreset)
    num_new = 0

    def maybe_complete():
        nonlocal num_new
        if history.is_full or rng.random() < asks:
            spans, keys = check_complete(history, model)
            if history.is_full or rng.random() < takes:
                history.emitted(spans)
                model.emitted |= keys
                num_new = 0

    for steps in steps_of_envs:
        values = VALUES[0 if rng.random() < steady else rng.integers(5)] if with_values else ()
        add(history, steps, values)
        model.add(steps, values)
        num_new += 1
        assert history.is_full == (num_new == chunk)
        assert history.num_steps <= history.capacity
        for env, step in enumerate(steps):
            if step.reset:
                if rng.random() < 0.5:  # else several are reset at once, and nothing was asked before
                    maybe_complete()
                history.cut(np.arange(num_envs) == env)
                model.cut(env)
        maybe_complete()
    spans, keys = check_complete(history, model, close=True)
    history.emitted(spans)
    model.emitted |= keys
    assert history.complete(close=True) == []


@settings(max_examples=100, deadline=None)
@given(config=configs(), played=scripts(), chunk=st.integers(1, 12))
def test_every_step_of_an_episode_that_is_kept_is_trained_and_no_sequence_leaves_its_episode(config, played, chunk):
    steps_of_envs, autoreset = played
    history = SequenceHistory(config, len(steps_of_envs[0]), autoreset, chunk)
    rows = []
    for i, steps in enumerate(steps_of_envs):
        add(history, steps)
        history.cut(np.array([step.reset for step in steps]))
        if i % chunk == chunk - 1:
            rows += emit(history)
    rows += emit(history, close=True)

    happened = {}
    for step in (step for steps in steps_of_envs for step in steps if not step.dummy):
        happened.setdefault(step.obs[:2], set()).add(step.obs)
    trained, begins = set(), []
    for row in rows:
        observed = [tuple(obs) for obs in row["observations"].tolist()]
        num_steps = int(row["mask"].sum())
        assert row["mask"].tolist() == [i < num_steps for i in range(len(observed))]
        assert observed[0] == tuple(row["recurrent_states"].tolist())
        assert [(*observed[0][:2], number) for number in range(observed[0][2], observed[0][2] + num_steps)] == (
            observed[:num_steps]
        )
        assert set(observed[:num_steps]) <= happened[observed[0][:2]]
        train_steps = [obs for obs, trains in zip(observed, row["train_mask"], strict=True) if trains]
        trained |= set(train_steps)
        begins.append(train_steps[0])
        # The observation that a trained step bootstraps from is in the row.
        for t in np.flatnonzero(row["train_mask"] & ~row["terminateds"]):
            assert observed[t + row["n_steps"][t]] == (*observed[t][:2], observed[t][2] + row["n_steps"][t])
    assert len(begins) == len(set(begins))
    long_enough = 1 if config.pad_short_episodes else config.sequence_length
    kept = [steps for steps in happened.values() if len(steps) >= long_enough]
    assert trained == set().union(*kept)


# ---- bounds --------------------------------------------------------------------------------------------------


def most_items(config, chunk, scripts_of_envs):
    """The most items at once when they are taken out after every `chunk` steps."""
    history = SequenceHistory(config, len(scripts_of_envs), None, chunk)
    most = 0
    for i, steps in enumerate(zip(*scripts_of_envs, strict=True)):
        add(history, steps)
        if i % chunk == chunk - 1:
            history.cut(np.array([step.reset for step in steps]))
            spans = history.complete(close=False)
            most = max(most, len(spans))
            history.emitted(spans)
            assert history.num_steps + chunk <= history.capacity
    return most, history.max_items


@pytest.mark.parametrize("chunk", [1, 5, 16])
@pytest.mark.parametrize(("length", "overlap", "n"), [(1, 0, 1), (4, 3, 1), (4, 3, 3), (4, 0, 3), (5, 3, 4), (3, 1, 9)])
def test_short_episodes_after_a_long_one_are_as_many_items_as_were_promised_and_no_more(length, overlap, n, chunk):
    config = table(sequence_length=length, overlap=overlap, n_step=n, burn_in=2)
    reached = set()
    for num_before in range(1, 3 * length + n):
        # The long episode's end is known only with the chunk of episodes of one step.
        history = SequenceHistory(config, 2, None, chunk)
        for number in range(num_before):
            add(history, [Step(env, 0, number) for env in range(2)])
            history.emitted(history.complete(close=False))
        history.cut(np.array([True, True]))
        for episode in range(1, chunk + 1):
            add(history, [Step(env, episode, 0, terminated=True) for env in range(2)])
        num_items = len(history.complete(close=False))
        assert num_items <= history.max_items
        reached.add(num_items)
    assert max(reached) == history.max_items


@pytest.mark.parametrize("chunk", [1, 7, 24])
@pytest.mark.parametrize(("length", "overlap", "n"), [(1, 0, 1), (4, 3, 2), (4, 0, 3), (7, 3, 2), (9, 8, 1)])
def test_without_short_episodes_the_bound_holds_for_episodes_of_every_length_and_is_near(length, overlap, n, chunk):
    config = table(sequence_length=length, overlap=overlap, n_step=n, pad_short_episodes=False)
    most = 0
    for episode_length in (*range(1, 2 * length + 3), 3 * chunk):
        for first_length in range(1, min(episode_length, 2 * length) + 1):
            lengths = [first_length, *[episode_length] * (6 * chunk // episode_length + 3)]
            steps = script(0, [(length, "terminated") for length in lengths], None)
            num_items, bound = most_items(
                config, chunk, [[step for step, _ in zip(steps, range(6 * chunk), strict=False)]]
            )
            most = max(most, num_items)
            assert num_items <= bound
    assert bound <= most + 3


def test_ten_thousand_steps_are_kept_in_the_memory_of_a_few():
    config = table(sequence_length=4, burn_in=2, overlap=2, n_step=2)
    history = SequenceHistory(config, 2, None, 3)
    endless = (Step(0, 0, number) for number in count())
    short = script(1, [(1 + i % 5, "terminated") for i in range(5000)], None)
    num_items = 0
    for i, step in zip(range(10_000), endless, strict=False):
        # Observations are int16, which the numbers outgrow.
        add(history, [Step(0, 0, step.number % 1000), next(short)])
        if i % 3 == 2:
            spans = history.complete(close=False)
            num_items += len(spans)
            history.emitted(spans)
    # T - 1 steps that wait, T / 4 that are not worth moving, and a chunk
    assert history.capacity == 7 + 2 + 3
    assert {len(array) for array in history._by_step} == {history.capacity}
    assert num_items == pytest.approx(10_000 / 2 + 10_000 / 15 * 6, rel=0.01)
    emit(history, close=True)


def test_an_autoreset_dummy_that_is_reset_by_hand_is_no_episode():
    history = SequenceHistory(table(sequence_length=2), 1, "next_step", 1)
    steps = one_env((2, "truncated, dummy reset"), (1, "terminated"), autoreset="next_step")
    assert [numbers(row) for row in play(history, steps)] == [[0, 1], [0]]
