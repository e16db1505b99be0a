"""Ape-X DQN (Horgan et al. 2018, "Distributed Prioritized Experience Replay"), the learner.

Reads from top to bottom: options, the table it wants, the loss, the loop. Actors run elsewhere (`actors.replay`);
everything between them and this loop goes through the server: transitions and priorities one way, parameters the other.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor
from torch.nn import functional

import rl_buffer as rb
from learner.display import Display
from learner.evaluation import CONFIRMATION_SEED, FINAL_SEED, PROGRESS_SEED, evaluate
from learner.q_network import QNetwork
from learner.rates import Rates
from learner.run_directory import RunDirectory

TABLE = "replay"
FINAL_EPISODES = 100
_CONFIRMATION_FACTOR = 9
_CALIBRATION_BATCHES = 16  # of first experience, which set the scale of inputs and values for good
_TICK_S = 0.25  # between looks at the server's figures, the crew and the clock
_SAMPLE_TIMEOUT_S = 1.0  # a wait is cut into pieces, so that the crew is tended while it lasts


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
class LearnerOptions:
    """How the network is trained."""

    max_env_steps: int = 150_000
    """Environment steps of all actors after which the run ends."""
    stop: bool = True
    """End as soon as an evaluation reaches the environment's own reward threshold. --no-stop goes on."""
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
    publish_period: int = 20
    """Updates between parameter versions for the actors."""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """Units of each hidden layer."""
    dueling: bool = False
    """Separate heads for value and advantages."""
    prefetch: int = 4
    """Batches drawn ahead."""
    eval_period: int = 2_500
    """Environment steps between greedy evaluations."""
    eval_episodes: int = 10
    """Episodes of each; one that reaches the threshold is confirmed on nine times as many."""
    device: str = "cpu"
    """Where the network is trained: cpu, cuda, cuda:1, ..."""
    num_threads: int = 1
    """Torch threads of the learner."""


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
    env = gym.make(env_id)
    observations, actions = env.observation_space, env.action_space
    env.close()
    if not isinstance(observations, gym.spaces.Box) or not isinstance(actions, gym.spaces.Discrete) or actions.start:
        raise rb.InvalidInput(
            f"Ape-X DQN needs Box observations and Discrete actions that start at 0; {env_id} has {observations} and "
            f"{actions}"
        )
    return torch.Size(observations.shape).numel(), int(actions.n)


class ApexDQN:
    """Networks, optimizer and counters: all that `--resume` brings back."""

    def __init__(self, options: LearnerOptions, env_id: str, seed: int) -> None:
        """Random networks. The first optimizer of a process loads torch's compiler, some seconds long."""
        torch.set_num_threads(options.num_threads)
        torch.manual_seed(seed)
        num_inputs, num_actions = vector_inputs_and_discrete_actions(env_id)
        sizes = (num_inputs, num_actions, options.hidden_sizes, options.dueling)
        self.options, self.env_id, self.seed = options, env_id, seed
        self.device = torch.device(options.device)
        self.online = QNetwork(*sizes).to(self.device)
        self.target = QNetwork(*sizes).to(self.device).requires_grad_(False)
        self.target.load_state_dict(self.online.state_dict())
        self.optimizer = torch.optim.Adam(
            self.online.parameters(), lr=options.learning_rate, eps=options.adam_epsilon, fused=True
        )
        self.updates = 0
        self.samples = 0

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

    @torch.inference_mode()
    def act(self, observations: Tensor) -> Tensor:
        """Greedy actions [E], on the CPU."""
        return self.online(observations.to(self.device)).argmax(1).cpu()

    def state(self) -> dict[str, Tensor]:
        """Everything but the counters, by flat names."""
        tensors = {f"online/{key}": tensor for key, tensor in self.online.state_dict().items()}
        tensors |= {f"target/{key}": tensor for key, tensor in self.target.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": value for key, value in moments.items()}
        return tensors | {"random": torch.get_rng_state()}

    def load(self, tensors: dict[str, Tensor], updates: int, samples: int) -> None:
        """Invert `state`."""

        def part(name: str) -> dict[str, Tensor]:
            return {key.removeprefix(name): value for key, value in tensors.items() if key.startswith(name)}

        self.online.load_state_dict(part("online/"))
        self.target.load_state_dict(part("target/"))
        optimizer = self.optimizer.state_dict()
        for key, value in part("optimizer/").items():
            index, name = key.split("/")
            optimizer["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(optimizer)
        torch.set_rng_state(tensors["random"])
        self.updates, self.samples = updates, samples


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


def train(
    agent: ApexDQN,
    address: str,
    run: RunDirectory,
    display: Display,
    *,
    resume: bool = False,
    tend_crew: Callable[[], Sequence[str]] = lambda: (),
    num_actors: int | None = None,
) -> dict[str, Any]:
    """Learn from the server at `address` until the run is over; return the summary, which is also in summary.json.

    Args:
        agent: what learns.
        address: of a server with a table called "replay".
        run: where files go.
        display: shows progress.
        resume: continue from the run directory's learner state.
        tend_crew: called a few times a second; returns news of the actors.
        num_actors: for the summary; None counts the attached writers.
    """
    options, env_id, seed = agent.options, agent.env_id, agent.seed
    threshold = gym.spec(env_id).reward_threshold
    display.say([f"waiting for a server at {address}"])
    client = rb.connect(address, timeout_s=60.0, name="learner")
    table = client.tables[TABLE]
    # What the actors did before this server and this learner started counts on.
    steps_before, inserts_before, wall_s_before = 0, client.info()["tables"][TABLE]["inserts"], 0.0
    if resume:
        tensors, counters = run.load_learner()
        agent.load(tensors, int(counters["updates"]), int(counters["samples"]))
        steps_before, wall_s_before = int(counters["env_steps"]), counters["wall_s"]
    started_s = time.monotonic() - wall_s_before
    rates = Rates()
    eval_return, best_eval_return, solved, stopped_by = float("nan"), float("-inf"), False, "max_env_steps"
    loss, mean_q = torch.tensor(float("nan")), torch.tensor(float("nan"))
    next_eval = options.eval_period * (1 + steps_before // options.eval_period)
    env_steps, row = steps_before, {}
    version = 0

    def look() -> None:
        """Fetch the server's figures into `row`, show them, look after the crew."""
        nonlocal env_steps, row
        info, stats = client.info(), client.stats()
        figures = info["tables"][TABLE]
        env_steps = steps_before + figures["inserts"] - inserts_before
        actors = [c | {"version_lag": version - c["parameter_version"]} for c in info["clients"] if c["writers"]]
        row = {
            "wall_s": time.monotonic() - started_s,
            "env_steps": env_steps,
            "updates": agent.updates,
            "inserts": figures["inserts"],
            "samples": agent.samples,
            "samples_per_insert": figures["samples"] / max(1, figures["inserts"]),
            "buffer_fill": figures["size"] / figures["capacity"],
            "mean_return": stats.get("train/rewards_mean", float("nan")),
            "eval_return": eval_return,
            "loss": float(loss),
            "mean_q": float(mean_q),
            "version_lag": max((actor["version_lag"] for actor in actors), default=0),
            "stale_updates": figures["stale_updates"],
            "overtaken_rows": figures["overtaken_rows"],
            "num_actors": len(actors),
        }
        row |= rates.update(row)
        display.update(row, actors, figures["waits"])
        display.say(tend_crew())

    def save() -> None:
        run.save_policy(agent.online.state_dict())
        counters = {key: row[key] for key in ("env_steps", "updates", "samples", "wall_s")}
        run.save_learner(agent.state(), counters)

    def evaluate_now() -> bool:
        """Evaluate greedily; True if the threshold is reached, and confirmed on more episodes."""
        nonlocal eval_return, best_eval_return
        returns = evaluate(agent.act, env_id, range(PROGRESS_SEED, PROGRESS_SEED + options.eval_episodes))
        reached = threshold is not None and returns.mean() >= threshold
        if reached:
            # The best of many noisy evaluations flatters: believe it only if other seeds put the mean two standard
            # errors above the threshold.
            num_seeds = _CONFIRMATION_FACTOR * options.eval_episodes
            returns = evaluate(agent.act, env_id, range(CONFIRMATION_SEED, CONFIRMATION_SEED + num_seeds))
            reached = returns.mean() - 2 * returns.std() / num_seeds**0.5 >= threshold
        eval_return = float(returns.mean())
        best_eval_return = max(best_eval_return, eval_return)
        look()
        run.append_metrics(row)
        save()
        display.say([f"{env_steps:,} env steps: greedy return {eval_return:.1f} over {len(returns)} episodes"])
        return reached

    try:
        display.say([f"waiting for {table.rate_limiter.min_size_to_sample:,} transitions"])
        sampler = client.sampler(
            TABLE, options.batch_size, beta=options.beta, prefetch=options.prefetch, device=options.device
        )
        calibration = None if resume else Calibration(agent, table.gamma)
        if calibration is None:
            version = client.publish_parameters(agent.online.state_dict())
        look_at_s = time.monotonic()
        while env_steps < options.max_env_steps:
            if time.monotonic() >= look_at_s:
                look()
                look_at_s = time.monotonic() + _TICK_S
            try:
                batch = sampler.sample(timeout_s=_SAMPLE_TIMEOUT_S)
            except rb.DeadlineExceeded:
                continue
            if calibration is not None:
                if calibration.take(batch):
                    calibration = None
                    version = client.publish_parameters(agent.online.state_dict())
                continue
            td_errors, loss = agent.update(batch, env_steps)
            sampler.update_priorities(batch, td_errors)
            mean_q = (batch.rewards - td_errors).mean()
            if agent.updates % options.publish_period == 0:
                version = client.publish_parameters(agent.online.state_dict())
            if env_steps >= next_eval:
                next_eval += options.eval_period
                if evaluate_now() and options.stop:
                    solved, stopped_by = True, "reward threshold"
                    break
    except KeyboardInterrupt:
        stopped_by = "interrupted"
    look()
    save()
    final_returns = []
    if stopped_by != "interrupted":
        display.say([f"evaluating the final policy on {FINAL_EPISODES} episodes"])
        seeds = range(FINAL_SEED, FINAL_SEED + FINAL_EPISODES)
        final_returns = evaluate(agent.act, env_id, seeds).tolist()
        eval_return = float(sum(final_returns) / len(final_returns))
    summary = {
        "algo": "apex_dqn",
        "env": env_id,
        "seed": seed,
        "num_actors": int(row["num_actors"] if num_actors is None else num_actors),
        "env_steps": int(row["env_steps"]),
        "updates": agent.updates,
        "inserts": int(row["inserts"]),
        "samples": agent.samples,
        "wall_s": round(row["wall_s"], 2),
        "mean_return": row["mean_return"],
        "eval_return": eval_return,
        "eval_episodes": len(final_returns),
        "best_progress_return": best_eval_return,
        "solved": solved,
        "stopped_by": stopped_by,
        "stale_updates": int(row["stale_updates"]),
        "overtaken_rows": int(row["overtaken_rows"]),
    }
    run.save_summary(summary)
    run.draw_curve(f"Ape-X DQN, {env_id}, seed {seed}", threshold)
    client.close()
    return summary


def describe(summary: dict[str, Any]) -> str:
    """One line about a finished run."""
    end = f"{summary['env_steps']:,} env steps, {summary['updates']:,} updates, {summary['wall_s']:.0f} s"
    if summary["stopped_by"] == "interrupted":
        return f"interrupted after {end}; --resume goes on"
    return f"{summary['stopped_by']} reached after {end}: greedy return {summary['eval_return']:.1f}"
