"""Transitions and rollouts that prove themselves: everything in a row follows from who wrote it, and when.

A writer has a number that no other had before it. Its step s of environment e is the observation

    [ writer, e, s, mix(writer, e, s) + 0, mix(writer, e, s) + 1, ... ]

so a row that is made of parts of two rows, or of one that was not finished, shows itself. Transitions of one writer
have places 0, 1, 2, ... in the order of its commits: place = s * num_envs + e. No processes here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rl_buffer as rb

WIDTH = 64  # int64 numbers per observation
GAMMA = 0.5  # with whole rewards below 2^7 all sums are exact in float32
EPISODE_LENGTH = 20  # steps, of every environment
_NUMBER_WIDTH = 3
_PLAIN_LEAVES = (
    "observations",
    "next_observations",
    "actions",
    "rewards",
    "n_steps",
    "terminateds",
    "dones",
    "truncateds",
    "discounts",
)
_NO_REWARDS_BEFORE = 1  # of the step after an end: a reward of 0 there looks like a dummy step
_MULTIPLIERS = np.array((0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9), np.uint64)

SPEC = rb.TransitionSpec(
    obs=rb.Field((WIDTH,), "int64"), action=rb.Field((), "int64"), extras={"mixed": rb.Field((), "int64")}
)
ROLLOUT_SPEC = rb.TransitionSpec(obs=rb.Field((WIDTH,), "int64"), action=rb.Field((), "int64"))


def step_arguments(writer: int, num_envs: int, step: int) -> dict[str, Any]:
    """What `add` of a replay writer is given for one step of all environments."""
    obs = observations(writer, num_envs, step)
    return {
        "obs": obs,
        "action": actions_of(obs),
        "reward": np.full(num_envs, reward_of(step)),
        "done": np.full(num_envs, (step + 1) % EPISODE_LENGTH == 0),
        "next_obs": observations(writer, num_envs, step + 1),
        "extras": {"mixed": obs[:, _NUMBER_WIDTH]},
    }


def rollout_arguments(writer: int, num_envs: int, step: int) -> dict[str, Any]:
    """What `add` of a rollout writer is given; steps are counted through, over all fragments."""
    obs = observations(writer, num_envs, step)
    return {
        "obs": obs,
        "action": actions_of(obs),
        "reward": np.full(num_envs, reward_of(step)),
        "done": np.full(num_envs, (step + 1) % EPISODE_LENGTH == 0),
        "value": np.full(num_envs, reward_of(step) / 2),
        "log_prob": np.zeros(num_envs),
    }


def leaves_of(batch: rb.ReplayBatch) -> dict[str, NDArray[Any]]:
    """Path -> [B, ...] of a batch on the CPU, as a table has them."""
    return {path: getattr(batch, path).numpy() for path in _PLAIN_LEAVES} | {
        "extras/mixed": batch.extras["mixed"].numpy()
    }


def num_complete(num_steps: int, n_step: int) -> int:
    """Of the first `num_steps` steps, how many begin a transition that is complete; they are the oldest ones."""
    return max(0, num_steps - n_step + 1, num_steps // EPISODE_LENGTH * EPISODE_LENGTH)


def num_episodes(num_rows: int, num_envs: int) -> int:
    """Episodes that ended within the first `num_rows` places of a writer."""
    return num_rows // (EPISODE_LENGTH * num_envs) * num_envs


def places(leaves: Mapping[str, NDArray[Any]], num_envs: NDArray[np.int64]) -> NDArray[np.int64]:
    """[B] places of the transitions, of writers that have so many environments."""
    _, envs, steps = numbers_of(leaves["observations"])
    return steps * num_envs + envs


def observations(writer: int, num_envs: int, step: int) -> NDArray[np.int64]:
    """[E, WIDTH] int64."""
    envs = np.arange(num_envs)
    return expected_observations(np.full(num_envs, writer), envs, np.full(num_envs, step))


def expected_observations(
    writers: NDArray[np.int64], envs: NDArray[np.int64], steps: NDArray[np.int64]
) -> NDArray[np.int64]:
    """[B, WIDTH] int64 of [B] numbers each."""
    numbers = np.stack((writers, envs, steps), axis=1)
    mixed = (numbers.astype(np.uint64) + np.uint64(1)) * _MULTIPLIERS  # wraps around
    mixed ^= mixed >> np.uint64(29)
    payload = np.bitwise_xor.reduce(mixed, axis=1)[:, None] + np.arange(WIDTH - _NUMBER_WIDTH, dtype=np.uint64)
    return np.concatenate((numbers, payload.view(np.int64)), axis=1)


def numbers_of(obs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(writers, envs, steps), [B] each, as the observations say."""
    return obs[:, 0], obs[:, 1], obs[:, 2]


def intact(leaves: Mapping[str, NDArray[Any]], n_step: int) -> NDArray[np.bool_]:
    """[B] which transitions are exactly what a writer wrote, whichever it was.

    Args:
        leaves: path -> [B, ...], as a batch or a table has them.
        n_step: of the table.
    """
    obs = leaves["observations"]
    writers, envs, steps = numbers_of(obs)
    n_steps = np.minimum(n_step, EPISODE_LENGTH - steps % EPISODE_LENGTH)
    terminated = (steps + n_steps) % EPISODE_LENGTH == 0
    within = np.arange(n_step) < n_steps[:, None]
    rewards = (reward_of(steps[:, None] + np.arange(n_step)) * GAMMA ** np.arange(n_step) * within).sum(axis=1)
    expected = {
        "observations": expected_observations(writers, envs, steps),
        "next_observations": expected_observations(writers, envs, steps + n_steps),
        "actions": actions_of(obs),
        "extras/mixed": obs[:, _NUMBER_WIDTH],
        "rewards": rewards,
        "n_steps": n_steps,
        "terminateds": terminated,
        "dones": terminated,
        "truncateds": np.zeros(len(obs), np.bool_),
        "discounts": np.where(terminated, 0.0, GAMMA**n_steps),
    }
    same = [leaves[path] == value for path, value in expected.items()]
    return np.logical_and.reduce([leaf.all(axis=tuple(range(1, leaf.ndim))) for leaf in same])


def intact_fragments(
    writers: NDArray[np.int64], obs: NDArray[np.int64], actions: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """([F] which fragments are exactly what their writers wrote, [F] how many each had written before).

    Args:
        writers: [F] as the fragments say.
        obs: [T, F * E, WIDTH].
        actions: [T, F * E].
    """
    num_steps, num_columns = actions.shape
    num_envs = num_columns // len(writers)
    first = obs[0, ::num_envs, 2]
    steps = first.repeat(num_envs) + np.arange(num_steps)[:, None]
    envs = np.tile(np.arange(num_envs), len(writers))
    expected = expected_observations(
        np.tile(writers.repeat(num_envs), num_steps), np.tile(envs, num_steps), steps.ravel()
    )
    same = (obs.reshape(len(expected), -1) == expected).all(axis=1) & (actions.ravel() == actions_of(expected))
    by_fragment = same.reshape(num_steps, len(writers), num_envs).all(axis=(0, 2))
    return by_fragment & (first % num_steps == 0), first // num_steps


def actions_of(obs: NDArray[np.int64]) -> NDArray[np.int64]:
    """[B] int64 of observations [B, WIDTH]."""
    return obs[:, 2] * 7 + obs[:, 1]


def reward_of(step: Any) -> Any:
    """Of a step, or of each of an array of them; 1..8."""
    return _NO_REWARDS_BEFORE + step % 8
