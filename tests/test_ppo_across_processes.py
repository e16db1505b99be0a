"""PPO in step with actors in processes of their own learns exactly what one process alone would."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import rl_buffer as rb
from actors.crew import CrewOptions
from actors.environments import transition_spec
from actors.rollout import run_rollout_actor
from learner.actor_critic import SamplingPolicy
from learner.normalization import DiscountedReturns
from learner.ppo import PPO, LearnerOptions, TableOptions, ppo_table

pytestmark = pytest.mark.timeout(120)
torch.set_num_threads(1)

NUM_ACTORS, T, E, NUM_UPDATES, SEED = 2, 24, 3, 5, 7
ENV_IDS = ("CartPole-v1", "Pendulum-v1")
FIELDS = ("observations", "actions", "values", "log_probs", "advantages", "returns", "mask")


def make_envs(env_id, mode):
    # Episodes of at most 20 steps: several end in every rollout, terminated or truncated.
    make = lambda: gym.make(env_id, max_episode_steps=20)  # noqa: E731
    return SyncVectorEnv([make] * E, autoreset_mode=AutoresetMode[mode.upper()])


def new_agent(env_id):
    normalize = {"normalize_observations": True, "normalize_rewards": True} if env_id == "Pendulum-v1" else {}
    return PPO(LearnerOptions(num_epochs=3, minibatch_size=32, **normalize), env_id, SEED)


def one_process(env_id, mode, buffer, gamma):
    """The same training without a server: yields each rollout as it is learned from, and the parameters after it."""
    agent = new_agent(env_id)
    all_envs = [make_envs(env_id, mode) for _ in range(NUM_ACTORS)]
    policies = [SamplingPolicy(seed) for seed in range(NUM_ACTORS)]
    observations = [envs.reset(seed=100 + actor)[0] for actor, envs in enumerate(all_envs)]
    discounted = DiscountedReturns(gamma)
    was_ended = np.zeros(NUM_ACTORS * E, bool)
    for _ in range(NUM_UPDATES):
        steps = {"rewards": [], "ended": [], "mask": []}
        for policy in policies:
            policy.load({key: value.clone() for key, value in agent.policy.state_dict().items()})
        while not buffer.is_full:
            columns = []
            for actor, (envs, policy) in enumerate(zip(all_envs, policies, strict=True)):
                obs = observations[actor]
                choice = policy.choose(obs)
                actions = choice.actions if choice.env_actions is None else choice.env_actions
                next_obs, rewards, terminated, truncated, infos = envs.step(actions)
                finals = np.full(E, np.nan, np.float32)
                if mode == "same_step" and truncated.any():
                    true_obs = next_obs.copy()
                    true_obs[truncated] = np.stack(infos["final_obs"][truncated])
                    finals = np.where(truncated, policy.values(true_obs), np.nan)
                ended = terminated | truncated
                columns.append(
                    (
                        obs,
                        choice.actions,
                        rewards,
                        ended,
                        choice.values,
                        choice.log_probs,
                        truncated,
                        terminated,
                        finals,
                    )
                )
                observations[actor] = next_obs
            step = [np.concatenate(column) for column in zip(*columns, strict=True)]
            buffer.add(*step)
            mask = ~was_ended if mode == "next_step" else np.ones(NUM_ACTORS * E, bool)
            for name, value in (("rewards", step[2].astype(np.float32)), ("ended", step[3]), ("mask", mask)):
                steps[name].append(value)
            was_ended = step[3]
        buffer.compute_returns_and_advantages(
            np.concatenate([policy.values(obs) for policy, obs in zip(policies, observations, strict=True)])
        )
        together = SimpleNamespace(writers=np.zeros(1, int), **{name: np.array(rows) for name, rows in steps.items()})
        rollout = next(buffer.get(shuffle=False))
        agent.update(buffer, discounted.of(together), env_steps=0)
        yield rollout, agent.policy.state_dict()
        buffer.reset()


@pytest.mark.parametrize("mode", ["next_step", "same_step"])
@pytest.mark.parametrize("env_id", ENV_IDS)
def test_rollouts_and_networks_are_bit_for_bit_those_of_one_process(children, eventually, env_id, mode):
    spec = transition_spec(env_id)
    crew = CrewOptions(num_actors=NUM_ACTORS, envs_per_actor=E)
    table = ppo_table(TableOptions(num_steps=T), crew, spec)
    buffer = rb.RolloutBuffer(
        T,
        NUM_ACTORS * E,
        spec.obs.shape,
        spec.action.shape,
        action_dtype=spec.action.dtype,
        gamma=table.gamma,
        gae_lambda=table.gae_lambda,
        autoreset=mode,
        seed=SEED,
    )
    with rb.BufferServer({"rollout": table}) as server, rb.connect(server.address) as client:
        address = server.address
        agent = new_agent(env_id)
        for number in reversed(range(NUM_ACTORS)):
            children.start(
                f"actor-{number}",
                lambda number=number: run_rollout_actor(
                    address,
                    lambda: make_envs(env_id, mode),
                    lambda envs: SamplingPolicy(number),
                    name=f"actor-{number}",
                    number=number,
                    seed=100 + number,
                ),
            )
        # As `train` does: each has a fragment before anybody can act.
        eventually(lambda: client.info()["tables"]["rollout"]["reserved_rows"] == NUM_ACTORS)
        client.publish_parameters(agent.policy.state_dict())
        discounted = DiscountedReturns(table.gamma)
        num_ends = 0
        with client.rollouts("rollout", seed=SEED) as reader:
            for expected, parameters in one_process(env_id, mode, buffer, table.gamma):
                rollouts = reader.take(timeout_s=60.0)
                batch = next(rollouts.get(shuffle=False))
                for name in FIELDS:
                    assert torch.equal(getattr(batch, name), getattr(expected, name)), name
                agent.update(rollouts, discounted.of(rollouts), env_steps=0)
                for name, value in agent.policy.state_dict().items():
                    assert torch.equal(value, parameters[name]), name
                num_ends += np.count_nonzero(rollouts.ended & rollouts.mask)
                client.publish_parameters(agent.policy.state_dict())
                rollouts.release()
                assert rollouts.version_lag.max() == 0
        assert num_ends > NUM_UPDATES
