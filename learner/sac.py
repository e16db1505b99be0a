"""SAC: Soft Actor-Critic with automatic temperature (Haarnoja et al. 2018b, arXiv:1812.05905), the learner.

Reads from top to bottom: options, the table it wants, the networks, the actors' policy, the losses, the loop. There is
one update per environment step, to the step: the table's rate limiter keeps learner and actors together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import rl_buffer as rb
from actors.crew import MakePolicy
from actors.replay import Decision
from learner.agent import TABLE, Agent, RunOptions, spaces_of
from learner.networks import ActionScale, hidden_layers, sizes_of
from learner.session import Session

_LOG_STD_RANGE = (-5.0, 2.0)  # narrow enough that neither the density nor its gradient runs off


@dataclass
class TableOptions:
    """What is kept, and how learner and actors are held together."""

    capacity: int = 100_000
    """Transitions that the table keeps."""
    n_step: int = 1
    """Reward steps per transition."""
    gamma: float = 0.99
    """Discount factor per step."""
    min_size: int = 1_000
    """Transitions, of random actions, before the first update; from then on there is one update for each."""
    batch_size: int = 256
    """Transitions per update."""
    priority_exponent: float = 0.0
    """Exponent of the priorities |TD|; 0 samples uniformly."""
    lead: int = 8
    """Updates that the learner may be ahead of the actors, at least 2; the actors are never ahead of the learner."""


@dataclass
class LearnerOptions(RunOptions):
    """How the networks are trained."""

    max_env_steps: int = 100_000
    """Environment steps of all actors after which the run ends."""
    publish_period: int = 4
    """Updates between parameter versions for the actors."""
    eval_period: int = 1_000
    """Environment steps between greedy evaluations."""
    learning_rate: float = 3e-4
    """Of Adam, for actor, critics and temperature."""
    tau: float = 0.005
    """Share of the critics that their targets take over at each update."""
    initial_temperature: float = 1.0
    """Weight of the entropy at the start."""
    target_entropy: float | None = None
    """Entropy, in nats of actions scaled to [-1, 1], that the temperature aims at; by default minus their number."""
    hidden_sizes: tuple[int, ...] = (256, 256)
    """Units of each hidden layer, of actor and critics."""
    beta: float = 0.4
    """Exponent of the importance weights, where there are priorities."""


def sac_table(options: TableOptions, spec: rb.TransitionSpec, seed: int) -> rb.ReplayTable:
    """The table that this algorithm learns from, and the rate limiter that makes it one update per step.

    Once `min_size` transitions are there, u updates hold their number n to

        min_size + u - lead  <=  n  <=  min_size + u

    so that a learner that stops after `max_env_steps - min_size` updates is left with exactly `max_env_steps`
    transitions: an update draws `batch_size` samples, and so many an insert earns. What actors have stepped beyond
    (a writer holds two chunks of rows) waits, and never enters the table.
    """
    if options.lead < 2:
        raise rb.InvalidInput(
            f"--lead must be at least 2, or learner and actors could wait for each other; got {options.lead}"
        )
    prioritized = options.priority_exponent > 0
    return rb.ReplayTable(
        spec,
        capacity=options.capacity,
        sampler=rb.Prioritized(alpha=options.priority_exponent) if prioritized else rb.Uniform(),
        rate_limiter=rb.SampleToInsertRatio(
            samples_per_insert=options.batch_size,
            min_size_to_sample=options.min_size,
            error_buffer=(
                float((options.min_size - options.lead) * options.batch_size),
                float(options.min_size * options.batch_size),
            ),
        ),
        n_step=options.n_step,
        gamma=options.gamma,
        seed=seed,
    )


def num_updates_until(num_inserts: int, table: rb.ReplayTable, samples_before: int) -> int:
    """Updates after which the table's limiter has let exactly `num_inserts` transitions in (see `sac_table`)."""
    limiter = table.rate_limiter
    ratio, max_diff = limiter.samples_per_insert, limiter.bounds[1]
    return math.ceil((num_inserts * ratio - max_diff - samples_before) / ratio)


# ---- networks --------------------------------------------------------------------------------------------------


def vector_inputs_and_bounded_actions(env_id: str) -> tuple[int, ActionScale]:
    """Number of inputs and the actions of an environment that this learner is for.

    Raises:
        InvalidInput: other spaces than Boxes, or actions without bounds.
    """
    observations, actions = spaces_of(env_id)
    if not isinstance(observations, gym.spaces.Box) or not isinstance(actions, gym.spaces.Box):
        raise rb.InvalidInput(f"SAC needs Box observations and Box actions; {env_id} has {observations} and {actions}")
    return math.prod(observations.shape), ActionScale.of_space(actions)


class GaussianActor(nn.Module):
    """pi(a | s): a = tanh(u), u ~ Normal(mean(s), std(s)), each dimension for itself (appendix C).

    a is in [-1, 1]; `scale` makes of it what the environment takes.
    """

    def __init__(self, num_inputs: int, hidden_sizes: Sequence[int], scale: ActionScale) -> None:
        super().__init__()
        self.scale = scale
        self.trunk = hidden_layers(num_inputs, hidden_sizes)
        self.head = nn.Linear(hidden_sizes[-1], 2 * scale.num_actions)

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Tensor]) -> "GaussianActor":
        """The network that these parameters belong to."""
        num_inputs, *hidden_sizes = sizes_of("trunk", parameters)
        network = cls(num_inputs, hidden_sizes, ActionScale.from_parameters(parameters, "scale"))
        network.load_state_dict(dict(parameters))
        return network

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the deviation, [B, A] each, of observations [B, *obs_shape]."""
        mean, log_std = self.head(self.trunk(observations.flatten(1).float())).chunk(2, dim=1)
        low, high = _LOG_STD_RANGE
        return mean, low + 0.5 * (high - low) * (torch.tanh(log_std) + 1)

    def sample(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [B, A] in [-1, 1], through which gradients flow, and log pi [B] of them."""
        mean, log_std = self(observations)
        noise = torch.randn_like(mean)
        unsquashed = mean + log_std.exp() * noise
        return torch.tanh(unsquashed), squashed_log_probs(noise, log_std, unsquashed)

    def greedy(self, observations: Tensor) -> Tensor:
        """The environment's actions [E, *action_shape] at tanh(mean)."""
        mean, _ = self(observations)
        return self.scale(torch.tanh(mean))


def squashed_log_probs(noise: Tensor, log_std: Tensor, unsquashed: Tensor) -> Tensor:
    """Log-probabilities [B] of a = tanh(u), u = mean + std * noise, all [B, A] (appendix C).

        log pi(a) = sum_i  log Normal(u_i)  -  log(1 - tanh(u_i)^2)

    where log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)) holds its precision where tanh(u) rounds to 1.
    """
    normal = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    squashing = 2 * (math.log(2) - unsquashed - functional.softplus(-2 * unsquashed))
    return (normal - squashing).sum(1)


class TwinCritics(nn.Module):
    """Q_1(s, a) and Q_2(s, a), of which the smaller is believed (Fujimoto et al. 2018)."""

    def __init__(self, num_inputs: int, num_actions: int, hidden_sizes: Sequence[int]) -> None:
        super().__init__()
        self.critics = nn.ModuleList(
            nn.Sequential(hidden_layers(num_inputs + num_actions, hidden_sizes), nn.Linear(hidden_sizes[-1], 1))
            for _ in range(2)
        )

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """[2, B] of observations [B, *obs_shape] and actions [B, A] in [-1, 1]."""
        inputs = torch.cat((observations.flatten(1).float(), actions), dim=1)
        return torch.cat([critic(inputs) for critic in self.critics], dim=1).T


class Temperature(nn.Module):
    """alpha = exp(log_alpha), the weight of the entropy."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.tensor(math.log(initial)))

    def forward(self) -> Tensor:
        """alpha, a scalar."""
        return self.log_alpha.exp()


# ---- acting ----------------------------------------------------------------------------------------------------


class SamplingPolicy:
    """What actors follow: actions drawn from the learner's policy, and uniformly before its first parameters."""

    def __init__(self, envs: VectorEnv, seed: int) -> None:
        self._network: GaussianActor | None = None
        self._space = envs.single_action_space
        self._rng = np.random.default_rng(seed)

    def load(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take newer parameters."""
        if self._network is None:
            self._network = GaussianActor.from_parameters(state_dict)
        else:
            self._network.load_state_dict(dict(state_dict))

    @torch.inference_mode()
    def decide(self, observations: NDArray[Any]) -> Decision:
        """Actions [E, *action_shape] of observations [E, *obs_shape]."""
        space = self._space
        if self._network is None:
            return Decision(
                self._rng.uniform(space.low, space.high, (len(observations), *space.shape)).astype(space.dtype)
            )
        mean, log_std = self._network(torch.from_numpy(np.asarray(observations)))
        noise = torch.from_numpy(self._rng.standard_normal(mean.shape, np.float32))
        actions = self._network.scale(torch.tanh(mean + log_std.exp() * noise))
        return Decision(actions.numpy().astype(space.dtype, copy=False))


def sampling_policies(num_actors: int, envs_per_actor: int) -> MakePolicy:
    """The crew's policies, which differ in nothing but their seeds."""
    return lambda envs, number, seed: SamplingPolicy(envs, seed)


# ---- learning --------------------------------------------------------------------------------------------------


def soft_targets(batch: rb.ReplayBatch, next_values: Tensor, next_log_probs: Tensor, alpha: Tensor) -> Tensor:
    """R + discount * (min_j Q'_j(s', a') - alpha log pi(a' | s')), [B], a' ~ pi(s') (equations 3 and 5).

    R and discount are of n steps. discount is 0 where the episode terminated, and only there: a truncated one is
    bootstrapped from its true final observation.

    Args:
        batch: of B transitions.
        next_values: [2, B], of the target critics.
        next_log_probs: [B].
        alpha: scalar.
    """
    return batch.rewards + batch.discounts * (next_values.amin(0) - alpha * next_log_probs)


@torch.no_grad()
def polyak(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Polyak averaging: target <- (1 - tau) * target + tau * online."""
    for mean, newest in zip(target.parameters(), online.parameters(), strict=True):
        mean.lerp_(newest, tau)


class SAC(Agent):
    """Actor, twin critics, temperature."""

    name = "sac"
    title = "SAC"
    measures = ("loss", "mean_q", "actor_loss", "temperature", "entropy")
    options: LearnerOptions

    def __init__(self, options: LearnerOptions, env_id: str, seed: int) -> None:
        """Random networks. The first optimizer of a process loads torch's compiler, some seconds long."""
        super().__init__(options, env_id, seed)
        num_inputs, scale = vector_inputs_and_bounded_actions(env_id)
        num_actions = scale.num_actions
        self.target_entropy = -num_actions if options.target_entropy is None else options.target_entropy
        self.policy = GaussianActor(num_inputs, options.hidden_sizes, scale).to(self.device)
        self.critics = TwinCritics(num_inputs, num_actions, options.hidden_sizes).to(self.device)
        self.targets = TwinCritics(num_inputs, num_actions, options.hidden_sizes).to(self.device).requires_grad_(False)
        self.targets.load_state_dict(self.critics.state_dict())
        self.temperature = Temperature(options.initial_temperature).to(self.device)
        learning = {"policy": self.policy, "critics": self.critics, "temperature": self.temperature}
        self.optimizers = {
            name: torch.optim.Adam(network.parameters(), lr=options.learning_rate, fused=True)
            for name, network in learning.items()
        }
        optimizers = {f"{name}_optimizer": optimizer for name, optimizer in self.optimizers.items()}
        self.parts = learning | {"targets": self.targets} | optimizers

    def update(self, batch: rb.ReplayBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """One gradient step of critics, actor and temperature; returns |TD| [B] and `measures`, still on the device."""
        observations, alpha = batch.observations, self.temperature().detach()

        with torch.no_grad():
            next_actions, next_log_probs = self.policy.sample(batch.next_observations)
            next_values = self.targets(batch.next_observations, next_actions)
            targets = soft_targets(batch, next_values, next_log_probs, alpha)
        td_errors = targets - self.critics(observations, self.policy.scale.inverse(batch.actions))  # [2, B]
        losses = 0.5 * (td_errors**2).sum(0)
        critic_loss = (losses if batch.weights is None else batch.weights * losses).mean()
        self._step("critics", self.critics, critic_loss)

        actions, log_probs = self.policy.sample(observations)
        values = self.critics(observations, actions).amin(0)
        actor_loss = (alpha * log_probs - values).mean()  # equation 9
        self._step("policy", self.policy, actor_loss)

        entropy = -log_probs.detach().mean()
        temperature_loss = self.temperature.log_alpha * (entropy - self.target_entropy)  # equation 18, in log alpha
        self._step("temperature", self.temperature, temperature_loss)

        polyak(self.targets, self.critics, self.options.tau)
        self.updates += 1
        self.samples += len(log_probs)
        measures = (critic_loss, values.mean(), actor_loss, alpha, entropy)
        measured = {name: value.detach() for name, value in zip(self.measures, measures, strict=True)}
        return td_errors.detach().abs().mean(0), measured

    def _step(self, name: str, network: nn.Module, loss: Tensor) -> None:
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        # Only these: the actor's loss goes through the critics, whose gradients nobody wants.
        loss.backward(inputs=list(network.parameters()))
        optimizer.step()


def train(agent: SAC, session: Session) -> None:
    """One update per environment step, until the last transition is in the table and its update is made."""
    table, options = session.table, agent.options
    num_updates = num_updates_until(session.inserts_at_end, table, session.samples_before)
    if num_updates < 1:
        raise rb.InvalidInput(
            f"--max-env-steps {options.max_env_steps} leaves no step to learn from: {session.env_steps} are made, and "
            f"the next {table.rate_limiter.min_size_to_sample} only fill the table"
        )
    # One batch per request: each batch drawn ahead would let the actors one transition beyond the end.
    batch_size = int(table.rate_limiter.samples_per_insert)
    sampler = session.client.sampler(TABLE, batch_size, beta=options.beta, prefetch=0, device=options.device)
    if session.resumed:
        session.publish()
    for batch in session.batches(sampler, num_updates):
        td_errors, measured = agent.update(batch)
        if batch.indices is not None:
            sampler.update_priorities(batch, td_errors)
        session.updated(**measured)
    session.wait_for_last_step()
