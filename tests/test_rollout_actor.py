"""The rollout actor's loop in processes of its own, against every way in which environments reset."""

import numpy as np
import pytest
import torch
from episode_envs import KINDS, SPEC, EpisodeEnvs, make_envs, numbers_of, play, totals

import rl_buffer as rb
from actors.rollout import Choice, run_rollout_actor

pytestmark = pytest.mark.timeout(120)
torch.set_num_threads(1)

NUM_ACTORS, T, E, GAMMA, GAE_LAMBDA = 2, 6, 3, 0.9, 0.7
NUM_FRAGMENTS = 16  # of each actor
OBSERVATIONS = dict.fromkeys(KINDS, SPEC.obs) | {
    "dictionaries": {"place": rb.Field((2,)), "time": {"step": rb.Field(())}}
}


@pytest.fixture(scope="module")
def server():
    tables = {
        kind: rb.RolloutTable(
            rb.TransitionSpec(obs=observations, action=SPEC.action),
            num_steps=T,
            num_envs=1 if kind == "plain" else E,
            num_fragments=4,
            gamma=GAMMA,
            gae_lambda=GAE_LAMBDA,
        )
        for kind, observations in OBSERVATIONS.items()
    }
    with rb.BufferServer(tables, stats_window=100_000) as server:
        yield server


def value_of(observations):
    return (numbers_of(observations) @ np.array([5.0, 0.25, 0.125])).astype(np.float32)


class Policy:
    """Values that tell the observation, log-probs that tell the action, actions of its own generator."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)

    def load(self, state_dict):
        assert state_dict["weights"].shape == (2,)

    def choose(self, observations):
        values = value_of(observations)
        actions = self.rng.integers(1000, size=len(values))
        return Choice(actions, (-actions / 8).astype(np.float32), values)

    def values(self, observations):
        return value_of(observations)


class MortalPolicy(Policy):
    """Ends its actor after NUM_FRAGMENTS."""

    steps_left = NUM_FRAGMENTS * T

    def choose(self, observations):
        if not self.steps_left:
            raise TimeoutError("all steps are played")
        self.steps_left -= 1
        return super().choose(observations)


def what_happened(kind, actor):
    """The same environments and actions once more, here: one's own definition of truth."""
    policy = Policy(actor)
    played = play(kind, E, actor, actor * E, lambda observations: policy.choose(observations).actions)
    return next(envs for envs in played if envs.num_steps == NUM_FRAGMENTS * T)


def expected_advantage(steps, env, episode, first, stop):
    """Sum of (gamma lambda)^k delta_{first + k} up to the step before `stop` or the episode's end."""
    advantage = 0.0
    for k, (_, reward, terminated, _) in enumerate(steps[first:stop]):
        here, later = (value_of([(env, episode, first + k + i)])[0] for i in (0, 1))
        delta = reward + GAMMA * later * (not terminated) - here
        advantage += (GAMMA * GAE_LAMBDA) ** k * delta
    return advantage


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_stored_once_and_bootstraps_from_what_really_came_next(
    server, client, children, eventually, kind
):
    address = server.address
    before = totals(client.stats())
    client.publish_parameters({"weights": np.zeros(2)})
    for actor in range(NUM_ACTORS):
        children.start(
            f"actor-{actor}",
            lambda actor=actor: run_rollout_actor(
                address,
                lambda: make_envs(kind, E, actor, actor * E),
                lambda envs: MortalPolicy(actor),
                name=f"actor-{actor}",
                number=actor,
                table=kind,
                autoreset="next_step" if kind == "envpool" else None,
            ),
        )
    truths = [what_happened(kind, actor) for actor in range(NUM_ACTORS)]
    happened = {key: steps for truth in truths for key, steps in truth.steps.items()}
    seen = set()
    with client.rollouts(kind) as reader:
        for _ in range(NUM_ACTORS * NUM_FRAGMENTS):
            with reader.take(1, timeout_s=30.0) as rollouts:
                batch = next(rollouts.get(shuffle=False))
            rows = [tuple(map(int, row)) for row in numbers_of(batch.observations).tolist()]
            ends = {}  # (env, episode) -> behind its last step in this fragment
            for env, episode, step in rows:
                ends[env, episode] = step + 1
            assert len(rows) == len(set(rows))
            assert not seen & set(rows)
            seen |= set(rows)
            for i, (env, episode, step) in enumerate(rows):
                steps = happened[env, episode]
                assert batch.actions[i] == steps[step][0]
                assert batch.log_probs[i] == -steps[step][0] / 8
                expected = expected_advantage(steps, env, episode, step, ends[env, episode])
                assert batch.advantages[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert seen == {(*key, step) for key, steps in happened.items() for step in range(len(steps))}
    while children.pids:
        for ended in eventually(children.reap):
            assert ended.traceback.endswith("TimeoutError: all steps are played\n")
    finished = [episode for truth in truths for episode in truth.finished]
    assert totals(client.stats()) - before == pytest.approx([len(finished), *np.sum(finished, axis=0)])
    # Both kinds of ends came exactly at num_steps, too.
    last_of_fragment = {tuple(flags) for truth in truths for step, *flags in truth.ends if step % T == T - 1}
    assert last_of_fragment >= {(True, False), (False, True)}


class ClippingPolicy(Policy):
    """Means what it draws, gives the environments at most 500."""

    def choose(self, observations):
        choice = super().choose(observations)
        return Choice(choice.actions, choice.log_probs, choice.values, env_actions=choice.actions.clip(max=500))


class PickyEnvs(EpisodeEnvs):
    """Fail where an action is above 500."""

    def step(self, actions):
        assert actions.max() <= 500
        return super().step(actions)


def test_the_chosen_actions_are_stored_where_the_environments_are_given_others(server, client, children):
    address = server.address
    client.publish_parameters({"weights": np.zeros(2)})
    children.start(
        "actor",
        lambda: run_rollout_actor(
            address,
            lambda: PickyEnvs(E, "same_step"),
            lambda envs: ClippingPolicy(0),
            name="actor",
            number=0,
            table="same_step",
        ),
    )
    with client.rollouts("same_step") as reader, reader.take(1, timeout_s=30.0) as rollouts:
        batch = next(rollouts.get(shuffle=False))
    assert batch.actions.max() > 500
    assert torch.equal(batch.log_probs, -batch.actions / 8)
