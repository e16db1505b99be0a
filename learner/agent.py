"""What the learner of every algorithm has: options of a run, networks, optimizers, counters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import gymnasium as gym
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from actors.crew import TABLE as TABLE


@dataclass
class RunOptions:
    """How long a learner runs, how it is judged, and on what it computes."""

    max_env_steps: int = 150_000
    """Environment steps of all actors after which the run ends."""
    stop: bool = True
    """End as soon as an evaluation reaches the environment's own reward threshold. --no-stop goes on."""
    publish_period: int = 20
    """Updates between parameter versions for the actors."""
    eval_period: int = 2_500
    """Environment steps between greedy evaluations."""
    eval_episodes: int = 10
    """Episodes of each; one that reaches the threshold is confirmed on nine times as many."""
    device: str = "cpu"
    """Where the networks are trained: cpu, cuda, cuda:1, ..."""
    num_threads: int = 1
    """Torch threads of the learner."""


class PolicyNetwork(Protocol):
    """What actors fetch, policy.safetensors keeps and evaluations play."""

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Tensor]) -> Self:
        """The network that these parameters belong to: their shapes say all, so that nobody else needs options."""

    def greedy(self, observations: Tensor) -> Tensor:
        """Actions [E, *action_shape], as the environment takes them, of observations [E, *obs_shape]."""

    def state_dict(self) -> dict[str, Tensor]:
        """Its parameters."""


class Agent:
    """Networks, optimizers and counters: all that `--resume` brings back.

    A subclass makes `policy` and `parts` after this constructor, which sets threads and seed.
    """

    name: ClassVar[str]  # in files
    title: ClassVar[str]  # for people
    measures: ClassVar[tuple[str, ...]]  # what its updates tell: see `Session.updated`
    options: RunOptions
    policy: PolicyNetwork
    parts: Mapping[str, nn.Module | Optimizer]

    def __init__(self, options: RunOptions, env_id: str, seed: int) -> None:
        torch.set_num_threads(options.num_threads)
        torch.manual_seed(seed)
        self.options, self.env_id, self.seed = options, env_id, seed
        self.device = torch.device(options.device)
        self.updates = 0
        self.samples = 0

    @torch.inference_mode()
    def act(self, observations: Tensor) -> Tensor:
        """Greedy actions [E, *action_shape], on the CPU."""
        return self.policy.greedy(observations.to(self.device)).cpu()

    def state(self) -> dict[str, Tensor]:
        """Everything but the counters, by flat names."""
        tensors: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            if isinstance(part, Optimizer):
                for index, moments in part.state_dict()["state"].items():
                    tensors |= {f"{name}/{index}/{key}": value for key, value in moments.items()}
            else:
                tensors |= {f"{name}/{key}": value for key, value in part.state_dict().items()}
        if self.device.type == "cuda":
            tensors["random_cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors | {"random": torch.get_rng_state()}

    def load(self, tensors: Mapping[str, Tensor], updates: int, samples: int) -> None:
        """Invert `state`."""
        for name, part in self.parts.items():
            prefix = f"{name}/"
            stored = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if isinstance(part, Optimizer):
                state = part.state_dict()
                for path, value in stored.items():
                    index, key = path.split("/")
                    state["state"].setdefault(int(index), {})[key] = value
                part.load_state_dict(state)
            else:
                part.load_state_dict(stored)
        torch.set_rng_state(tensors["random"])
        if self.device.type == "cuda" and "random_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random_cuda"], self.device)
        self.updates, self.samples = updates, samples


def spaces_of(env_id: str) -> tuple[gym.Space, gym.Space]:
    """Observation and action space of an environment, which is made and closed for it."""
    env = gym.make(env_id)
    env.close()
    return env.observation_space, env.action_space
