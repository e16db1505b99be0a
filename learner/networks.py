"""What the algorithms' networks are made of."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import Tensor, nn


def hidden_layers(num_inputs: int, sizes: Sequence[int]) -> nn.Sequential:
    """A multilayer perceptron without its last layer: rectified features [B, sizes[-1]] of inputs [B, num_inputs]."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise((num_inputs, *sizes)):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers)


def sizes_of(name: str, parameters: Mapping[str, Tensor]) -> tuple[int, list[int]]:
    """What `hidden_layers` was called with, told by its parameters, which are called `name`.0.weight, ..."""
    weights = [value for key, value in parameters.items() if key.startswith(f"{name}.") and key.endswith("weight")]
    return weights[0].shape[1], [weight.shape[0] for weight in weights]
