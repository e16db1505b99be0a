"""Running mean and variance of what a policy sees and earns, for inputs and returns of the order of one.

The learner counts every step that happened once, whichever actor made it; so the moments of several actors are merged
exactly, in any autoreset mode. They are buffers of the policy network and travel to the actors with its parameters,
whose every forward pass applies them, also to final observations.
"""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_EPSILON = 1e-8


class RunningMoments(nn.Module):
    """Mean and variance of all values so far, per element of `shape`; 0 and 1 before the first."""

    count: Tensor
    mean: Tensor
    sum_of_squares: Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("sum_of_squares", torch.zeros(shape, dtype=torch.float64))  # of differences from the mean

    @torch.no_grad()
    def update(self, values: Tensor) -> None:
        """Add values [N, *shape], N >= 1 (Chan et al. 1979, "Updating formulae ... for computing sample variances")."""
        values = values.double()
        num_added, mean = len(values), values.mean(0)
        count, delta = self.count + num_added, mean - self.mean
        self.sum_of_squares += ((values - mean) ** 2).sum(0) + delta**2 * self.count * num_added / count
        self.mean += delta * num_added / count
        self.count.copy_(count)

    @property
    def deviation(self) -> Tensor:
        """Square root of the variance, [*shape] float32; 1 before the first value."""
        if not self.count:
            return torch.ones_like(self.mean, dtype=torch.float32)
        return (self.sum_of_squares / self.count + _EPSILON).sqrt().float()

    def standardized(self, values: Tensor, limit: float) -> Tensor:
        """(values - mean) / deviation, float32 of the same shape, cut off at +-`limit` deviations."""
        return ((values.float() - self.mean.float()) / self.deviation).clamp(-limit, limit)


class RewardedSteps(Protocol):
    """What `DiscountedReturns` needs to know of fragments, side by side; see `rb.Rollouts`."""

    writers: NDArray[np.int64]  # [F]
    rewards: NDArray[np.float32]  # [T, F * E]
    ended: NDArray[np.bool_]  # [T, F * E]
    mask: NDArray[np.bool_]  # [T, F * E]


class DiscountedReturns:
    """G_t = r_t + gamma * G_{t-1} since each episode's beginning, whose deviation is the unit of normalised rewards.

    As Gymnasium's NormalizeReward, but over the fragments of any number of actors: an environment's sum goes on in its
    actor's next fragment.
    """

    def __init__(self, gamma: float) -> None:
        self._gamma = gamma
        self._running: dict[int, NDArray[np.float64]] = {}  # writer -> G of its environments, [E]

    def of(self, rollouts: RewardedSteps) -> Tensor:
        """G of each step that happened, [N] float64, in the order of `rollouts.get(shuffle=False)`."""
        returns = np.empty(rollouts.rewards.shape)
        num_envs = returns.shape[1] // len(rollouts.writers)
        for position, writer in enumerate(rollouts.writers.tolist()):
            columns = slice(position * num_envs, (position + 1) * num_envs)
            running = self._running.get(writer, np.zeros(num_envs))
            for step in range(len(returns)):
                rewards, ended, happened = (
                    array[step, columns] for array in (rollouts.rewards, rollouts.ended, rollouts.mask)
                )
                running = np.where(happened, rewards + self._gamma * running, running)
                returns[step, columns] = running
                running = np.where(happened & ended, 0.0, running)
            self._running[writer] = running
        return torch.from_numpy(returns[rollouts.mask])
