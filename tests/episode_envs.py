"""Environments whose observations say where they come from, and what a table should hold of them."""

from collections import defaultdict
from collections.abc import Mapping
from typing import ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

import rl_buffer as rb
from rl_buffer.spec import unflatten

SPEC = rb.TransitionSpec(obs=rb.Field((3,), "float32"), action=rb.Field((), "int64"))
GAMMA = 0.5  # with whole rewards every sum is exact in float32
KINDS = ("next_step", "same_step", "disabled", "dictionaries", "plain", "envpool")  # of `make_envs`
_DUMMY_REWARD = 1000.0  # Gymnasium returns 0; whatever it is, it must count nowhere
_NUMBERS = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
_DICTIONARIES = gym.spaces.Dict(
    {
        "place": gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
        "time": gym.spaces.Dict({"step": gym.spaces.Box(-np.inf, np.inf, (), np.float32)}),
    }
)


class EpisodeEnvs(VectorEnv):
    """Observations (env, episode, step); episodes of 1..6 steps that end terminated, truncated or both.

    `steps` keeps what really happened: (env, episode) -> [(action, reward, terminated, truncated)].
    """

    def __init__(self, num_envs, mode, seed=0, *, first_env=0, dictionaries=False):
        self.num_envs = num_envs
        self.mode = mode
        self.first_env = first_env  # number of the first environment
        self.dictionaries = dictionaries
        self.metadata = {"autoreset_mode": AutoresetMode[mode.upper()]}
        self.single_observation_space = _DICTIONARIES if dictionaries else _NUMBERS
        self.single_action_space = gym.spaces.Discrete(1000)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.rng = np.random.default_rng(seed)
        self.steps = defaultdict(list)
        self.finished = []  # (return, length), in the order of their ends
        self.ends = []  # (calls of `step` before, terminated, truncated), likewise
        self.num_steps = 0
        self.episode = np.full(num_envs, -1)
        self.step_number = np.zeros(num_envs, int)
        self.length = np.zeros(num_envs, int)
        self.waits_for_reset = np.zeros(num_envs, bool)

    def observations(self, envs=slice(None)):
        numbers = np.stack(
            (self.first_env + np.arange(self.num_envs), self.episode, self.step_number), axis=1, dtype=np.float32
        )[envs]
        if self.dictionaries:
            return {"place": numbers[..., :2], "time": {"step": numbers[..., 2]}}
        return numbers

    def begin(self, env):
        self.episode[env] += 1
        self.step_number[env] = 0
        self.length[env] = self.rng.integers(1, 7)
        self.waits_for_reset[env] = False

    def reset(self, *, seed=None, options=None):
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        for env in np.flatnonzero(mask):
            self.begin(env)
        return self.observations(), {}

    def step(self, actions):
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros((2, self.num_envs), bool)
        final_obs = np.full(self.num_envs, None, object)
        for env in range(self.num_envs):
            if self.waits_for_reset[env]:
                assert self.mode == "next_step", "stepped after the end"
                self.begin(env)
                rewards[env] = _DUMMY_REWARD
                continue
            self.step_number[env] += 1
            rewards[env] = self.rng.integers(-8, 9)
            if self.step_number[env] == self.length[env]:
                terminated[env], truncated[env] = [(True, False), (False, True), (True, True)][self.rng.integers(3)]
                self.waits_for_reset[env] = True
            history = self.steps[self.first_env + env, int(self.episode[env])]
            history.append((int(actions[env]), float(rewards[env]), bool(terminated[env]), bool(truncated[env])))
            if self.waits_for_reset[env]:
                self.finished.append((sum(reward for _, reward, _, _ in history), len(history)))
                self.ends.append((self.num_steps, *history[-1][2:]))
                if self.mode == "same_step":
                    final_obs[env] = self.observations(env)
        infos = {}
        if self.mode == "same_step":
            ended = self.waits_for_reset.copy()
            for env in np.flatnonzero(ended):
                self.begin(env)
            infos = {"final_obs": final_obs, "_final_obs": ended} if ended.any() else {}
        self.num_steps += 1
        return self.observations(), rewards, terminated, truncated, infos


class EpisodeEnv(gym.Env):
    """One of them as a plain environment: arrays without environment dimension, Python numbers."""

    def __init__(self, seed=0, **options):
        self.envs = EpisodeEnvs(1, "disabled", seed, **options)
        self.observation_space = self.envs.single_observation_space
        self.action_space = self.envs.single_action_space

    def reset(self, *, seed=None, options=None):
        self.envs.reset()
        return self.envs.observations(0), {}

    def step(self, action):
        _, rewards, terminated, truncated, infos = self.envs.step([action])
        return self.envs.observations(0), float(rewards[0]), bool(terminated[0]), bool(truncated[0]), infos


class EpisodePool(gym.Env):
    """Next_step mode as EnvPool before 1.0 has it: known by its length, spaces of one, a reset without arguments."""

    metadata: ClassVar = {"render_modes": []}

    def __init__(self, num_envs, seed=0, **options):
        self.envs = EpisodeEnvs(num_envs, "next_step", seed, **options)
        self.observation_space = self.envs.single_observation_space
        self.action_space = self.envs.single_action_space

    def __len__(self):
        return self.envs.num_envs

    def reset(self):
        return self.envs.reset()

    def step(self, actions):
        return self.envs.step(actions)


def make_envs(kind, num_envs, seed, first_env=0):
    """Environments of one of KINDS; a plain one is alone."""
    if kind == "plain":
        return EpisodeEnv(seed, first_env=first_env)
    if kind == "envpool":
        return EpisodePool(num_envs, seed, first_env=first_env)
    if kind == "dictionaries":
        return EpisodeEnvs(num_envs, "same_step", seed, first_env=first_env, dictionaries=True)
    return EpisodeEnvs(num_envs, kind, seed, first_env=first_env)


def play(kind, num_envs, seed, first_env, choose):
    """The episodes of such environments, played as their mode asks for; yields them after every step."""
    mode = {"dictionaries": "same_step", "plain": "disabled", "envpool": "next_step"}.get(kind, kind)
    envs = EpisodeEnvs(1 if kind == "plain" else num_envs, mode, seed, first_env=first_env)
    observations, _ = envs.reset()
    while True:
        observations, _, terminated, truncated, _ = envs.step(choose(observations))
        ended = terminated | truncated
        if mode == "disabled" and ended.any():
            observations, _ = envs.reset(options={"reset_mask": ended})
        yield envs


def numbers_of(observations):
    """(env, episode, step), [N, 3], of observations [N, ...] of any kind."""
    if isinstance(observations, Mapping):
        return np.column_stack([numbers_of(branch) for branch in observations.values()])
    return np.asarray(observations)


def totals(stats):
    """Number, sum of returns and sum of lengths of all episodes in `stats()`, whose window must be wide enough."""
    num_episodes = stats.get("train/num_episodes", 0)
    means = [stats.get(f"train/{key}_mean", 0.0) for key in ("rewards", "lengths")]
    return np.array([num_episodes, *(num_episodes * mean for mean in means)])


def expected_rows(steps, n_step, gamma=GAMMA):
    """What a table must hold of these episodes once its writer is closed, by the plain definition, sorted.

    Rows: (obs, action, reward sum, next_obs, n_steps, discount, terminated, truncated), terminated twice (dones).
    """
    rows = []
    for (env, episode), history in steps.items():
        for first, (action, *_) in enumerate(history):
            window = history[first : first + n_step]
            last = first + len(window)
            reward = sum(gamma**k * step_reward for k, (_, step_reward, _, _) in enumerate(window))
            *_, terminated, truncated = window[-1]
            discount = 0.0 if terminated else gamma ** len(window)
            obs, next_obs = (env, episode, first), (env, episode, last)
            rows.append((obs, action, reward, next_obs, len(window), discount, terminated, truncated, terminated))
    return sorted(rows)


def committed_leaves(client, table):
    """path -> array of the committed rows (odd generation) of a table, read from shared memory."""
    config = client.tables[table]
    rows, generations = client._connection.segments[table]
    committed = generations.array("int64") % 2 == 1
    return {path: view[committed] for path, view in config.layout.view(rows.buffer, config.num_rows).items()}


def stored_rows(client, table):
    """The same rows as `expected_rows` makes, read from the table."""
    leaves = committed_leaves(client, table)
    names = ("actions", "rewards", "n_steps", "discounts", "terminateds", "truncateds", "dones")
    actions, rewards, n_steps, discounts, terminateds, truncateds, dones = (leaves[name].tolist() for name in names)
    observations, next_observations = (
        list(map(tuple, numbers_of(unflatten(name, leaves)).tolist())) for name in ("observations", "next_observations")
    )
    columns = (
        observations,
        actions,
        rewards,
        next_observations,
        n_steps,
        discounts,
        terminateds,
        truncateds,
        map(bool, dones),
    )
    return sorted(zip(*columns, strict=True))
