"""Greedy evaluation, apart from the exploring actors' returns."""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import SyncVectorEnv
from numpy.typing import NDArray

MAX_ENVS_AT_ONCE = 25

# Seeds that no actor uses, far apart from each other.
PROGRESS_SEED, CONFIRMATION_SEED, FINAL_SEED = 1_000_000, 2_000_000, 3_000_000


@torch.inference_mode()
def evaluate(
    act: Callable[[torch.Tensor], torch.Tensor], env_id: str, seeds: Sequence[int], render: bool = False
) -> NDArray[np.float64]:
    """Undiscounted return of one whole episode per seed, [len(seeds)].

    Args:
        act: actions [E, ...] for observations [E, *obs_shape].
        env_id: registered environment.
        seeds: of `reset`, one per episode.
        render: show each episode in a window, one after the other.
    """
    at_once = 1 if render else MAX_ENVS_AT_ONCE
    groups = [seeds[start : start + at_once] for start in range(0, len(seeds), at_once)]
    return np.concatenate([_evaluate_group(act, env_id, group, render) for group in groups])


def _evaluate_group(act: Any, env_id: str, seeds: Sequence[int], render: bool) -> NDArray[np.float64]:
    render_mode = "human" if render else None
    envs = SyncVectorEnv([lambda: gym.make(env_id, render_mode=render_mode) for _ in seeds])
    observations, _ = envs.reset(seed=list(seeds))
    returns, running = np.zeros(len(seeds)), np.ones(len(seeds), bool)
    while running.any():
        observations, rewards, terminated, truncated, _ = envs.step(act(torch.from_numpy(observations)).numpy())
        returns += rewards * running
        running &= ~(terminated | truncated)
    envs.close()
    return returns
