"""Q-networks for vector observations, and the epsilon-greedy policy that actors follow."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actors.replay import Decision


class QNetwork(nn.Module):
    """Q(s, .) of a flat observation by a multilayer perceptron; dueling heads by option (Wang et al. 2016)."""

    def __init__(self, num_inputs: int, num_actions: int, hidden_sizes: Sequence[int], dueling: bool) -> None:
        super().__init__()
        # Standardisation, part of the parameters that actors fetch: see `standardise`.
        self.register_buffer("observation_mean", torch.zeros(num_inputs))
        self.register_buffer("observation_scale", torch.ones(num_inputs))
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise((num_inputs, *hidden_sizes)):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.advantage = nn.Linear(hidden_sizes[-1], num_actions)
        self.value = nn.Linear(hidden_sizes[-1], 1) if dueling else None

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Tensor]) -> "QNetwork":
        """The network that these parameters belong to: their shapes say all, so that actors need no options."""
        trunk = [tensor for key, tensor in parameters.items() if key.startswith("trunk") and key.endswith("weight")]
        network = cls(
            num_inputs=trunk[0].shape[1],
            num_actions=parameters["advantage.weight"].shape[0],
            hidden_sizes=[weight.shape[0] for weight in trunk],
            dueling="value.weight" in parameters,
        )
        network.load_state_dict(dict(parameters))
        return network

    def standardise(self, observations: Tensor) -> None:
        """Take mean and standard deviation of [N, *obs_shape] for all inputs from now on."""
        flat = observations.flatten(1).float()
        self.observation_mean.copy_(flat.mean(0))
        self.observation_scale.copy_(1 / flat.std(0).clamp_min(1e-3))

    def forward(self, observations: Tensor) -> Tensor:
        """Q-values [B, num_actions] of observations [B, *obs_shape]."""
        inputs = (observations.flatten(1).float() - self.observation_mean) * self.observation_scale
        features = self.trunk(inputs)
        advantages: Tensor = self.advantage(features)
        if self.value is None:
            return advantages
        return self.value(features) + advantages - advantages.mean(1, keepdim=True)


def apex_epsilons(num_envs: int, base: float = 0.4, exponent: float = 7.0) -> NDArray[np.float64]:
    """epsilon_i = base^(1 + exponent * i / (N - 1)) of all N environments (Horgan et al. 2018, section 4).

    One environment alone gets epsilon_0 = base.
    """
    return base ** (1 + exponent * np.arange(num_envs) / max(1, num_envs - 1))


def epsilon_greedy(parameters: Mapping[str, Tensor], epsilons: NDArray[np.float64], seed: int) -> "EpsilonGreedyPolicy":
    """The policy of one actor, made from the first parameters that the learner published."""
    return EpsilonGreedyPolicy(QNetwork.from_parameters(parameters), epsilons, seed)


class EpsilonGreedyPolicy:
    """Each environment explores with its own epsilon; Q-values go along for the initial priorities."""

    def __init__(self, network: QNetwork, epsilons: NDArray[np.float64], seed: int) -> None:
        self._network = network
        self._epsilons = epsilons
        self._rng = np.random.default_rng(seed)

    def load(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take newer parameters."""
        self._network.load_state_dict(dict(state_dict))

    @torch.inference_mode()
    def decide(self, observations: NDArray[Any]) -> Decision:
        """Actions [E] int64, q_taken [E] and state_values [E] float32 of observations [E, *obs_shape]."""
        q_values = self._network(torch.from_numpy(np.asarray(observations))).numpy()
        actions = q_values.argmax(1)
        explore = self._rng.random(len(actions)) < self._epsilons
        actions[explore] = self._rng.integers(q_values.shape[1], size=int(explore.sum()))
        return Decision(actions, q_values[np.arange(len(actions)), actions], q_values.max(1))
