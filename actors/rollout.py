"""One actor of on-policy training: step environments, write rollout fragments, follow the learner's parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

import rl_buffer as rb


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
    make_envs: Callable[[], VectorEnv],
    make_policy: Callable[[VectorEnv], RolloutPolicy],
    *,
    name: str,
    number: int,
    table: str = "rollout",
    seed: int = 0,
    timeout_s: float = 60.0,
) -> None:
    """Write fragments until the server ends; each begins with the newest parameters, the first with the first.

    Args:
        address: of the server.
        make_envs: the actor's own vector environment; a lambda is fine.
        make_policy: the actor's policy for these environments; it acts only after its first `load`.
        name: shown by the trainer and in `client.info()`.
        number: of this actor; the learner sees fragments in the order of these.
        table: to write to.
        seed: of the environments.
        timeout_s: deadline of each wait: for the server, for parameters, and for a fragment.
    """
    torch.set_num_threads(1)
    client = rb.connect(address, timeout_s=timeout_s, name=name)
    envs = make_envs()
    policy_name = client.tables[table].parameters
    writer = client.rollout_writer(table, envs=envs, number=number)  # first: it refuses environments that do not fit
    policy = make_policy(envs)
    mode = envs.metadata["autoreset_mode"]
    observations, _ = envs.reset(seed=seed)
    version = 0
    try:
        while True:
            writer.begin()
            wait_s = 0.0 if version else timeout_s
            version, parameters = client.parameters(policy_name, newer_than=version, timeout_s=wait_s)
            if parameters is not None:
                policy.load(parameters)
            elif not version:
                raise rb.DeadlineExceeded(f"no {policy_name!r} was published within {timeout_s} s; is a learner there?")
            while not writer.is_full:
                choice = policy.choose(observations)
                actions = choice.actions if choice.env_actions is None else choice.env_actions
                next_observations, rewards, terminations, truncations, infos = envs.step(actions)
                writer.add(
                    observations,
                    choice.actions,
                    rewards,
                    terminations | truncations,
                    choice.values,
                    choice.log_probs,
                    truncations,
                    terminated=terminations,
                    final_values=_final_values(policy, mode, next_observations, truncations, infos),
                )
                ended = terminations | truncations
                if mode == AutoresetMode.DISABLED and ended.any():
                    next_observations, _ = envs.reset(options={"reset_mask": ended})
                observations = next_observations
            writer.commit(policy.values(observations))
    except rb.ServerLost:
        return  # the run is over
    finally:
        envs.close()


def _final_values(
    policy: RolloutPolicy,
    mode: AutoresetMode,
    next_observations: NDArray[Any],
    truncations: NDArray[np.bool_],
    infos: Mapping[str, Any],
) -> NDArray[np.float32] | None:
    """V(true final observations), [E], NaN where nothing was truncated; in NEXT_STEP mode the dummy step brings it."""
    if mode == AutoresetMode.NEXT_STEP or not truncations.any():
        return None
    final_observations = next_observations.copy()
    if mode == AutoresetMode.SAME_STEP:
        final_observations[truncations] = np.stack(infos["final_obs"][truncations])
    return np.where(truncations, policy.values(final_observations), np.nan).astype(np.float32)
