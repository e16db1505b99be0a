"""A crew of actors: starts them, watches them, and starts a new one where one ended."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym

import rl_buffer as rb
from actors.environments import ActorEnvs, make_envs
from actors.replay import run_replay_actor
from actors.rollout import run_rollout_actor
from rl_buffer.launch import ProcessGroup

_PRELOAD = ("__main__", "torch", "gymnasium", "rl_buffer.client", "actors.crew")
TABLE = "replay"  # the one table of a run, whatever is in it
_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 10.0
_HEALTHY_S = 30.0  # an actor that lived this long starts over with the first backoff

# (the actor's environments, its number in the run, seed) -> policy
MakePolicy = Callable[[ActorEnvs, int, int], Any]


class TooManyFailures(RuntimeError):
    """An actor fails again and again; the message holds its last traceback."""


@dataclass
class CrewOptions:
    """How many actors there are, and how they write."""

    num_actors: int = 2
    """Actor processes."""
    envs_per_actor: int = 4
    """Environments that each actor steps as one batch."""
    chunk_size: int = 32
    """Transitions per message to the server."""
    refresh_steps: int = 25
    """Vector steps between an actor's looks for newer parameters."""
    max_failures: int = 5
    """Starts of one actor that may fail in a row before the run ends."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise rb.InvalidInput(f"--{name.replace('_', '-')} must be at least 1, got {value}")


@dataclass(frozen=True)
class ActorArguments:
    """What an actor of either kind is told."""

    address: str
    make_envs: Callable[[], Any]
    make_policy: Callable[[ActorEnvs], Any]
    name: str
    number: int
    seed: int
    timeout_s: float
    options: CrewOptions


def replay_actor(told: ActorArguments) -> None:
    """Write transitions to the table of the run."""
    run_replay_actor(
        told.address,
        told.make_envs,
        told.make_policy,
        name=told.name,
        table=TABLE,
        seed=told.seed,
        chunk_size=told.options.chunk_size,
        refresh_steps=told.options.refresh_steps,
        timeout_s=told.timeout_s,
    )


def rollout_actor(told: ActorArguments) -> None:
    """Write rollouts to the table of the run."""
    run_rollout_actor(
        told.address,
        told.make_envs,
        told.make_policy,
        name=told.name,
        number=told.number,
        table=TABLE,
        seed=told.seed,
        timeout_s=told.timeout_s,
    )


@dataclass
class _Post:
    """One place in the crew, whoever holds it."""

    number: int
    failures: int = 0
    started_at_s: float = 0.0
    start_again_at_s: float | None = None


@dataclass
class Crew:
    """Actors `first` .. `first + num_actors - 1` of a run. A context manager; leaving it ends every actor."""

    address: str
    env_id: str
    options: CrewOptions
    make_policy: MakePolicy
    run_actor: Callable[[ActorArguments], None] = replay_actor
    seed: int = 0
    first: int = 0
    timeout_s: float = 60.0
    group: ProcessGroup = field(init=False)

    def __post_init__(self) -> None:
        preload = (*_PRELOAD, _environment_module(self.env_id), self.make_policy.__module__)
        self.group = ProcessGroup(preload)
        numbers = range(self.first, self.first + self.options.num_actors)
        self._posts = {f"actor-{number}": _Post(number) for number in numbers}

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by name."""
        return self.group.pids

    @property
    def is_at_work(self) -> bool:
        """Whether anybody runs or is about to start."""
        return bool(self.group.pids) or any(post.start_again_at_s is not None for post in self._posts.values())

    def start(self) -> None:
        """Start everybody."""
        for name in self._posts:
            self._start(name)

    def tend(self) -> Sequence[str]:
        """Look after the crew; call it about once a second. Returns what happened, a line each.

        Raises:
            TooManyFailures: one actor failed `max_failures` times in a row.
        """
        news = []
        now_s = time.monotonic()
        for ended in self.group.reap():
            post = self._posts[ended.name]
            if ended.exit_code == 0:
                news.append(f"{ended.name} ended: the server is gone")
                continue
            post.failures = 1 if now_s - post.started_at_s > _HEALTHY_S else post.failures + 1
            if post.failures >= self.options.max_failures:
                raise TooManyFailures(f"{ended}\nThis was failure {post.failures} in a row; the run ends.")
            backoff_s = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** (post.failures - 1))
            post.start_again_at_s = now_s + backoff_s
            news.append(f"{ended}; a new one starts in {backoff_s:.1f} s")
        for name, post in self._posts.items():
            if post.start_again_at_s is not None and now_s >= post.start_again_at_s:
                news.append(f"{name} started again as pid {self._start(name)}")
        return news

    def _start(self, name: str) -> int:
        post, options = self._posts[name], self.options
        post.started_at_s, post.start_again_at_s = time.monotonic(), None
        # A restarted actor gets other seeds, or it would play the same episodes again.
        seed = self.seed * 1_000_003 + post.number * 1_009 + post.failures * 101
        # Names of their own: the lambdas are sent to the child, and the crew cannot be.
        env_id, make_policy, run_actor, number = self.env_id, self.make_policy, self.run_actor, post.number
        told = ActorArguments(
            address=self.address,
            make_envs=lambda: make_envs(env_id, options.envs_per_actor),
            make_policy=lambda envs: make_policy(envs, number, seed),
            name=name,
            number=number,
            seed=seed,
            timeout_s=self.timeout_s,
            options=options,
        )
        return self.group.start(name, lambda: run_actor(told))

    def __enter__(self) -> "Crew":
        self.group.launch()  # its imports take seconds, in which the trainer may do something else
        return self

    def __exit__(self, *exception: object) -> None:
        self.group.stop()


def _environment_module(env_id: str) -> str:
    """Where the environment is defined. Importing that is most of making one: 10 ms for CartPole, 100 for Box2D."""
    module, _, name = env_id.rpartition(":")
    if module:  # gym.make imports it first, gym.spec does not
        return module
    entry_point = gym.spec(name).entry_point
    return entry_point.partition(":")[0] if isinstance(entry_point, str) else getattr(entry_point, "__module__", "")
