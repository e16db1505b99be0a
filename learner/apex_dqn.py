"""Ape-X DQN (Horgan et al. 2018, "Distributed Prioritized Experience Replay"), the learner.

Reads from top to bottom: options, the table it wants, the loss, the loop. Actors run elsewhere (`actors.replay`);
everything between them and this loop goes through the server: transitions and priorities one way, parameters the other.
"""

import math
from dataclasses import dataclass

import gymnasium as gym
import torch
from torch import Tensor
from torch.nn import functional

import rl_buffer as rb
from learner.agent import TABLE, Agent, RunOptions, spaces_of
from learner.q_network import QNetwork
from learner.session import Session

_CALIBRATION_BATCHES = 16  # of first experience, which set the scale of inputs and values for good


@dataclass
class TableOptions:
    """What is kept, and how often it may be used."""

    capacity: int = 50_000
    """Transitions that the table keeps."""
    n_step: int = 3
    """Reward steps per transition."""
    gamma: float = 0.99
    """Discount factor per step."""
    alpha: float = 0.6
    """Exponent of the priorities; 0 is uniform."""
    samples_per_insert: float = 16.0
    """How often a transition is sampled on average; the rate limiter holds actors and learner to it."""
    min_size: int = 1_000
    """Transitions before the first update."""
    error_buffer: float = 16_384.0
    """How many samples the learner may be ahead of that ratio, or the actors behind it."""


@dataclass
class LearnerOptions(RunOptions):
    """How the network is trained."""

    batch_size: int = 64
    """Transitions per update."""
    beta: float = 0.4
    """Exponent of the importance weights."""
    learning_rate: float = 1e-3
    """Of Adam, at the start."""
    final_learning_rate: float = 1e-5
    """After learning_rate_steps; linear in between, constant from then on."""
    learning_rate_steps: int = 60_000
    """Environment steps over which the learning rate falls."""
    adam_epsilon: float = 1e-4
    """Of Adam."""
    max_grad_norm: float = 40.0
    """Gradients are clipped to this norm."""
    target_period: int = 250
    """Updates between hard copies to the target network."""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """Units of each hidden layer."""
    dueling: bool = False
    """Separate heads for value and advantages."""
    prefetch: int = 4
    """Batches drawn ahead."""


def apex_table(options: TableOptions, spec: rb.TransitionSpec, seed: int) -> rb.ReplayTable:
    """The table that this algorithm learns from."""
    return rb.ReplayTable(
        spec,
        capacity=options.capacity,
        sampler=rb.Prioritized(alpha=options.alpha),
        rate_limiter=rb.SampleToInsertRatio(options.samples_per_insert, options.min_size, options.error_buffer),
        n_step=options.n_step,
        gamma=options.gamma,
        seed=seed,
    )


def double_q_td_errors(online: QNetwork, target: QNetwork, batch: rb.ReplayBatch) -> Tensor:
    """TD errors [B]: R + discount * Q_target(s', argmax_a Q(s', a)) - Q(s, a), where R and discount are of n steps."""
    with torch.no_grad():
        best = online(batch.next_observations).argmax(1, keepdim=True)
        next_values = target(batch.next_observations).gather(1, best).squeeze(1)
        targets = batch.rewards + batch.discounts * next_values
    return targets - online(batch.observations).gather(1, batch.actions.unsqueeze(1)).squeeze(1)


def vector_inputs_and_discrete_actions(env_id: str) -> tuple[int, int]:
    """Numbers of inputs and actions of an environment that this learner is for.

    Raises:
        InvalidInput: other observations than a Box, or other actions than Discrete from 0.
    """
    observations, actions = spaces_of(env_id)
    if not isinstance(observations, gym.spaces.Box) or not isinstance(actions, gym.spaces.Discrete) or actions.start:
        raise rb.InvalidInput(
            f"Ape-X DQN needs Box observations and Discrete actions that start at 0; {env_id} has {observations} and "
            f"{actions}"
        )
    return math.prod(observations.shape), int(actions.n)


class ApexDQN(Agent):
    """Online and target network."""

    name = "apex_dqn"
    title = "Ape-X DQN"
    measures = ("loss", "mean_q")
    options: LearnerOptions

    def __init__(self, options: LearnerOptions, env_id: str, seed: int) -> None:
        """Random networks. The first optimizer of a process loads torch's compiler, some seconds long."""
        super().__init__(options, env_id, seed)
        num_inputs, num_actions = vector_inputs_and_discrete_actions(env_id)
        sizes = (num_inputs, num_actions, options.hidden_sizes, options.dueling)
        self.online = self.policy = QNetwork(*sizes).to(self.device)
        self.target = QNetwork(*sizes).to(self.device).requires_grad_(False)
        self.target.load_state_dict(self.online.state_dict())
        self.optimizer = torch.optim.Adam(
            self.online.parameters(), lr=options.learning_rate, eps=options.adam_epsilon, fused=True
        )
        self.parts = {"online": self.online, "target": self.target, "optimizer": self.optimizer}

    def update(self, batch: rb.ReplayBatch, env_steps: int) -> tuple[Tensor, Tensor]:
        """One gradient step; returns the TD errors [B] and the loss, still on the device."""
        progress = min(1.0, env_steps / self.options.learning_rate_steps)
        first, last = self.options.learning_rate, self.options.final_learning_rate
        for group in self.optimizer.param_groups:
            group["lr"] = first + progress * (last - first)
        td_errors = double_q_td_errors(self.online, self.target, batch)
        losses = functional.huber_loss(td_errors, torch.zeros_like(td_errors), reduction="none")
        loss = (batch.weights * losses).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.online.parameters(), self.options.max_grad_norm)
        self.optimizer.step()
        self.updates += 1
        self.samples += len(td_errors)
        if self.updates % self.options.target_period == 0:
            self.target.load_state_dict(self.online.state_dict())
        return td_errors.detach(), loss.detach()


class Calibration:
    """Gathers first experience, made by random actions, and sets the networks' scales by it."""

    def __init__(self, agent: ApexDQN, gamma: float) -> None:
        self._agent = agent
        self._gamma = gamma
        self._observations: list[Tensor] = []
        self._rewards = 0.0  # discounted sums ...
        self._horizons = 0.0  # ... and what they would be if every step gave 1

    def take(self, batch: rb.ReplayBatch) -> bool:
        """Add a batch; True once it was the last and the networks are calibrated."""
        self._observations.append(batch.observations.clone())
        self._rewards += float(batch.rewards.sum())
        self._horizons += sum(
            float((batch.n_steps > k).sum()) * self._gamma**k for k in range(int(batch.n_steps.max()))
        )
        if len(self._observations) < _CALIBRATION_BATCHES:
            return False
        mean_reward = self._rewards / self._horizons
        self._agent.online.calibrate(torch.cat(self._observations), mean_reward, self._gamma)
        self._agent.target.load_state_dict(self._agent.online.state_dict())
        return True


def train(agent: ApexDQN, session: Session) -> None:
    """Calibrate on the first batches, then one update and new priorities per batch, until the run is over."""
    options, table = agent.options, session.table
    sampler = session.client.sampler(
        TABLE, options.batch_size, beta=options.beta, prefetch=options.prefetch, device=options.device
    )
    calibration = None if session.resumed else Calibration(agent, table.gamma)
    if calibration is None:
        session.publish()
    for batch in session.batches(sampler):
        if calibration is not None:
            if calibration.take(batch):
                calibration = None
                session.publish()
            continue
        td_errors, loss = agent.update(batch, session.env_steps)
        sampler.update_priorities(batch, td_errors)
        session.updated(loss=loss, mean_q=(batch.rewards - td_errors).mean())
