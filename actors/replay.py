"""One actor of off-policy training: step environments, write transitions, follow the learner's parameters."""

import contextlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

import rl_buffer as rb
from actors.environments import ActorEnvs


@dataclass(frozen=True, slots=True)
class Decision:
    """What a policy decided for E observations, and what it knows for initial priorities."""

    actions: NDArray[Any]  # [E, *action_shape]
    q_taken: NDArray[np.float32] | None = None  # [E] Q(obs, action)
    state_values: NDArray[np.float32] | None = None  # [E] V(obs)


class Policy(Protocol):
    """What an actor needs of a policy.

    One whose decisions have `state_values` may have `values` as well, `values(observations) -> [E]`, V(obs) for
    [E, *obs_shape]: without it the last steps of truncated episodes get the table's default priority, where the
    environments do not show the policy their final observations (all modes but next_step).
    """

    def load(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Take newer parameters."""

    def decide(self, observations: NDArray[Any]) -> Decision:
        """Choose actions for [E, *obs_shape]."""


def run_replay_actor(
    address: str,
    make_envs: Callable[[], Any],
    make_policy: Callable[[ActorEnvs], Policy],
    *,
    name: str,
    table: str = "replay",
    seed: int | None = None,
    autoreset: Any = None,
    chunk_size: int = 32,
    refresh_steps: int = 25,
    timeout_s: float = 60.0,
) -> None:
    """Write transitions until the server ends. Before the learner publishes, the policy acts without parameters.

    Args:
        address: of the server.
        make_envs: the actor's own environments of any kind (`ActorEnvs`); a lambda is fine.
        make_policy: the actor's policy for these environments; it must be able to act before its first `load`.
        name: shown by the trainer and in `client.info()`.
        table: to write to.
        seed: of the environments; None leaves it to them, as EnvPool wants it.
        autoreset: "next_step", "same_step" or "disabled", where that is not what `envs.metadata` says.
        chunk_size: transitions per commit.
        refresh_steps: vector steps between looks for newer parameters.
        timeout_s: deadline of each wait: for the server, and for a table that takes no rows.
    """
    torch.set_num_threads(1)
    client = rb.connect(address, timeout_s=timeout_s, name=name)
    with ActorEnvs(make_envs(), autoreset) as envs, contextlib.suppress(rb.ServerLost):  # then the run is over
        writer = client.writer(table, envs=envs, chunk_size=chunk_size)  # first: it refuses those that do not fit
        policy = make_policy(envs)
        envs.reset(seed)
        values, version = getattr(policy, "values", None), 0
        for step_number in itertools.count():
            if step_number % refresh_steps == 0:
                version, parameters = client.parameters(newer_than=version)
                if parameters is not None:
                    policy.load(parameters)
            decision = policy.decide(envs.observations)
            step = envs.step(decision.actions)
            knows_values = values is not None and decision.state_values is not None
            writer.add(
                step.observations,
                decision.actions,
                step.rewards,
                step.ended,
                step.next_observations,
                step.truncated,
                terminated=step.terminated,
                q_taken=decision.q_taken,
                state_value=decision.state_values,
                infos=step.infos,
                final_value=envs.final_values(step, values) if knows_values else None,
            )
