"""Environments that crews find by their ids: `crew_envs:Works-v0`, and `crew_envs:Fails-v0`, which raises at step 7."""

import gymnasium as gym
import numpy as np


class OneEpisode(gym.Env):
    """An endless episode, unless it fails."""

    observation_space = gym.spaces.Box(-1, 1, (3,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, fails_at=None):
        self.fails_at = fails_at
        self.num_steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.num_steps += 1
        if self.num_steps == self.fails_at:
            raise OSError("the arm is stuck")
        return np.zeros(3, np.float32), 0.0, False, False, {}


gym.register("Works-v0", OneEpisode)
gym.register("Fails-v0", OneEpisode, kwargs={"fails_at": 7})
