"""One actor of on-policy training: step environments, write rollout fragments, follow the learner's parameters."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

import rl_buffer as rb
from actors.environments import ActorEnvs


@dataclass(frozen=True, slots=True)
class Choice:
    """What a stochastic policy chose for E observations."""

    actions: NDArray[Any]  # [E, *action_shape], to be stored
    log_probs: NDArray[np.float32]  # [E], of these actions
    values: NDArray[np.float32]  # [E], V(obs)
    env_actions: NDArray[Any] | None = None  # what the environments take, where that differs: clipped, rescaled


class RolloutPolicy(Protocol):
    """What an actor needs of a policy."""

    def load(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Take newer parameters."""

    def choose(self, observations: NDArray[Any]) -> Choice:
        """Draw actions for [E, *obs_shape]."""

    def values(self, observations: NDArray[Any]) -> NDArray[np.float32]:
        """V(obs), [E], for [E, *obs_shape]."""


def run_rollout_actor(
    address: str,
    make_envs: Callable[[], Any],
    make_policy: Callable[[ActorEnvs], RolloutPolicy],
    *,
    name: str,
    number: int,
    table: str = "rollout",
    seed: int | None = None,
    autoreset: Any = None,
    timeout_s: float = 60.0,
) -> None:
    """Write fragments until the server ends; each begins with the newest parameters, the first with the first.

    Args:
        address: of the server.
        make_envs: the actor's own environments of any kind (`ActorEnvs`); a lambda is fine.
        make_policy: the actor's policy for these environments; it acts only after its first `load`.
        name: shown by the trainer and in `client.info()`.
        number: of this actor; the learner sees fragments in the order of these.
        table: to write to.
        seed: of the environments; None leaves it to them, as EnvPool wants it.
        autoreset: "next_step", "same_step" or "disabled", where that is not what `envs.metadata` says.
        timeout_s: deadline of each wait: for the server, for parameters, and for a fragment.
    """
    torch.set_num_threads(1)
    client = rb.connect(address, timeout_s=timeout_s, name=name)
    with ActorEnvs(make_envs(), autoreset) as envs, contextlib.suppress(rb.ServerLost):  # then the run is over
        policy_name = client.tables[table].parameters
        writer = client.rollout_writer(table, envs=envs, number=number)  # first: it refuses those that do not fit
        policy = make_policy(envs)
        envs.reset(seed)
        version = 0
        while True:
            writer.begin()
            wait_s = 0.0 if version else timeout_s
            version, parameters = client.parameters(policy_name, newer_than=version, timeout_s=wait_s)
            if parameters is not None:
                policy.load(parameters)
            elif not version:
                raise rb.DeadlineExceeded(f"no {policy_name!r} was published within {timeout_s} s; is a learner there?")
            while not writer.is_full:
                choice = policy.choose(envs.observations)
                step = envs.step(choice.actions if choice.env_actions is None else choice.env_actions)
                writer.add(
                    step.observations,
                    choice.actions,
                    step.rewards,
                    step.ended,
                    choice.values,
                    choice.log_probs,
                    step.truncated,
                    terminated=step.terminated,
                    final_values=envs.final_values(step, policy.values),
                )
            writer.commit(policy.values(envs.observations))
