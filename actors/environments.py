"""Vector environments as the scripts make them."""

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from rl_buffer import TransitionSpec


def make_envs(env_id: str, num_envs: int) -> VectorEnv:
    """`num_envs` copies of a registered environment, stepped one after the other in this process.

    Processes are what actors are for; within one, a second level of them would only cost switches.
    """
    return SyncVectorEnv([lambda: gym.make(env_id) for _ in range(num_envs)], autoreset_mode=AutoresetMode.NEXT_STEP)


def transition_spec(env_id: str) -> TransitionSpec:
    """What a transition of this environment holds, observations in at most 32-bit floats."""
    env = gym.make(env_id)
    observation_dtype = "float32" if env.observation_space.dtype == np.float64 else None
    spec = TransitionSpec.from_spaces(env.observation_space, env.action_space, obs_dtype=observation_dtype)
    env.close()
    return spec
