"""Q-networks for vector observations, and the epsilon-greedy policy that actors follow."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor, nn

from actors.crew import MakePolicy
from actors.replay import Decision
from learner.networks import hidden_layers, sizes_of


class QNetwork(nn.Module):
    """Q(s, .) of a flat observation by a multilayer perceptron; dueling heads by option (Wang et al. 2016)."""

    def __init__(self, num_inputs: int, num_actions: int, hidden_sizes: Sequence[int], dueling: bool) -> None:
        super().__init__()
        # Part of the parameters that actors fetch: see `calibrate`.
        self.register_buffer("observation_mean", torch.zeros(num_inputs))
        self.register_buffer("observation_scale", torch.ones(num_inputs))
        self.trunk = hidden_layers(num_inputs, hidden_sizes)
        self.advantage = nn.Linear(hidden_sizes[-1], num_actions)
        self.value = nn.Linear(hidden_sizes[-1], 1) if dueling else None

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Tensor]) -> "QNetwork":
        """The network that these parameters belong to: their shapes say all, so that actors need no options."""
        num_inputs, *hidden_sizes = sizes_of("trunk", parameters)
        num_actions, dueling = parameters["advantage.weight"].shape[0], "value.weight" in parameters
        network = cls(num_inputs, num_actions, hidden_sizes, dueling)
        network.load_state_dict(dict(parameters))
        return network

    @torch.no_grad()
    def calibrate(self, observations: Tensor, mean_reward: float, gamma: float) -> None:
        """Set scales from first experience, once: inputs get mean 0 and deviation 1, Q starts at r / (1 - gamma).

        Otherwise Q has to climb there by hard target copies, one bootstrap at a time, and the policy drifts meanwhile.

        Args:
            observations: [N, *obs_shape].
            mean_reward: r, of one step.
            gamma: discount factor.
        """
        flat = observations.flatten(1).float()
        self.observation_mean.copy_(flat.mean(0))
        self.observation_scale.copy_(1 / flat.std(0).clamp_min(1e-2))
        (self.advantage if self.value is None else self.value).bias.fill_(mean_reward / max(1e-3, 1 - gamma))

    def forward(self, observations: Tensor) -> Tensor:
        """Q-values [B, num_actions] of observations [B, *obs_shape]."""
        inputs = (observations.flatten(1).float() - self.observation_mean) * self.observation_scale
        features = self.trunk(inputs)
        advantages: Tensor = self.advantage(features)
        if self.value is None:
            return advantages
        return self.value(features) + advantages - advantages.mean(1, keepdim=True)

    def greedy(self, observations: Tensor) -> Tensor:
        """Best actions [E] of observations [E, *obs_shape]."""
        return self(observations).argmax(1)


def apex_epsilons(num_envs: int, base: float = 0.4, exponent: float = 7.0) -> NDArray[np.float64]:
    """epsilon_i = base^(1 + exponent * i / (N - 1)) of all N environments (Horgan et al. 2018, section 4).

    One environment alone gets epsilon_0 = base.
    """
    return base ** (1 + exponent * np.arange(num_envs) / max(1, num_envs - 1))


class EpsilonGreedyPolicy:
    """Each environment explores with its own epsilon; Q-values go along for the initial priorities.

    Before the first parameters all actions are random, and nothing is known about Q.
    """

    def __init__(self, envs: VectorEnv, epsilons: NDArray[np.float64], seed: int) -> None:
        self._network: QNetwork | None = None
        self._num_actions = int(envs.single_action_space.n)
        self._epsilons = epsilons
        self._rng = np.random.default_rng(seed)

    def load(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take newer parameters."""
        self._network = QNetwork.from_parameters(state_dict)

    @torch.inference_mode()
    def decide(self, observations: NDArray[Any]) -> Decision:
        """Actions [E] int64, q_taken [E] and state_values [E] float32 of observations [E, *obs_shape]."""
        random_actions = self._rng.integers(self._num_actions, size=len(observations))
        if self._network is None:
            return Decision(random_actions)
        q_values = self._network(torch.from_numpy(np.asarray(observations))).numpy()
        explore = self._rng.random(len(observations)) < self._epsilons
        actions = np.where(explore, random_actions, q_values.argmax(1))
        return Decision(actions, q_values[np.arange(len(actions)), actions], q_values.max(1))

    @torch.inference_mode()
    def values(self, observations: NDArray[Any]) -> NDArray[np.float32]:
        """max_a Q(obs, a), [E], of observations [E, *obs_shape]; after the first parameters."""
        return self._network(torch.from_numpy(np.asarray(observations))).amax(1).numpy()


def epsilon_greedy_policies(num_actors: int, envs_per_actor: int) -> MakePolicy:
    """The crew's policies, which divide the range of epsilons among the environments of all actors."""
    epsilons = apex_epsilons(num_actors * envs_per_actor).reshape(num_actors, envs_per_actor)
    return lambda envs, number, seed: EpsilonGreedyPolicy(envs, epsilons[number], seed)
