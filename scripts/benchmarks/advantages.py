"""Section gae: advantages of a rollout, from arrays [steps, envs] where one step in fifty ends an episode."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.measure import OURS, Case, Job, Measurement, Options, take_turns
from rl_buffer.gae import generalized_advantages

SECTION = "gae"
GAE = "GAE of a rollout"
LISTS, ARRAYS, TENSORS = "loop over floats", "loop over arrays", "loop over tensors"

_GAMMA, _GAE_LAMBDA = 0.99, 0.95
_SLOW = 10_000  # steps, from which on a loop over tensors takes seconds

Advantages = Callable[[], Any]


def gae(options: Options) -> list[Measurement]:
    """The kernel, three loops in plain Python, and TorchRL's vectorized one; they must agree before they are timed."""
    measurements = []
    for num_steps, num_envs in ((128, 8), (128, 1024)):
        functions = _candidates(num_steps, num_envs)
        expected = functions[OURS]()
        for function in functions.values():
            if not isinstance(function, str):
                np.testing.assert_allclose(function(), expected, rtol=1e-4, atol=1e-4)
        jobs = {
            Case(GAE, f"{num_steps} x {num_envs}", name): function if isinstance(function, str) else Job(function)
            for name, function in functions.items()
        }
        measurements += take_turns(SECTION, jobs, options)
    return measurements


def nested_loops(
    rewards: Any, values: Any, terminated: Any, truncated: Any, final_values: Any, last_values: Any, advantages: Any
) -> None:
    """GAE as the paper writes it, element by element; takes whatever is indexed by [step][env]."""
    following, next_values = [0.0] * len(last_values), last_values
    for step in reversed(range(len(rewards))):
        reward, value, final_value, advantage = rewards[step], values[step], final_values[step], advantages[step]
        terminates, truncates = terminated[step], truncated[step]
        for env in range(len(following)):
            if terminates[env]:
                delta, rest = reward[env] - value[env], 0.0
            elif truncates[env]:
                delta, rest = reward[env] + _GAMMA * final_value[env] - value[env], 0.0
            else:
                delta, rest = reward[env] + _GAMMA * next_values[env] - value[env], following[env]
            following[env] = advantage[env] = delta + _GAMMA * _GAE_LAMBDA * rest
        next_values = value


def _candidates(num_steps: int, num_envs: int) -> dict[str, Advantages | str]:
    """Functions that compute the advantages of one and the same rollout; or why there is none."""
    random, shape = np.random.default_rng(0), (num_steps, num_envs)
    rewards, values, final_values = (random.random(shape, np.float32) for _ in range(3))
    terminated, truncated = random.random(shape) < 0.01, random.random(shape) < 0.01
    last_values, mask = random.random(num_envs, np.float32), np.ones(shape, np.bool_)
    rollout = (rewards, values, terminated, truncated, final_values, last_values)
    tensors = [torch.from_numpy(array) for array in rollout]

    def ours() -> Any:
        inputs = (rewards, values, terminated, truncated, mask, final_values, last_values)
        return generalized_advantages(*inputs, gamma=_GAMMA, gae_lambda=_GAE_LAMBDA)[0]

    def over_floats() -> Any:
        advantages = np.zeros(shape).tolist()
        nested_loops(*(array.tolist() for array in rollout), advantages)
        return np.array(advantages, np.float32)

    def over_arrays() -> Any:
        nested_loops(*rollout, advantages := np.empty(shape, np.float32))
        return advantages

    def over_tensors() -> Any:
        nested_loops(*tensors, advantages := torch.empty(shape))
        return advantages

    return {
        OURS: ours,
        LISTS: over_floats,
        ARRAYS: over_arrays,
        TENSORS: over_tensors if num_steps * num_envs < _SLOW else "seconds each",
        "torchrl": _torchrl(*tensors),
    }


def _torchrl(
    rewards: torch.Tensor,
    values: torch.Tensor,
    terminated: torch.Tensor,
    truncated: torch.Tensor,
    final_values: torch.Tensor,
    last_values: torch.Tensor,
) -> Advantages | str:
    """From tensors in its own layout, [envs, steps, 1], made beforehand; so are the next values."""
    try:
        with warnings.catch_warnings(action="ignore"):
            from torchrl.objectives.value.functional import vec_generalized_advantage_estimate
    except ImportError:
        return "not installed"
    next_values = torch.where(truncated, final_values, torch.cat([values[1:], last_values[None]]))
    inputs = (values, next_values, rewards, terminated | truncated, terminated)
    columns = [tensor.T[..., None].contiguous() for tensor in inputs]
    return lambda: vec_generalized_advantage_estimate(_GAMMA, _GAE_LAMBDA, *columns)[0][..., 0].T
