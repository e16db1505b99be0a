"""Rollouts between processes: the learner gets what a single process would have made, once, whoever dies."""

import os
import signal

import child_processes as child
import numpy as np
import pytest
import torch
from episode_envs import EpisodeEnvs

import rl_buffer as rb

pytestmark = pytest.mark.timeout(60)
torch.set_num_threads(1)

T, E, GAMMA, GAE_LAMBDA = 5, 2, 0.9, 0.8
SPEC = rb.TransitionSpec(obs=rb.Field((3,)), action=rb.Field((), "int64"))
TABLES = {
    "rollout": rb.RolloutTable(SPEC, T, E, num_fragments=6, gamma=GAMMA, gae_lambda=GAE_LAMBDA),
    "one": rb.RolloutTable(SPEC, T, E, num_fragments=1),
    "drop": rb.RolloutTable(SPEC, T, E, num_fragments=4, max_version_lag=1),
    "wait": rb.RolloutTable(SPEC, T, E, num_fragments=8, max_version_lag=0, when_late="wait", fragments_per_update=2),
    "replay": rb.ReplayTable(SPEC, capacity=10),
}


@pytest.fixture(scope="module")
def server():
    with rb.BufferServer(TABLES) as server:
        yield server


def steps_of(envs, num_steps, obs):
    """Arguments of `add` for so many steps, and the observations after them; values and log-probs follow from obs."""
    steps = []
    for _ in range(num_steps):
        actions = envs.rng.integers(1000, size=envs.num_envs)
        next_obs, rewards, terminated, truncated, _ = envs.step(actions)
        step = (obs, actions, rewards, terminated | truncated, value_of(obs), -value_of(obs), truncated, terminated)
        steps.append(step)
        obs = next_obs
    return steps, obs


def value_of(obs):
    return obs @ np.array([0.5, 0.25, 0.125])


def write(writer, number=0.0):
    """One fragment of equal steps."""
    obs = np.full((E, 3), number)
    for _ in range(T):
        writer.add(obs, [0] * E, [number] * E, [False] * E, [0.0] * E, [0.0] * E)
    writer.commit([0.0] * E)


def numbers(rollouts):
    """What `write` was given, of each fragment, in order."""
    batch = next(rollouts.get(shuffle=False))
    return batch.observations[: rollouts.num_envs : E, 0].tolist()


def test_two_writers_give_bit_for_bit_the_rollout_of_one_process(client):
    all_envs = [EpisodeEnvs(E, "next_step", seed=seed) for seed in range(2)]
    writers = [client.rollout_writer("rollout", envs=envs, number=i) for i, envs in enumerate(all_envs)]
    reader = client.rollouts("rollout", seed=7)
    buffer = rb.RolloutBuffer(
        T, 2 * E, 3, (), action_dtype="int64", gamma=GAMMA, gae_lambda=GAE_LAMBDA, autoreset="next_step", seed=7
    )
    last = [envs.reset()[0] for envs in all_envs]
    for _ in range(4):
        played = []
        for i in (1, 0):  # finished in the other order
            steps, last[i] = steps_of(all_envs[i], T, last[i])
            for step in steps:
                writers[i].add(*step)
            writers[i].commit(value_of(last[i]))
            played.insert(0, steps)
        for one, other in zip(*played, strict=True):
            buffer.add(*(np.concatenate(pair) for pair in zip(one, other, strict=True)))
        buffer.compute_returns_and_advantages(np.concatenate([value_of(obs) for obs in last]))
        rollouts = reader.take(2)
        assert rollouts.writers.tolist() == [0, 1]
        assert rollouts.explained_variance == buffer.explained_variance
        assert rollouts.num_transitions == buffer.num_transitions
        for _ in range(2):
            for mine, theirs in zip(
                rollouts.get(4, normalize_advantages=True), buffer.get(4, normalize_advantages=True), strict=True
            ):
                for name in ("observations", "actions", "values", "log_probs", "advantages", "returns", "mask"):
                    assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        rollouts.release()
        buffer.reset()
    for user in (*writers, reader):
        user.close()
    finished = [episode for envs in all_envs for episode in envs.finished]
    assert client.stats()["train/num_episodes"] == len(finished)
    assert client.stats()["train/rewards_mean"] == pytest.approx(np.mean([reward for reward, _ in finished]))


def test_each_fragment_is_handed_out_once_and_the_parameter_versions_come_with_it(client):
    version = client.publish_parameters({"w": np.zeros(1)})
    with client.rollout_writer("rollout", autoreset=None) as writer, client.rollouts("rollout") as reader:
        for number in range(3):
            write(writer, number)
        client.publish_parameters({"w": np.ones(1)})
        first, second = reader.take(2, timeout_s=10.0), reader.take_all(within_s=0.2)
        assert numbers(first) + numbers(second) == [0.0, 1.0, 2.0]
        assert first.versions.tolist() == [[version] * 2] * T
        assert first.version_lag.tolist() == [[1] * 2] * T
        with pytest.raises(rb.DeadlineExceeded, match=r"no fragment of table 'rollout' was finished in 0\.1 s"):
            reader.take_all(within_s=0.1)
        first.release()
        first.release()
        second.release()
        assert numbers(first) == [0.0, 1.0], "what was taken is a copy"
    assert client.info()["tables"]["rollout"]["reading"] == 0


def test_a_writer_without_a_free_fragment_waits_with_a_deadline_that_says_who_has_it(client):
    with client.rollout_writer("one", autoreset=None) as writer, client.rollouts("one") as reader:
        write(writer)
        with pytest.raises(
            rb.DeadlineExceeded, match=r"waits for a fragment, 0 are being written, 1 are finished and 0"
        ):
            writer.begin(timeout_s=0.1)
        held = "0 are finished and 1 are being read, of 1"
        with reader.take(1), pytest.raises(rb.DeadlineExceeded, match=held):
            writer.begin(timeout_s=0.1)
        writer.begin(timeout_s=10.0)


def test_fragments_made_with_old_parameters_are_dropped_and_counted(client):
    before = client.info()["tables"]["drop"]["deletes"]
    with client.rollout_writer("drop", autoreset=None) as writer, client.rollouts("drop") as reader:
        client.publish_parameters({"w": np.zeros(1)})
        write(writer, 1.0)
        client.publish_parameters({"w": np.zeros(1)})
        client.publish_parameters({"w": np.zeros(1)})
        write(writer, 2.0)
        assert numbers(reader.take(1, timeout_s=10.0)) == [2.0]
    assert client.info()["tables"]["drop"]["deletes"] == before + 1


def test_synchronous_writers_begin_only_after_the_release(client):
    client.parameters()  # without the newest, whatever they write would be too late
    with (
        client.rollout_writer("wait", autoreset=None) as one,
        client.rollout_writer("wait", autoreset=None, number=1) as other,
        client.rollouts("wait") as reader,
    ):
        write(one, 1.0)
        with pytest.raises(rb.DeadlineExceeded):
            one.begin(timeout_s=0.1)
        write(other, 2.0)
        rollouts = reader.take(timeout_s=10.0)
        assert numbers(rollouts) == [1.0, 2.0]
        for writer in (one, other):
            with pytest.raises(rb.DeadlineExceeded):
                writer.begin(timeout_s=0.1)
        rollouts.release()
        for writer in (one, other):
            writer.begin(timeout_s=10.0)


def test_a_killed_learner_gives_its_fragments_back_in_order(server, client, children, pipe, receive, eventually):
    with client.rollout_writer("rollout", autoreset=None) as writer:
        for number in range(3):
            write(writer, number)
        here, there = pipe()
        children.start("learner", child.hold_rollouts, server.address, there, "rollout", 2)
        assert receive(here, children) == 2
        write(writer, 3.0)
        os.kill(children.pids["learner"], signal.SIGKILL)
        eventually(lambda: client.info()["tables"]["rollout"]["reading"] == 0)
    with client.rollouts("rollout") as reader:
        assert numbers(reader.take_all(within_s=0.5)) == [0.0, 1.0, 2.0, 3.0]


def test_a_killed_actor_gives_its_fragment_back(server, client, children, pipe, receive, eventually):
    here, there = pipe()
    children.start("actor", child.hold_fragment, server.address, there, "one", E)
    receive(here, children)
    assert client.info()["tables"]["one"]["reserved_rows"] == 1
    os.kill(children.pids["actor"], signal.SIGKILL)
    with client.rollout_writer("one", autoreset=None) as writer:
        writer.begin(timeout_s=30.0)


def test_refused_steps_and_commits_change_nothing(client):
    with client.rollout_writer("rollout", autoreset=None) as writer, client.rollouts("rollout") as reader:
        with pytest.raises(rb.InvalidInput, match="there is no step to commit"):
            writer.commit([0.0] * E)
        with pytest.raises(rb.InvalidInput, match="reward is nan"):
            writer.add(np.zeros((E, 3)), [0] * E, [np.nan] * E, [False] * E, [0.0] * E, [0.0] * E)
        write(writer, 5.0)
        assert numbers(reader.take(1, timeout_s=10.0)) == [5.0]
        for _ in range(T):
            writer.add(np.zeros((E, 3)), [0] * E, [0.0] * E, [False] * E, [0.0] * E, [0.0] * E)
        assert writer.is_full
        with pytest.raises(rb.InvalidInput, match=r"has all of its 5 steps: commit\(last_values\)"):
            writer.add(np.zeros((E, 3)), [0] * E, [0.0] * E, [False] * E, [0.0] * E, [0.0] * E)
        with pytest.raises(rb.InvalidInput, match=r"num_fragments is 7, but table 'rollout' has 6"):
            reader.take(7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda client: client.writer("rollout", num_envs=1), "holds rollouts; use client.rollout_writer"),
        (lambda client: client.sampler("rollout", 4), "holds rollouts; use client.rollout_writer"),
        (lambda client: client.rollout_writer("replay", autoreset=None), "holds transitions; use client.writer"),
        (lambda client: client.rollouts("replay"), "holds transitions; use client.writer"),
        (lambda client: client.rollout_writer("rollout"), "needs envs=, or autoreset="),
        (
            lambda client: client.rollout_writer("rollout", envs=EpisodeEnvs(3, "next_step")),
            "envs has 3 environments, but table 'rollout' is for 2",
        ),
    ],
)
def test_the_wrong_kind_of_table_or_environments_is_refused(client, call, message):
    with pytest.raises(rb.InvalidInput, match=message):
        call(client)
