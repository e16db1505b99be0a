"""PPO with clipped ratios (Schulman et al. 2017, arXiv:1707.06347), the learner.

Reads from top to bottom: options, the table it wants, the losses, the loop; the networks and the actors' policy are in
`actor_critic`. Actors and learner go in step: every rollout is made with the newest parameters, as in one process, only
by several.
"""

import math
from dataclasses import dataclass

import gymnasium as gym
import torch
from torch import Tensor, nn

import rl_buffer as rb
from actors.crew import CrewOptions
from learner.actor_critic import ActorCritic
from learner.agent import TABLE, Agent, RunOptions, spaces_of
from learner.networks import ActionScale
from learner.normalization import DiscountedReturns
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
    normalize_observations: bool = False
    """Give the networks observations less their running mean, in units of their running deviation."""
    normalize_rewards: bool = False
    """Learn values in units of the running deviation of the discounted return."""
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


def vector_inputs_and_actions(env_id: str) -> tuple[int, int | ActionScale]:
    """Number of inputs, and the number of discrete actions or the scale of continuous ones, of an environment.

    Raises:
        InvalidInput: other spaces than Box observations and Discrete or bounded Box actions.
    """
    observations, actions = spaces_of(env_id)
    if not isinstance(observations, gym.spaces.Box) or not isinstance(actions, gym.spaces.Discrete | gym.spaces.Box):
        raise rb.InvalidInput(
            f"PPO needs Box observations and Discrete or Box actions; {env_id} has {observations} and {actions}"
        )
    is_discrete = isinstance(actions, gym.spaces.Discrete)
    return math.prod(observations.shape), int(actions.n) if is_discrete else ActionScale.of_space(actions)


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
        self.policy = ActorCritic(
            *vector_inputs_and_actions(env_id),
            options.hidden_sizes,
            normalize_observations=options.normalize_observations,
            normalize_rewards=options.normalize_rewards,
        ).to(self.device)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=options.learning_rate, eps=1e-5, fused=True)
        self.parts = {"policy": self.policy, "optimizer": self.optimizer}

    def update(self, rollouts: rb.Rollouts, discounted_returns: Tensor, env_steps: int) -> dict[str, Tensor]:
        """All epochs over one rollout; returns `measures` of the last.

        Args:
            rollouts: N steps of all actors.
            discounted_returns: [N], for the normalisation of rewards.
            env_steps: of the run so far.
        """
        options = self.options
        steps = next(rollouts.get(shuffle=False))
        if not self.updates:
            self.policy.count(steps.observations, discounted_returns.to(self.device))  # or all units would be wrong
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
        if self.updates:
            # Afterwards: the log-probabilities and values of these steps are by the moments that the actors had.
            self.policy.count(steps.observations, discounted_returns.to(self.device))
        self.updates += 1
        self.samples += rollouts.num_transitions
        means = torch.stack(measures).mean(0)
        values = (*means, torch.tensor(rollouts.explained_variance))
        return dict(zip(self.measures, values, strict=True))

    def _step(self, batch: rb.RolloutBatch, clip_range: float) -> Tensor:
        """One gradient step; returns loss, value loss, entropy and KL divergence, [4]."""
        options = self.options
        distribution, values = self.policy(batch.observations)
        actions = batch.actions if self.policy.action_scale is None else batch.actions.flatten(1)
        log_ratios = distribution.log_prob(actions) - batch.log_probs
        policy_loss = clipped_policy_loss(log_ratios, batch.advantages, clip_range)
        in_units = (tensor / self.policy.value_unit for tensor in (values, batch.values, batch.returns))
        errors = value_loss(*in_units, options.value_clip_range)
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
    # Without parameters nobody acts. Had the first actor some, it would make the rollout of a later one as well.
    session.wait_for_writers(session.table.fragments_per_update)
    session.publish()
    reader = session.client.rollouts(TABLE, device=agent.options.device, seed=agent.seed)
    discounted = DiscountedReturns(session.table.gamma)
    for rollouts in session.rollouts(reader):
        measured = agent.update(rollouts, discounted.of(rollouts), session.env_steps)
        session.updated(**measured)
        rollouts.release()  # after the new parameters are published: that is what the actors wait for
