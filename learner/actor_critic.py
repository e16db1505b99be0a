"""PPO's two networks, for discrete and continuous actions, and the policy that actors follow."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from actors.crew import MakePolicy
from actors.rollout import Choice
from learner.networks import ActionScale, orthogonal_layers, sizes_of
from learner.normalization import RunningMoments

_OBSERVATION_LIMIT = 10.0  # deviations


class ActorCritic(nn.Module):
    """pi(a | s) and V(s), two networks that share nothing but the moments of what they see and earn.

    Discrete actions are drawn from a Categorical. Continuous ones from a Normal around a mean that depends on s, with
    a deviation that does not; what is drawn, and stored, has no bounds: `to_environment` cuts it off at [-1, 1] and
    scales that.
    """

    def __init__(
        self,
        num_inputs: int,
        actions: int | ActionScale,
        hidden_sizes: Sequence[int],
        *,
        normalize_observations: bool = False,
        normalize_rewards: bool = False,
    ) -> None:
        """`actions` is the number of discrete ones, or the scale of continuous ones."""
        super().__init__()
        num_outputs = actions.num_actions if isinstance(actions, ActionScale) else actions
        self.actor = orthogonal_layers((num_inputs, *hidden_sizes, num_outputs), 0.01)
        self.critic = orthogonal_layers((num_inputs, *hidden_sizes, 1), 1.0)
        self.action_scale = actions if isinstance(actions, ActionScale) else None
        self.log_std = nn.Parameter(torch.zeros(num_outputs)) if isinstance(actions, ActionScale) else None
        self.observation_moments = RunningMoments((num_inputs,)) if normalize_observations else None
        self.return_moments = RunningMoments() if normalize_rewards else None

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Tensor]) -> "ActorCritic":
        """The network that these parameters belong to."""
        num_inputs, *hidden_sizes, num_outputs = sizes_of("actor", parameters)
        network = cls(
            num_inputs,
            ActionScale.from_parameters(parameters, "action_scale") if "log_std" in parameters else num_outputs,
            hidden_sizes,
            normalize_observations="observation_moments.mean" in parameters,
            normalize_rewards="return_moments.mean" in parameters,
        )
        network.load_state_dict(dict(parameters))
        return network

    @property
    def value_unit(self) -> Tensor | float:
        """The reward that counts as 1 for the critic, whose values are in the environment's unit all the same."""
        return 1.0 if self.return_moments is None else self.return_moments.deviation

    @torch.no_grad()
    def count(self, observations: Tensor, discounted_returns: Tensor) -> None:
        """Take steps into the running moments: observations [N, *obs_shape] and discounted returns [N]."""
        if self.observation_moments is not None:
            self.observation_moments.update(observations.flatten(1))
        if self.return_moments is not None:
            self.return_moments.update(discounted_returns)

    def forward(self, observations: Tensor) -> tuple[Distribution, Tensor]:
        """The distribution of actions [B] and the values [B] of observations [B, *obs_shape]."""
        inputs = self._inputs(observations)
        return self._distribution(inputs), self.critic(inputs).squeeze(1) * self.value_unit

    def greedy(self, observations: Tensor) -> Tensor:
        """Likeliest actions [E, *action_shape] of observations [E, *obs_shape], as the environment takes them."""
        outputs = self.actor(self._inputs(observations))
        return outputs.argmax(1) if self.action_scale is None else self.to_environment(outputs)

    def sample(self, observations: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Drawn actions [E] or [E, A], their log-probabilities [E] and values [E] of observations [E, *obs_shape]."""
        distribution, values = self(observations)
        if self.action_scale is None:
            actions = torch.multinomial(distribution.probs, 1, generator=generator).squeeze(1)
        else:
            noise = torch.randn(distribution.mean.shape, generator=generator)
            actions = distribution.mean + distribution.stddev * noise
        return actions, distribution.log_prob(actions), values

    def to_environment(self, actions: Tensor) -> Tensor:
        """What the environment takes, [E, *action_shape], for continuous actions [E, A] as they were drawn."""
        return self.action_scale(actions.clamp(-1.0, 1.0))

    def _inputs(self, observations: Tensor) -> Tensor:
        flat = observations.flatten(1).float()
        moments = self.observation_moments
        return flat if moments is None else moments.standardized(flat, _OBSERVATION_LIMIT)

    def _distribution(self, inputs: Tensor) -> Distribution:
        outputs = self.actor(inputs)
        if self.log_std is None:
            return Categorical(logits=outputs, validate_args=False)
        deviations = self.log_std.exp().expand_as(outputs)
        return Independent(Normal(outputs, deviations, validate_args=False), 1, validate_args=False)


class SamplingPolicy:
    """What actors follow: actions drawn from the learner's policy."""

    def __init__(self, seed: int) -> None:
        self._network: ActorCritic | None = None
        self._generator = torch.Generator().manual_seed(seed)

    def load(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take newer parameters."""
        if self._network is None:
            self._network = ActorCritic.from_parameters(state_dict)
        else:
            self._network.load_state_dict(dict(state_dict))

    @torch.inference_mode()
    def choose(self, observations: NDArray[Any]) -> Choice:
        """Actions, log-probabilities and values of observations [E, *obs_shape]."""
        network = self._network
        drawn, log_probs, values = network.sample(torch.from_numpy(np.asarray(observations)), self._generator)
        if network.action_scale is None:
            return Choice(drawn.numpy(), log_probs.numpy(), values.numpy())
        taken = network.to_environment(drawn)
        return Choice(drawn.view(taken.shape).numpy(), log_probs.numpy(), values.numpy(), env_actions=taken.numpy())

    @torch.inference_mode()
    def values(self, observations: NDArray[Any]) -> NDArray[np.float32]:
        """V(obs), [E]."""
        return self._network(torch.from_numpy(np.asarray(observations)))[1].numpy()


def sampling_policies(num_actors: int, envs_per_actor: int) -> MakePolicy:
    """The crew's policies, which differ in nothing but their seeds."""
    return lambda envs, number, seed: SamplingPolicy(seed)
