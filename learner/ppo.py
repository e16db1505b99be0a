"""PPO with clipped ratios (Schulman et al. 2017, arXiv:1707.06347), the learner.

Reads from top to bottom: options, the table it wants, the network, the actors' policy, the losses, the loop. Actors and
learner go in step: every rollout is made with the newest parameters, as in one process, only by several.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Categorical

import rl_buffer as rb
from actors.crew import CrewOptions, MakePolicy
from actors.rollout import Choice
from learner.agent import TABLE, Agent, RunOptions, spaces_of
from learner.session import Session


@dataclass
class TableOptions:
    """What a rollout is."""

    num_steps: int = 32
    """Steps of each environment per rollout."""
    gamma: float = 0.98
    """Discount factor per step."""
    gae_lambda: float = 0.8
    """Of generalized advantage estimation."""
    asynchronous: bool = False
    """Let actors run on while the learner learns; its data is then up to two versions old."""


@dataclass
class LearnerOptions(RunOptions):
    """How the network is trained."""

    max_env_steps: int = 200_000
    """Environment steps of all actors after which the run ends."""
    publish_period: int = 1
    """Rollouts learned from between parameter versions for the actors; synchronous actors wait for each."""
    eval_period: int = 10_000
    """Environment steps between greedy evaluations."""
    learning_rate: float = 1e-3
    """Of Adam at the start; it falls to 0 at `max_env_steps`, and so does the clipping range."""
    num_epochs: int = 20
    """Passes over each rollout."""
    minibatch_size: int = 256
    """Steps per gradient step."""
    clip_range: float = 0.2
    """The ratio of new to old probability that still counts is within 1 -+ this."""
    value_clip_range: float | None = None
    """Likewise for values, around the old ones; none by default."""
    value_weight: float = 0.5
    """Of the squared value error in the loss."""
    entropy_weight: float = 0.0
    """Of the policy's entropy in the loss."""
    max_grad_norm: float = 0.5
    """Gradients are scaled down to this norm."""
    target_kl: float | None = None
    """End a rollout's epochs when the policy has moved further than 1.5 times this, in nats; none by default."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Units of each hidden layer, of policy and value network."""


def ppo_table(options: TableOptions, crew: CrewOptions, spec: rb.TransitionSpec) -> rb.RolloutTable:
    """One fragment of every actor at a time; asynchronous ones have a second round under way."""
    lag = 2 if options.asynchronous else 0
    return rb.RolloutTable(
        spec,
        num_steps=options.num_steps,
        num_envs=crew.envs_per_actor,
        num_fragments=(lag + 1) * crew.num_actors,
        gamma=options.gamma,
        gae_lambda=options.gae_lambda,
        max_version_lag=lag,
        when_late="wait",
        fragments_per_update=crew.num_actors,
    )


# ---- network ---------------------------------------------------------------------------------------------------


def vector_inputs_and_discrete_actions(env_id: str) -> tuple[int, int]:
    """Number of inputs and actions of an environment that this learner is for.

    Raises:
        InvalidInput: other spaces than Box observations and Discrete actions.
    """
    observations, actions = spaces_of(env_id)
    if not isinstance(observations, gym.spaces.Box) or not isinstance(actions, gym.spaces.Discrete):
        raise rb.InvalidInput(
            f"PPO needs Box observations and Discrete actions; {env_id} has {observations}, {actions}"
        )
    return math.prod(observations.shape), int(actions.n)


def _tanh_layers(sizes: Sequence[int], last_gain: float) -> nn.Sequential:
    """Orthogonal weights, and hyperbolic tangents between the layers."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        linear = nn.Linear(fan_in, fan_out)
        is_last = i == len(sizes) - 2
        nn.init.orthogonal_(linear.weight, last_gain if is_last else math.sqrt(2))
        nn.init.zeros_(linear.bias)
        layers += [linear] if is_last else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


class ActorCritic(nn.Module):
    """pi(a | s) and V(s), two networks that share nothing."""

    def __init__(self, num_inputs: int, num_actions: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.actor = _tanh_layers((num_inputs, *hidden_sizes, num_actions), 0.01)
        self.critic = _tanh_layers((num_inputs, *hidden_sizes, 1), 1.0)

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Tensor]) -> "ActorCritic":
        """The network that these parameters belong to."""
        weights = [value for key, value in parameters.items() if key.startswith("actor.") and key.endswith("weight")]
        network = cls(weights[0].shape[1], weights[-1].shape[0], [weight.shape[0] for weight in weights[:-1]])
        network.load_state_dict(dict(parameters))
        return network

    def forward(self, observations: Tensor) -> tuple[Categorical, Tensor]:
        """The distribution of actions [B] and the values [B] of observations [B, *obs_shape]."""
        inputs = observations.flatten(1).float()
        return Categorical(logits=self.actor(inputs), validate_args=False), self.critic(inputs).squeeze(1)

    def greedy(self, observations: Tensor) -> Tensor:
        """Likeliest actions [E] of observations [E, *obs_shape]."""
        return self.actor(observations.flatten(1).float()).argmax(1)


# ---- acting ----------------------------------------------------------------------------------------------------


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
        """Actions, log-probabilities and values, [E] each, of observations [E, *obs_shape]."""
        distribution, values = self._network(torch.from_numpy(np.asarray(observations)))
        actions = torch.multinomial(distribution.probs, 1, generator=self._generator).squeeze(1)
        return Choice(actions.numpy(), distribution.log_prob(actions).numpy(), values.numpy())

    @torch.inference_mode()
    def values(self, observations: NDArray[Any]) -> NDArray[np.float32]:
        """V(obs), [E]."""
        return self._network(torch.from_numpy(np.asarray(observations)))[1].numpy()


def sampling_policies(num_actors: int, envs_per_actor: int) -> MakePolicy:
    """The crew's policies, which differ in nothing but their seeds."""
    return lambda envs, number, seed: SamplingPolicy(seed)


# ---- learning --------------------------------------------------------------------------------------------------


def clipped_policy_loss(log_ratios: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """-E[min(r A, clip(r, 1 - c, 1 + c) A)] (equation 7), a scalar; log r and A are [B]."""
    ratios = log_ratios.exp()
    clipped = ratios.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratios * advantages, clipped * advantages).mean()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float | None) -> Tensor:
    """E[(V - R)^2] / 2, a scalar; with a clip range the larger of that and the error of V kept near the old one."""
    errors = (values - returns) ** 2
    if clip_range is not None:
        near = old_values + (values - old_values).clamp(-clip_range, clip_range)
        errors = torch.maximum(errors, (near - returns) ** 2)
    return 0.5 * errors.mean()


class PPO(Agent):
    """Actor and critic."""

    name = "ppo"
    title = "PPO"
    measures = ("loss", "value_loss", "entropy", "kl", "explained_variance")
    options: LearnerOptions

    def __init__(self, options: LearnerOptions, env_id: str, seed: int) -> None:
        """Random networks. The first optimizer of a process loads torch's compiler, some seconds long."""
        super().__init__(options, env_id, seed)
        sizes = vector_inputs_and_discrete_actions(env_id)
        self.policy = ActorCritic(*sizes, options.hidden_sizes).to(self.device)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=options.learning_rate, eps=1e-5, fused=True)
        self.parts = {"policy": self.policy, "optimizer": self.optimizer}

    def update(self, rollouts: rb.Rollouts, env_steps: int) -> dict[str, Tensor]:
        """All epochs over one rollout; returns `measures` of the last."""
        options = self.options
        left = max(0.0, 1 - env_steps / options.max_env_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = left * options.learning_rate
        minibatch_size = min(options.minibatch_size, rollouts.num_transitions)
        measures: list[Tensor] = []
        for _ in range(options.num_epochs):
            measures = [
                self._step(batch, left * options.clip_range)
                for batch in rollouts.get(minibatch_size, normalize_advantages=True)
            ]
            if options.target_kl is not None and torch.stack(measures)[:, 3].mean() > 1.5 * options.target_kl:
                break
        self.updates += 1
        self.samples += rollouts.num_transitions
        means = torch.stack(measures).mean(0)
        values = (*means, torch.tensor(rollouts.explained_variance))
        return dict(zip(self.measures, values, strict=True))

    def _step(self, batch: rb.RolloutBatch, clip_range: float) -> Tensor:
        """One gradient step; returns loss, value loss, entropy and KL divergence, [4]."""
        options = self.options
        distribution, values = self.policy(batch.observations)
        log_ratios = distribution.log_prob(batch.actions) - batch.log_probs
        policy_loss = clipped_policy_loss(log_ratios, batch.advantages, clip_range)
        errors = value_loss(values, batch.values, batch.returns, options.value_clip_range)
        entropy = distribution.entropy().mean()
        loss = policy_loss + options.value_weight * errors - options.entropy_weight * entropy
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), options.max_grad_norm)
        self.optimizer.step()
        with torch.no_grad():
            kl = (log_ratios.exp() - 1 - log_ratios).mean()  # Schulman's estimate with little variance
        return torch.stack((loss, errors, entropy, kl)).detach()


def train(agent: PPO, session: Session) -> None:
    """Learn from a rollout of every actor at a time; the actors begin the next ones with what came of it."""
    session.publish()
    reader = session.client.rollouts(TABLE, device=agent.options.device, seed=agent.seed)
    for rollouts in session.rollouts(reader):
        measured = agent.update(rollouts, session.env_steps)
        session.updated(**measured)
        rollouts.release()  # after the new parameters are published: that is what the actors wait for
