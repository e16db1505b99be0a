"""The rollout actor's loop in a process of its own, against every way in which environments reset."""

import numpy as np
import pytest
from episode_envs import EpisodeEnvs

import rl_buffer as rb
from actors.rollout import Choice, run_rollout_actor

pytestmark = pytest.mark.timeout(60)

T, E, GAMMA, GAE_LAMBDA = 6, 3, 0.9, 0.7
NUM_FRAGMENTS = 12
SPEC = rb.TransitionSpec(obs=rb.Field((3,)), action=rb.Field((), "int64"))
MODES = ("next_step", "same_step", "disabled")


def value_of(obs):
    return (np.asarray(obs) @ np.array([5.0, 0.25, 0.125])).astype(np.float32)


class Policy:
    """Values that tell the observation, log-probs that tell the action, actions of its own generator."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def load(self, state_dict):
        assert state_dict["weights"].shape == (2,)

    def choose(self, observations):
        actions = self.rng.integers(1000, size=len(observations))
        return Choice(actions, (-actions / 8).astype(np.float32), value_of(observations))

    def values(self, observations):
        return value_of(observations)


@pytest.fixture(scope="module")
def server():
    table = rb.RolloutTable(SPEC, T, E, num_fragments=4, gamma=GAMMA, gae_lambda=GAE_LAMBDA)
    with rb.BufferServer(dict.fromkeys(MODES, table)) as server:
        yield server


def what_happened(mode, num_steps):
    """The same environments and actions once more, here: (env, episode) -> its steps; one's own definition of truth."""
    envs, policy = EpisodeEnvs(E, mode, seed=3), Policy(seed=4)
    observations, _ = envs.reset()
    for _ in range(num_steps):
        choice = policy.choose(observations)
        observations, _, terminated, truncated, _ = envs.step(choice.actions)
        if mode == "disabled" and (terminated | truncated).any():
            observations, _ = envs.reset(options={"reset_mask": terminated | truncated})
    return envs


def expected_advantage(steps, env, episode, first, stop):
    """Sum of (gamma lambda)^k delta_{first + k} up to the step before `stop` or the episode's end."""
    advantage = 0.0
    for k, (_, reward, terminated, _) in enumerate(steps[first:stop]):
        here, later = (value_of((env, episode, first + k + i)) for i in (0, 1))
        delta = reward + GAMMA * later * (not terminated) - here
        advantage += (GAMMA * GAE_LAMBDA) ** k * delta
    return advantage


@pytest.mark.parametrize("mode", MODES)
def test_every_step_is_stored_once_and_bootstraps_from_what_really_came_next(server, client, children, mode):
    address = server.address
    client.publish_parameters({"weights": np.zeros(2)})
    children.start(
        "actor",
        lambda: run_rollout_actor(
            address,
            lambda: EpisodeEnvs(E, mode, seed=3),
            lambda envs: Policy(seed=4),
            name="actor",
            number=0,
            table=mode,
        ),
    )
    truth = what_happened(mode, NUM_FRAGMENTS * T)
    seen = set()
    with client.rollouts(mode) as reader:
        for _ in range(NUM_FRAGMENTS):
            with reader.take(1, timeout_s=30.0) as rollouts:
                batch = next(rollouts.get(shuffle=False))
            rows = [tuple(map(int, obs)) for obs in batch.observations.tolist()]
            ends = {}  # (env, episode) -> behind its last step in this fragment
            for env, episode, step in rows:
                ends[env, episode] = step + 1
            assert len(rows) == len(set(rows))
            assert not seen & set(rows)
            seen |= set(rows)
            for i, (env, episode, step) in enumerate(rows):
                steps = truth.steps[env, episode]
                assert batch.actions[i] == steps[step][0]
                assert batch.log_probs[i] == -steps[step][0] / 8
                expected = expected_advantage(steps, env, episode, step, ends[env, episode])
                assert batch.advantages[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-4)
    happened = {(env, episode, step) for (env, episode), steps in truth.steps.items() for step in range(len(steps))}
    assert seen == happened
    stats = client.stats()
    assert stats["train/num_episodes"] >= len(truth.finished)
