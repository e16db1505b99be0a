"""What the algorithms' networks are made of."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import gymnasium as gym
import torch
from torch import Tensor, nn

import rl_buffer as rb


def hidden_layers(num_inputs: int, sizes: Sequence[int]) -> nn.Sequential:
    """A multilayer perceptron without its last layer: rectified features [B, sizes[-1]] of inputs [B, num_inputs]."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise((num_inputs, *sizes)):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers)


def orthogonal_layers(sizes: Sequence[int], last_gain: float) -> nn.Sequential:
    """A multilayer perceptron of `sizes`, with orthogonal weights and hyperbolic tangents between the layers."""
    layers: list[nn.Module] = []
    for position, (fan_in, fan_out) in enumerate(pairwise(sizes), start=2):
        linear = nn.Linear(fan_in, fan_out)
        nn.init.orthogonal_(linear.weight, last_gain if position == len(sizes) else math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def sizes_of(name: str, parameters: Mapping[str, Tensor]) -> list[int]:
    """Widths of the layers called `name`.0, ... of these parameters, from their inputs to their last outputs."""
    weights = [value for key, value in parameters.items() if key.startswith(f"{name}.") and key.endswith("weight")]
    return [weights[0].shape[1], *(weight.shape[0] for weight in weights)]


class ActionScale(nn.Module):
    """From [-1, 1] to an environment's Box of actions, and back."""

    centre: Tensor
    half_range: Tensor

    def __init__(self, low: Tensor, high: Tensor) -> None:
        """`low`, `high`: [*action_shape] float32, finite."""
        super().__init__()
        # Part of the parameters that actors fetch, who then need no bounds from elsewhere.
        self.register_buffer("centre", (high + low) / 2)
        self.register_buffer("half_range", (high - low) / 2)

    @classmethod
    def of_space(cls, space: gym.spaces.Box) -> "ActionScale":
        """For the actions of an environment.

        Raises:
            InvalidInput: one has no bounds.
        """
        if not space.is_bounded():
            raise rb.InvalidInput(f"policies scale their actions to the bounds of their space, which has none: {space}")
        return cls(*(torch.as_tensor(bound, dtype=torch.float32) for bound in (space.low, space.high)))

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Tensor], name: str) -> "ActionScale":
        """Find it again among the parameters of a module that calls it `name`."""
        centre, half_range = parameters[f"{name}.centre"], parameters[f"{name}.half_range"]
        return cls(centre - half_range, centre + half_range)

    @property
    def num_actions(self) -> int:
        """Numbers in an action, A."""
        return self.centre.numel()

    def forward(self, actions: Tensor) -> Tensor:
        """[-1, 1], [B, A], to the environment's, [B, *action_shape]."""
        return self.centre + self.half_range * actions.unflatten(1, self.centre.shape)

    def inverse(self, actions: Tensor) -> Tensor:
        """The environment's, [B, *action_shape], to [-1, 1], [B, A]."""
        return ((actions - self.centre) / self.half_range).flatten(1)
