"""Tables as many processes see them at once: the replay_buffer face, limiters, clear, statistics, seeds."""

import os
import threading
from collections import deque

import child_processes as child
import numpy as np
import pytest
import torch
from episode_envs import GAMMA, SPEC, EpisodeEnvs, expected_rows, stored_rows

import rl_buffer as rb

pytestmark = pytest.mark.timeout(60)
torch.set_num_threads(1)  # the other processes need the cores

MODES = ("next_step", "same_step", "next_step")


def table(**options):
    return rb.ReplayTable(SPEC, **{"capacity": 4096, "gamma": GAMMA, "seed": 0} | options)


def info(client, name="replay"):
    return client.info()["tables"][name]


def add(buffer, numbers):
    for number in numbers:
        obs = np.array([0, 0, number], np.float32)
        buffer.add(obs, number, 1.0, False, obs + 1)


@pytest.fixture(scope="module")
def server():
    ratio = rb.SampleToInsertRatio(2.0, min_size_to_sample=20, error_buffer=20.0)
    tables = {
        "replay": table(n_step=3, sampler=rb.Prioritized()),
        "other": table(capacity=1000),
        "seeded": table(sampler=rb.Prioritized(), seed=7),
        "also seeded": table(sampler=rb.Prioritized(), seed=7),
        "ratio": table(rate_limiter=ratio),
    }
    with rb.BufferServer(tables, stats_window=1000) as server:
        yield server


def test_several_writer_processes_and_two_samplers_share_two_tables(server, client, children, pipe, receive):
    episodes_before = client.stats().get("train/num_episodes", 0)
    ends = []
    for seed, mode in enumerate(MODES):
        here, there = pipe()
        name = "other" if seed == 2 else "replay"
        children.start(f"writer-{seed}", child.write_episodes, server.address, there, name, seed, 300, mode)
        ends.append(here)
    true_rows = set()

    def learn(learner, batches):
        with learner.sampler("replay", batch_size=64, timeout_s=30.0) as sampler:
            for _ in range(100):
                batch = sampler.sample()
                batches.append((batch.observations.clone(), batch.actions.clone(), batch.rewards.clone()))
                sampler.update_priorities(batch, torch.rand(64))

    learners = [rb.connect(server.address) for _ in range(2)]
    batches = [[], []]
    threads = [threading.Thread(target=learn, args=pair) for pair in zip(learners, batches, strict=True)]
    for thread in threads:
        thread.start()
    results = [receive(end, children) for end in ends]
    for thread in threads:
        thread.join(30.0)
        assert not thread.is_alive()
    for learner in learners:
        learner.close()

    assert stored_rows(client, "replay") == sorted(results[0][0] + results[1][0])
    assert stored_rows(client, "other") == results[2][0]
    true_rows = {(*row[0], row[1], row[2]) for row in results[0][0] + results[1][0]}
    for batch in [*batches[0], *batches[1]]:
        columns = torch.cat((batch[0], batch[1][:, None], batch[2][:, None]), dim=1)
        assert {tuple(row) for row in columns.tolist()} <= true_rows
    assert len(batches[0]) == len(batches[1]) == 100
    finished = [episode for _, episodes in results for episode in episodes]
    assert client.stats()["train/num_episodes"] == episodes_before + len(finished)
    assert info(client)["inserts"] >= len(results[0][0]) + len(results[1][0])


def test_statistics_are_merged_over_all_writers(serve, connect, children, pipe, receive):
    server = serve(table(), stats_window=10_000)
    client = connect(server)
    assert client.stats() == {}
    ends = []
    for seed in range(2):
        here, there = pipe()
        children.start(f"writer-{seed}", child.write_episodes, server.address, there, "replay", seed, 100, "same_step")
        ends.append(here)
    finished = [episode for end in ends for episode in receive(end, children)[1]]
    returns, lengths = np.array(finished).T
    stats = client.stats()
    assert stats["train/num_episodes"] == len(finished) > 50
    expected = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max}
    for name, function in expected.items():
        assert stats[f"train/rewards_{name}"] == pytest.approx(function(returns))
        assert stats[f"train/lifetime_rewards_{name}"] == pytest.approx(function(returns))
        assert stats[f"train/lengths_{name}"] == pytest.approx(function(lengths))
    assert stats["train/reward_per_step"] == pytest.approx(returns.sum() / lengths.sum())


def test_the_replay_buffer_face_adds_gets_updates_and_counts(client):
    envs = EpisodeEnvs(2, "next_step", seed=1)
    buffer = client.replay_buffer("replay", num_envs=2, autoreset="next_step", beta=1.0)
    assert len(buffer) == 0
    obs, _ = envs.reset()
    for step in range(50):
        actions = np.array([step, step + 1])
        next_obs, rewards, terminated, truncated, infos = envs.step(actions)
        buffer.add(obs, actions, rewards, terminated | truncated, next_obs, truncated, terminated, infos=infos)
        obs = next_obs
    complete = [row for row in expected_rows(envs.steps, 3) if row[4] == 3 or row[6] or row[7]]
    assert len(buffer) == len(complete), "one's own complete steps are counted"
    first = buffer.get(32)
    assert first.observations.shape == (32, 3)
    buffer.update_priorities(first, torch.ones(32))
    second = buffer.sample(16, beta=0.0)
    assert second.weights.tolist() == [1.0] * 16
    buffer.update_priorities(second, np.ones((16, 1)))
    buffer.close()
    assert client.size("replay") == len(expected_rows(envs.steps, 3))


def test_get_sees_what_was_just_added(client):
    buffer = client.replay_buffer("other")
    for number in range(5):
        add(buffer, [number])
        assert set(buffer.get(200).actions.tolist()) == set(range(number + 1))
    buffer.close()


def test_a_full_table_holds_exactly_its_capacity_and_the_newest(client):
    with client.writer("other", num_envs=1, chunk_size=37) as writer:
        add(writer, range(2500))
    assert client.size("other") == 1000
    assert sorted(row[1] for row in stored_rows(client, "other")) == list(range(1500, 2500))


def test_clear_forgets_what_was_committed_and_nothing_else(client):
    with (
        client.writer("other", num_envs=1, chunk_size=10) as writer,
        client.sampler("other", 200, prefetch=0) as sampler,
    ):
        add(writer, range(25))
        writer.flush()
        inserts = info(client, "other")["inserts"]
        client.clear("other")
        assert client.size("other") == 0
        assert info(client, "other")["inserts"] == inserts
        with pytest.raises(rb.DeadlineExceeded, match="0 of 1 items"):
            sampler.sample(timeout_s=0.1)
        add(writer, range(100, 105))
        writer.flush()
        assert set(sampler.sample(timeout_s=30.0).actions.tolist()) == set(range(100, 105))
    with pytest.raises(rb.RequestRefused, match="no table is called 'nothing'"):
        client.clear("nothing")


def test_equal_seeds_draw_the_same_rows(client):
    draws = []
    for name in ("seeded", "also seeded"):
        with client.writer(name, num_envs=1) as writer:
            for number in range(20):
                obs = np.array([0, 0, number], np.float32)
                writer.add(obs, number, 1.0, False, obs, priority=number + 1.0)
        with client.sampler(name, batch_size=16, prefetch=0) as sampler:
            draws.append([sampler.sample().actions.tolist() for _ in range(5)])
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws[0]}) > 1


def test_the_ratio_limiter_holds_samplers_and_writers(client):
    writer = client.writer("ratio", num_envs=1, chunk_size=1, timeout_s=0.1)
    sampler = client.sampler("ratio", batch_size=10, prefetch=0, timeout_s=0.1)

    def state():
        table = info(client, "ratio")
        return table["inserts"] * 2.0 - table["samples"]  # the cursor, held in [20, 60]

    start = state()
    assert start == 0.0
    before = info(client, "ratio")["inserts"]
    for _ in range(3):
        with pytest.raises(rb.DeadlineExceeded, match=r"inserting waits: cursor .* max_diff"):
            add(writer, range(1000))
        assert 58.0 <= state() <= 60.0
        with pytest.raises(rb.DeadlineExceeded, match=r"sampling waits: cursor .* min_diff|nobody waits"):
            deque(sampler, maxlen=0)  # all that there are
        assert 20.0 <= state() <= 30.0
    assert info(client, "ratio")["inserts"] - before < 200
    sampler.close()
    writer.close(timeout_s=30.0)


def test_info_says_who_is_there_and_who_waits_for_what(server, client, connect):
    actor = connect(server, name="actor-7")
    actor.publish_parameters({"w": np.zeros(2)})
    actor.publish_parameters({"w": np.zeros(2)}, "another")
    actor.parameters("policy")
    actor.parameters("another")
    with (
        actor.writer("other", num_envs=1, chunk_size=4) as writer,
        client.sampler("replay", batch_size=8, prefetch=1),
    ):
        add(writer, range(4))
        writer.flush()
        answer = client.info()
    (session,) = (session for session in answer["clients"] if session["name"] == "actor-7")
    assert session["connected"] is True
    assert session["inserts"] == 4
    assert session["parameter_version"] == 1
    assert session["reserved_rows"] == 10
    assert session["attached_s"] >= 0
    assert answer["tables"]["other"]["size"] == 4
    assert answer["tables"]["other"]["capacity"] == 1000
    assert answer["tables"]["other"]["reserved_rows"] == 10
    (waits,) = answer["tables"]["replay"]["waits"]
    assert waits.startswith(f"pid {os.getpid()}: sampling waits: 0 of 1 items, ")
    assert answer["parameters"]["another"] == 1


def test_any_thread_may_ask(client):
    answers = []

    def ask():
        for _ in range(50):
            answers.append(client.size("replay"))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert answers == [0] * 200


def test_servers_without_tables_or_before_their_start_say_so():
    with pytest.raises(rb.InvalidInput, match="takes a mapping such as"):
        rb.BufferServer({})
    with pytest.raises(rb.InvalidInput, match=r"no address before start\(\)"):
        _ = rb.BufferServer({"replay": table()}).address
