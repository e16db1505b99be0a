"""The statistics of all clients and of each: exact sums, bounded names, and processes that die."""

import json
import os
import signal

import child_processes as child
import numpy as np
import pytest
from child_processes import NUMBERED_SPEC
from episode_envs import committed_leaves

import rl_buffer as rb
from rl_buffer import server_stats
from rl_buffer.errors import InvalidInput
from rl_buffer.server_stats import ServerStats
from rl_buffer.stats_tracker import Episode, Moments, StatsTracker


def episodes(*rewards, length=10):
    return [Episode(0, float(reward), length) for reward in rewards]


def recorded(rng, num_commits=200, num_names=5, **options):
    """Statistics, and the rewards of each name."""
    stats, rewards = ServerStats(**options), {}
    for _ in range(num_commits):
        name, own = f"actor-{rng.integers(num_names)}", rng.normal(100.0, 10.0, rng.integers(1, 4)).tolist()
        stats.record_of(name, episodes(*own))
        rewards.setdefault(name, []).extend(own)
    return stats, rewards


def test_a_number_that_is_added_counts_to_the_bit_as_one_that_is_merged():
    added, merged = Moments(), Moments()
    for number in np.random.default_rng(0).normal(1e3, 1.0, 1000).tolist():
        added.add(number)
        merged.merge(Moments(1, number, 0.0, number, number))
    assert added == merged


def test_all_together_have_the_figures_of_one_tracker_that_saw_every_episode():
    alone, together = StatsTracker(window=7), ServerStats(window=7)
    for number in range(50):
        alone.record(episodes(number, -number))
        together.record_of(f"actor-{number % 3}", episodes(number, -number))
    assert together.get_statistics() == alone.get_statistics()


def test_each_client_has_the_figures_of_its_own_episodes_and_together_they_are_those_of_all():
    stats, rewards = recorded(np.random.default_rng(1), window=20)
    figures, merged = stats.by_client(), Moments()
    assert stats.num_of_others == 0
    for name, own in rewards.items():
        prefix = f"train/clients/{name}"
        assert figures[f"{prefix}/num_episodes"] == len(own)
        assert figures[f"{prefix}/rewards_mean"] == pytest.approx(np.mean(own[-20:]))
        assert figures[f"{prefix}/lengths_mean"] == 10.0
        assert figures[f"{prefix}/lifetime_rewards_mean"] == pytest.approx(np.mean(own))
        assert figures[f"{prefix}/lifetime_rewards_std"] == pytest.approx(np.std(own))
        assert figures[f"{prefix}/lifetime_rewards_min"] == min(own)
        assert figures[f"{prefix}/lifetime_rewards_max"] == max(own)
        merged.merge(stats.clients[name].lifetime)
    assert len(figures) == 7 * len(rewards)
    life = stats.lifetime
    assert (merged.count, merged.minimum, merged.maximum) == (life.count, life.minimum, life.maximum)
    assert [merged.mean, merged.m2] == pytest.approx([life.mean, life.m2], rel=1e-9)


def test_beyond_the_limit_the_name_whose_last_episode_is_longest_ago_is_counted_among_others(monkeypatch):
    monkeypatch.setattr(server_stats, "MAX_CLIENTS", 3)
    stats = ServerStats()
    for name in "abcad":  # d takes the place of b
        stats.record_of(name, episodes(1, 2))
    assert list(stats.clients) == ["c", "a", "d"]
    assert sorted(record.slot for record in stats.clients.values()) == [0, 1, 2]
    figures = stats.by_client()
    assert figures["train/other_clients/num_episodes"] == 2
    assert sum(value for key, value in figures.items() if key.endswith("/num_episodes")) == stats.lifetime.count == 10
    stats.record_of("b", episodes(5))  # it begins anew
    assert stats.clients["b"].lifetime == Moments(1, 5.0, 0.0, 5.0, 5.0)
    assert stats.num_of_others == 4


def test_a_client_keeps_a_bounded_number_of_episodes_whatever_the_window_is():
    stats = ServerStats(window=100_000)
    stats.record_of("a", episodes(*range(1000)))
    assert list(stats.clients["a"].rewards) == list(range(900, 1000))


def test_the_state_goes_through_json_and_the_restored_one_goes_on_alike():
    stats, _ = recorded(np.random.default_rng(2), window=5)
    restored = ServerStats(window=5)
    restored.restore(json.loads(json.dumps(stats.state())))
    for both in (stats, restored):
        both.record_of("new", episodes(1))
        both.record_of("actor-1", episodes(2))
    assert restored.state() == stats.state()
    assert restored.by_client() == stats.by_client()


def test_the_state_of_a_tracker_without_clients_is_restored_as_episodes_of_others():
    tracker, stats = StatsTracker(), ServerStats()
    tracker.record(episodes(1, 2, 3))
    stats.restore(tracker.state())
    assert stats.by_client() == {"train/other_clients/num_episodes": 3}


@pytest.mark.parametrize(
    "change",
    [
        {"name": "b"},
        {"slot": 1},
        {"slot": server_stats.MAX_CLIENTS},
        {"slot": -1},
        {"rewards": [1.0]},
        {"rewards": [float("nan"), 1.0]},
        {"rewards": "x"},
        {"last": 1},
        {"lifetime": {"count": 9, "mean": 1.0, "m2": 0.0, "minimum": 1.0, "maximum": 1.0}, "last": 9},
        {"lifetime": {"count": 0}},
    ],
)
def test_a_state_that_contradicts_itself_is_refused_and_changes_nothing(change):
    stats, other = ServerStats(), ServerStats()
    for name in "ab":
        stats.record_of(name, episodes(1, 2))
    state = json.loads(json.dumps(stats.state()))
    state["clients"][0] |= change
    before = other.state()
    with pytest.raises(InvalidInput):
        other.restore(state)
    assert other.state() == before


# ---- with processes ----------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_an_actor_that_is_killed_and_one_that_takes_its_name_lose_no_acknowledged_episode_and_count_none_twice(
    tmp_path, serve, connect, children, pipe, receive, eventually
):
    table = rb.ReplayTable(NUMBERED_SPEC, capacity=1 << 17, headroom=64)  # every row is an episode
    server = serve(table, address=f"ipc://{tmp_path}/server", directory=tmp_path / "tables", stats_window=50)
    acknowledged = {}

    def start(name, number):
        here, there = pipe()
        pid = children.start(f"{name}-{number}", child.write_through_kills, server.address, there, number * 10**6, name)
        acknowledged[name, number] = 0
        return here, pid

    def wait_for(name, number, here, count):
        while acknowledged[name, number] < count:
            acknowledged[name, number] = receive(here, children)

    ends = {}
    for number in range(4):  # two actors, each killed once and started again under its name
        name = f"actor-{number % 2}"
        here, pid = start(name, number)
        wait_for(name, number, here, 100)
        if number < 2:
            os.kill(pid, signal.SIGKILL)
            while here.poll():
                acknowledged[name, number] = here.recv()
            eventually(lambda pid=pid: [ended for ended in children.reap() if ended])
        else:
            ends[name, number] = here
    client = connect(server)
    os.kill(server.pid, signal.SIGKILL)  # and the server too
    os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
    server.start()
    for (name, number), here in ends.items():
        while here.poll():
            acknowledged[name, number] = here.recv()
        here.send("stop")
        while not isinstance(message := receive(here, children), tuple):
            pass
        acknowledged[name, number] = message[1]
    client.reconnect()
    stats = client.stats(per_client=True)
    written = committed_leaves(client, "replay")["actions"] // 7
    assert len(written) == len(np.unique(written)) == client.info()["tables"]["replay"]["inserts"]
    for name in ("actor-0", "actor-1"):
        own = np.array([int(number) for number in written if f"actor-{number // 10**6 % 2}" == name])
        assert stats[f"train/clients/{name}/num_episodes"] == len(own)
        assert stats[f"train/clients/{name}/lifetime_rewards_mean"] == pytest.approx((own % 1000).mean())
        for (other, number), count in acknowledged.items():
            if other == name:
                assert set(own) >= set(range(number * 10**6, number * 10**6 + count))
    assert sum(value for key, value in stats.items() if "/clients/" in key and key.endswith("num_episodes")) == len(
        written
    )
    assert stats["train/num_episodes"] == len(written)
    flat = client.stats()
    assert flat == {key: stats[key] for key in flat}
    assert not any("client" in key for key in flat)
