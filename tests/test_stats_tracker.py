"""Episode statistics: hand-computed values, refusals that change nothing, and merges against one tracker."""

import json
import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_buffer.errors import InvalidInput
from rl_buffer.stats_tracker import UNDRAINED_STEPS, Episode, Moments, StatsTracker

NAN = float("nan")
NO_ENDS = [False, False]


def episode(reward, length=1, **fields):
    return Episode(0, float(reward), length, **fields)


def running_of(tracker):
    """Reward, length and metrics of each environment's running episode."""
    return np.vstack((tracker._rewards, tracker._num_steps - tracker._begins, *tracker._sums))


def state_of(tracker):
    """Everything that a refused call must leave as it was."""
    return (
        tracker.get_statistics(),
        tracker.get_raw_values(),
        running_of(tracker).tolist(),
        list(tracker._undrained),
    )


def test_there_are_no_statistics_before_the_first_episode_ends():
    tracker = StatsTracker(extra_metrics_keys=["speed"], done_reason_keys=["fell"])
    tracker.update(1.0, False)
    assert tracker.get_statistics() == {}
    assert tracker.drain() == []


def test_statistics_of_two_episodes_are_those_computed_by_hand():
    tracker = StatsTracker(category="eval", extra_metrics_keys=["speed"], done_reason_keys=["fell", "time"])
    for reward, speed, done, truncated in ((1, 4, 0, 0), (2, 8, 1, 0), (5, 1, 0, 1)):
        reasons = {"fell": [bool(done)], "time": [bool(truncated)]}
        tracker.update([reward], [done], [truncated], metrics={"speed": [speed]}, done_reasons=reasons)
    statistics = tracker.get_statistics()
    assert statistics == {
        "eval/rewards_mean": 4.0,
        "eval/rewards_std": 1.0,
        "eval/rewards_min": 3.0,
        "eval/rewards_max": 5.0,
        "eval/lengths_mean": 1.5,
        "eval/lengths_std": 0.5,
        "eval/lengths_min": 1.0,
        "eval/lengths_max": 2.0,
        "eval/speed_mean": 3.5,  # of 6 and 1
        "eval/speed_std": 2.5,
        "eval/speed_min": 1.0,
        "eval/speed_max": 6.0,
        "eval/Done/fell_rate": 0.5,
        "eval/Done/time_rate": 0.5,
        "eval/reward_per_step": 8 / 3,
        "eval/num_episodes": 2.0,
        "eval/lifetime_rewards_mean": 4.0,
        "eval/lifetime_rewards_std": 1.0,
        "eval/lifetime_rewards_min": 3.0,
        "eval/lifetime_rewards_max": 5.0,
    }
    assert {type(value) for value in statistics.values()} == {float}
    assert tracker.get_raw_values() == {
        "rewards": [3.0, 5.0],
        "lengths": [2.0, 1.0],
        "speed": [6.0, 1.0],
        "Done/fell": [1.0, 0.0],
        "Done/time": [0.0, 1.0],
    }


def test_the_window_forgets_what_the_lifetime_keeps():
    tracker = StatsTracker(window=2)
    for reward in (10.0, 1.0, 4.0):
        tracker.update(reward, True)
    statistics = tracker.get_statistics()
    assert statistics["train/rewards_mean"] == 2.5
    assert statistics["train/lifetime_rewards_mean"] == 5.0
    assert statistics["train/num_episodes"] == 3


def test_environments_run_their_episodes_independently():
    tracker = StatsTracker(2)
    tracker.update([1, 10], [False, False])
    tracker.update([2, 20], [False, True])
    tracker.update([4, 40], [True, False])
    assert tracker.drain() == [Episode(0, 30.0, 2), Episode(1, 7.0, 3)]


@pytest.mark.parametrize("num_envs", [1, 2])
def test_both_flags_at_once_end_one_episode(num_envs):
    tracker = StatsTracker(num_envs)
    both = [True] * num_envs
    tracker.update([1.0] * num_envs, both, both)
    assert tracker.drain() == [Episode(env, 1.0, 1) for env in range(num_envs)]


def test_a_masked_step_is_in_no_return_length_metric_or_ending():
    tracker = StatsTracker(2, extra_metrics_keys=["speed"])
    tracker.update([1, 1], NO_ENDS, metrics={"speed": [2, 2]})
    tracker.update([NAN, 1], [True, False], metrics={"speed": [NAN, 4]}, mask=[False, True])
    tracker.update([1, 1], [True, True], metrics={"speed": [4, 6]})
    assert tracker.drain() == [
        Episode(0, 2.0, 2, metrics={"speed": 3.0}),
        Episode(1, 3.0, 3, metrics={"speed": 4.0}),
    ]


def test_one_environment_can_be_masked_too():
    tracker = StatsTracker()
    tracker.update(1.0, False)
    tracker.update(0.0, True, mask=False)
    tracker.update(1.0, True, mask=np.array([True]))
    assert tracker.drain() == [Episode(0, 2.0, 2)]


def test_a_discarded_episode_is_dropped_and_the_others_go_on():
    tracker = StatsTracker(2, extra_metrics_keys=["speed"])
    tracker.update([5, 1], NO_ENDS, metrics={"speed": [9, 2]})
    tracker.discard([True, False])
    tracker.update([1, 1], [True, True], metrics={"speed": [3, 4]})
    assert tracker.drain() == [
        Episode(0, 1.0, 1, metrics={"speed": 3.0}),
        Episode(1, 2.0, 2, metrics={"speed": 3.0}),
    ]


def test_a_metric_is_the_mean_over_the_steps_that_gave_it_and_absent_where_none_did():
    tracker = StatsTracker(extra_metrics_keys=["speed"])
    tracker.update(0.0, True)
    assert "train/speed_mean" not in tracker.get_statistics()
    tracker.update(0.0, False, metrics={"speed": 2.0})
    tracker.update(0.0, False)
    tracker.update(0.0, True, metrics={"speed": 4.0})
    assert [e.metrics for e in tracker.drain()] == [{}, {"speed": 3.0}]
    assert tracker.get_statistics()["train/speed_min"] == 3.0
    assert tracker.get_raw_values()["speed"] == [pytest.approx(NAN, nan_ok=True), 3.0]


def test_done_reasons_count_only_where_the_episode_ends():
    tracker = StatsTracker(2, done_reason_keys=["fell"])
    tracker.update([0, 0], [True, False], done_reasons={"fell": [False, True]})
    tracker.update([0, 0], [False, True])
    assert tracker.get_statistics()["train/Done/fell_rate"] == 0.0


class Tensor:
    """What the tracker may use of a torch tensor that requires grad on another device."""

    def __init__(self, values, on_cpu=False):
        self.values, self.on_cpu, self.shape = np.asarray(values), on_cpu, np.shape(values)

    def detach(self):
        return self

    def cpu(self):
        return Tensor(self.values, on_cpu=True)

    def item(self):
        return self.values.item()

    def __array__(self, dtype=None, copy=None):
        assert self.on_cpu, "can't convert a device tensor to NumPy"
        return self.values.astype(dtype)


@pytest.mark.parametrize("make", [np.array, list, Tensor, lambda values: np.array(values)[:, None]])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_arrays_lists_and_tensors_are_taken_as_vectors_or_columns(make, num_envs):
    tracker = StatsTracker(num_envs)
    tracker.update(make([1.5] * num_envs), make([False] * num_envs), make([True] * num_envs))
    assert tracker.get_raw_values()["rewards"] == [1.5] * num_envs


@pytest.mark.parametrize(
    "one", [float, int, np.float32, np.array, lambda x: [x], lambda x: np.array([[x]]), lambda x: Tensor(x)]
)
def test_one_environment_takes_scalars_too(one):
    tracker = StatsTracker()
    tracker.update(one(1), one(0))
    tracker.update(one(1), one(0), one(1))
    assert tracker.drain() == [Episode(0, 2.0, 2)]


def test_the_fast_path_of_one_environment_agrees_with_the_general_one():
    fast, general = StatsTracker(window=7), StatsTracker(window=7)
    rng = np.random.default_rng(0)
    for _ in range(200):
        reward, done, truncated = rng.normal(), rng.random() < 0.1, rng.random() < 0.1
        fast.update(reward, done, truncated)
        general.update([reward], [done], [truncated], mask=[True])
    assert state_of(fast) == state_of(general)
    assert fast.get_statistics()["train/num_episodes"] > 20


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf, 1e101, -1e300])
def test_a_number_that_would_spoil_the_moments_is_refused_with_its_environment(bad):
    tracker = StatsTracker(3, extra_metrics_keys=["speed"])
    tracker.update([1, 2, 3], [True, False, False])
    before = state_of(tracker)
    with pytest.raises(InvalidInput, match=r"rewards\[1\]"):
        tracker.update([0, bad, bad], [True, True, True])
    with pytest.raises(InvalidInput, match=r"speed\[2\]"):
        tracker.update([0, 0, 0], [True, True, True], metrics={"speed": [0, 0, bad]})
    assert state_of(tracker) == before

    single = StatsTracker()
    with pytest.raises(InvalidInput, match=r"rewards\[0\]"):
        single.update(bad, True)
    assert state_of(single) == state_of(StatsTracker())


@pytest.mark.parametrize("name", ["rewards", "dones", "truncateds", "mask", "speed", "fell"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 2), (2, 2), (2, 1, 1)])
def test_any_shape_but_one_per_environment_is_refused_by_name(name, shape):
    tracker = StatsTracker(2, extra_metrics_keys=["speed"], done_reason_keys=["fell"])
    arguments = {key: np.zeros(2) for key in ("rewards", "dones", "truncateds", "mask", "speed", "fell")}
    arguments[name] = np.ones(shape)
    metrics, reasons = {"speed": arguments.pop("speed")}, {"fell": arguments.pop("fell")}
    with pytest.raises(InvalidInput, match=rf"{name} has shape"):
        tracker.update(**arguments, metrics=metrics, done_reasons=reasons)
    assert not running_of(tracker).any()


@pytest.mark.parametrize("name", ["rewards", "dones", "truncateds"])
@pytest.mark.parametrize("shape", [(0,), (2,), (1, 1, 1), (1, 2)])
def test_one_environment_refuses_the_wrong_shape_too(name, shape):
    tracker = StatsTracker()
    arguments = {"rewards": 1.0, "dones": False, "truncateds": False, name: np.ones(shape)}
    with pytest.raises(InvalidInput, match=rf"{name} has shape"):
        tracker.update(**arguments)
    assert not running_of(tracker).any()


@pytest.mark.parametrize("argument", ["metrics", "done_reasons"])
def test_unknown_keys_are_refused(argument):
    tracker = StatsTracker(2, extra_metrics_keys=["speed"], done_reason_keys=["fell"])
    with pytest.raises(InvalidInput, match=rf"{argument} has keys \['rewards'\]"):
        tracker.update([1, 1], [True, True], **{argument: {"rewards": [1, 1]}})
    assert not running_of(tracker).any()


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_envs": 0},
        {"window": 0},
        {"extra_metrics_keys": ["speed", "speed"]},
        {"extra_metrics_keys": ["rewards"]},
        {"extra_metrics_keys": ["lifetime_rewards"]},
        {"extra_metrics_keys": ["Done/fell"], "done_reason_keys": ["fell"]},
    ],
)
def test_a_tracker_that_could_not_tell_its_keys_apart_is_refused(arguments):
    with pytest.raises(InvalidInput):
        StatsTracker(**arguments)


# Episodes on their way to the server.


def test_drain_gives_every_episode_once_and_leaves_the_statistics():
    tracker = StatsTracker(window=1)
    tracker.update(1.0, True)
    tracker.update(2.0, True)
    assert [e.reward for e in tracker.drain()] == [1.0, 2.0]
    assert tracker.drain() == []
    assert tracker.get_raw_values()["rewards"] == [2.0]


def test_an_episode_survives_the_wire():
    sent = episode(1.5, 3, metrics={"speed": 2.0}, done_reasons=frozenset({"fell", "time"}))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode([sent]), type=list[Episode]) == [sent]


def test_the_server_records_what_actors_drain_in_order_of_arrival():
    server, actors = StatsTracker(window=3), [StatsTracker(), StatsTracker()]
    for reward in (1.0, 2.0):
        for i, actor in enumerate(actors):
            actor.update(reward + 10 * i, True)
    for actor in reversed(actors):
        server.record(actor.drain())
    assert server.get_raw_values()["rewards"] == [12.0, 1.0, 2.0]
    assert [e.sequence for e in server._episodes] == [1, 2, 3]
    assert server.get_statistics()["train/num_episodes"] == 4
    assert server.drain() == []  # they are not the server's to send


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (episode(NAN), r"episodes\[1\].reward"),
        (episode(math.inf), r"episodes\[1\].reward"),
        (episode(1e300), r"episodes\[1\].reward"),
        (episode(0, 0), r"episodes\[1\].length"),
        (episode(0, 2**64), r"episodes\[1\].length"),
        (episode(0, metrics={"speed": NAN}), r"episodes\[1\].speed"),
        (episode(0, metrics={"spede": 0.0}), r"episodes\[1\].metrics"),
        (episode(0, done_reasons=frozenset({"flew"})), r"episodes\[1\].done_reasons"),
    ],
)
def test_a_bad_episode_is_refused_by_field_with_all_that_came_with_it(bad, field):
    tracker = StatsTracker(extra_metrics_keys=["speed"], done_reason_keys=["fell"])
    before = state_of(tracker)
    with pytest.raises(InvalidInput, match=field):
        tracker.record([episode(1), bad])
    assert state_of(tracker) == before


def test_the_largest_rewards_that_are_accepted_leave_finite_statistics():
    actor, server = StatsTracker(2), StatsTracker()
    actor.update([1e100, -1e100], NO_ENDS)
    actor.update([1e100, -1e100], [True, True])
    server.record(actor.drain())
    assert all(map(math.isfinite, server.get_statistics().values()))
    assert server.get_statistics()["train/lifetime_rewards_std"] == pytest.approx(2e100)


def test_a_million_steps_of_which_nobody_asks_stay_bounded():
    tracker = StatsTracker(64, window=10)
    rewards, ended = np.ones(64), np.ones(64, np.bool_)
    ended[1:] = False
    steps = 1_000_000 // 64
    for _ in range(steps):
        tracker.update(rewards, ended)
    assert len(tracker._episodes) == 10
    assert len(tracker._undrained) <= UNDRAINED_STEPS * 64
    assert tracker.get_statistics()["train/num_episodes"] == steps
    single = StatsTracker()
    for _ in range(3 * UNDRAINED_STEPS):
        single.update(1.0, True)
    assert len(single.drain()) == UNDRAINED_STEPS


# Merging.

EPISODES = st.builds(
    episode,
    st.floats(-1e6, 1e6),
    st.integers(1, 1000),
    metrics=st.dictionaries(st.just("speed"), st.floats(-10, 10)),
    done_reasons=st.frozensets(st.just("fell")),
)


def tracker_of(episodes, window=5, **arguments):
    tracker = StatsTracker(window=window, extra_metrics_keys=["speed"], done_reason_keys=["fell"], **arguments)
    tracker.record(episodes)
    return tracker


@given(st.lists(st.lists(EPISODES, max_size=12), min_size=1, max_size=4), st.integers(1, 8))
def test_merged_trackers_equal_one_that_saw_all_their_streams_in_order_of_sequence(streams, window):
    merged = StatsTracker.merge([tracker_of(stream, window) for stream in streams])
    numbered = [(i, k, e) for k, stream in enumerate(streams) for i, e in enumerate(stream)]
    one = tracker_of([e for _, _, e in sorted(numbered, key=lambda entry: entry[:2])], window)
    np.testing.assert_equal(merged.get_raw_values(), one.get_raw_values())
    statistics, expected = merged.get_statistics(), one.get_statistics()
    assert statistics.keys() == expected.keys()
    largest = max((abs(e.reward) for _, _, e in numbered), default=0.0)
    for key, value in expected.items():
        tolerance = 1e-9 * largest if "lifetime" in key else 0.0
        assert statistics[key] == pytest.approx(value, rel=0.0, abs=tolerance)


@given(
    st.lists(st.lists(st.floats(-1e9, 1e9), max_size=20), min_size=1, max_size=5),
    st.sampled_from([0.0, 1e9, -1e12]),
)
def test_merged_moments_are_those_of_the_joined_numbers(streams, offset):
    total = Moments()
    for stream in streams:
        moments = Moments()
        for x in stream:
            moments.merge(Moments(1, x + offset, 0.0, x + offset, x + offset))
        total.merge(moments)
    joined = np.array([x + offset for stream in streams for x in stream])
    assert total.count == len(joined)
    if len(joined):
        tolerance = 1e-9 * np.abs(joined).max()
        assert total.mean == pytest.approx(joined.mean(), rel=0.0, abs=tolerance)
        assert math.sqrt(total.m2 / total.count) == pytest.approx(joined.std(), rel=0.0, abs=tolerance)
        assert (total.minimum, total.maximum) == (joined.min(), joined.max())


def test_of_equal_sequence_numbers_that_of_the_later_tracker_comes_later():
    merged = StatsTracker.merge([tracker_of([episode(1), episode(2)], 3), tracker_of([episode(3), episode(4)], 3)])
    assert merged.get_raw_values()["rewards"] == [3.0, 2.0, 4.0]


def test_merging_step_by_step_equals_merging_at_once():
    trackers = [tracker_of([episode(10 * k + i) for i in range(k + 2)]) for k in range(3)]
    stepwise = StatsTracker.merge([StatsTracker.merge(trackers[:2]), trackers[2]])
    assert stepwise.get_raw_values() == StatsTracker.merge(trackers).get_raw_values()


def test_a_merge_leaves_its_trackers_and_their_running_episodes_alone():
    tracker = StatsTracker(2)
    tracker.update([1, 2], [True, False])
    before = state_of(tracker)
    merged = StatsTracker.merge([tracker, StatsTracker()])
    assert merged.num_envs == 3
    assert merged.drain() == []
    merged.update([5, 5, 5], [True, True, True])
    assert merged.get_raw_values()["rewards"] == [1.0, 5.0, 5.0, 5.0]
    assert state_of(tracker) == before


@pytest.mark.parametrize(
    "other",
    [{"window": 7}, {"category": "eval"}, {"extra_metrics_keys": ["speed"]}, {"done_reason_keys": ["fell"]}],
)
def test_trackers_that_differ_are_not_merged(other):
    with pytest.raises(InvalidInput, match="one window, category and keys"):
        StatsTracker.merge([StatsTracker(), StatsTracker(**other)])


@pytest.mark.parametrize("num_episodes", [0, 2, 5])
def test_a_tracker_goes_on_from_the_state_of_another(num_episodes):
    keys = {"extra_metrics_keys": ["speed"], "done_reason_keys": ["fell"]}
    trackers = [StatsTracker(window=3, **keys) for _ in range(2)]
    episodes = [episode(0.1 * i, i + 1, metrics={"speed": i / 3}, done_reasons={"fell"}) for i in range(num_episodes)]
    trackers[0].record(episodes)
    trackers[1].restore(json.loads(json.dumps(trackers[0].state())))
    for tracker in trackers:
        tracker.record([episode(1 / 7)])
    assert state_of(trackers[0]) == state_of(trackers[1])
    assert trackers[0]._lifetime == trackers[1]._lifetime


def test_a_smaller_window_takes_the_newest_episodes_over():
    tracker, smaller = StatsTracker(window=5), StatsTracker(window=2)
    tracker.record([episode(i) for i in range(7)])
    smaller.restore(tracker.state())
    assert smaller.get_raw_values()["rewards"] == [5.0, 6.0]
    assert smaller.get_statistics()["train/num_episodes"] == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": [[0, 1.0, 1, {"speed": 2.0}, []]]}, "unknown|made with"),
        ({"episodes": [[0, 1.0, 0, {}, []]]}, "length is 0"),
        ({"episodes": [[5, 1.0, 1, {}, []]]}, r"episodes \[5\] are not the last of 2"),
        ({"episodes": [["x"]]}, "this is not the state of a StatsTracker"),
        ({"lifetime": {"count": -1.5}}, "this is not the state of a StatsTracker"),
        ({"lifetime": None}, "this is not the state of a StatsTracker"),
    ],
)
def test_a_state_that_contradicts_itself_is_refused_and_changes_nothing(changes, message):
    tracker, other = StatsTracker(), StatsTracker()
    tracker.record([episode(1.0), episode(2.0)])
    other.record([episode(3.0)])
    before = state_of(other)
    with pytest.raises(InvalidInput, match=message):
        other.restore(tracker.state() | changes)
    assert state_of(other) == before


def test_nothing_is_not_merged():
    with pytest.raises(InvalidInput, match="merge needs"):
        StatsTracker.merge([])
