"""Environments as the scripts make them, and as the actor loops step them, whatever their kind."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from rl_buffer import TransitionSpec
from rl_buffer.episode_ends import autoreset_mode, final_observation, num_envs_of, stated_autoreset


def make_envs(env_id: str, num_envs: int) -> VectorEnv:
    """`num_envs` copies of a registered environment, stepped one after the other in this process.

    Processes are what actors are for; within one, a second level of them would only cost switches.
    """
    return SyncVectorEnv([lambda: gym.make(env_id) for _ in range(num_envs)], autoreset_mode=AutoresetMode.NEXT_STEP)


def transition_spec(env_id: str) -> TransitionSpec:
    """What a transition of this environment holds, observations in at most 32-bit floats."""
    env = gym.make(env_id)
    observation_dtype = "float32" if env.observation_space.dtype == np.float64 else None
    spec = TransitionSpec.from_spaces(env.observation_space, env.action_space, obs_dtype=observation_dtype)
    env.close()
    return spec


class Step(NamedTuple):
    """One step of E environments, in memory of its own. Observations may be dictionaries of [E, ...]."""

    observations: Any  # [E, *obs_shape], that were acted on
    rewards: NDArray[np.float64]  # [E]
    ended: NDArray[np.bool_]  # [E], terminated | truncated
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    next_observations: Any  # [E, *obs_shape], as `step` returned them; what they are at an end depends on the mode
    infos: Mapping[str, Any]


class ActorEnvs:
    """E environments of any kind: stepped as a batch, and reset where nobody else does it. A context manager.

        kind                                     resets by itself
        Gymnasium's vector environments          as metadata["autoreset_mode"] says: next_step, same_step, disabled
        EnvPool (before 1.0 it does not say so)  next_step
        a plain environment: a vector of one     disabled, unless `autoreset` is given

    Has what writers and policies want to know of a vector environment: `num_envs`, `single_observation_space`,
    `single_action_space` and `metadata`.
    """

    observations: Any  # [E, *obs_shape], to act on now; from `reset` on

    def __init__(self, envs: Any, autoreset: Any = None) -> None:
        """Take over `envs`; `autoreset` overrides what they say of themselves.

        Raises:
            InvalidInput: a vector environment does not say how it resets.
        """
        given = autoreset_mode(autoreset)
        if num_envs_of(envs) is None:
            mode = AutoresetMode[(given or "disabled").upper()]
            envs = SyncVectorEnv([lambda env=envs: env], autoreset_mode=mode)
        self.autoreset = given or stated_autoreset(envs)
        self.envs = envs
        self.num_envs = num_envs_of(envs)
        self.metadata = {"autoreset_mode": self.autoreset}
        # EnvPool's spaces are those of one environment.
        self.single_observation_space = getattr(envs, "single_observation_space", envs.observation_space)
        self.single_action_space = getattr(envs, "single_action_space", envs.action_space)

    def reset(self, seed: int | None = None) -> None:
        """Begin an episode everywhere; without a seed `envs.reset` gets no argument (EnvPool takes none)."""
        observations, _ = self.envs.reset() if seed is None else self.envs.reset(seed=seed)
        self.observations = _tree_map(np.array, observations)

    def step(self, actions: NDArray[Any]) -> Step:
        """Act on `observations`; afterwards they are those to act on next."""
        acted_on = self.observations
        next_observations, rewards, terminated, truncated, infos = self.envs.step(actions)
        # Copies: environments may hand out the same memory again, at the next step or at the reset below.
        self.observations = next_observations = _tree_map(np.array, next_observations)
        terminated, truncated = np.array(terminated, np.bool_), np.array(truncated, np.bool_)
        ended = terminated | truncated
        step = Step(acted_on, np.array(rewards), ended, terminated, truncated, next_observations, infos)
        if self.autoreset == "disabled" and ended.any():
            observations, _ = self.envs.reset(options={"reset_mask": ended})
            self.observations = _tree_map(np.array, observations)
        return step

    def final_observations(self, step: Step) -> Any:
        """[E, *obs_shape]: the true final observations where `step` truncated, elsewhere those that it returned."""
        if self.autoreset != "same_step" or not step.truncated.any():
            return step.next_observations

        def replace(leaf: NDArray[Any], *finals: NDArray[Any]) -> NDArray[Any]:
            leaf = leaf.copy()
            leaf[step.truncated] = finals
            return leaf

        finals = (final_observation(step.infos, env, "") for env in np.flatnonzero(step.truncated))
        return _tree_map(replace, step.next_observations, *finals)

    def final_values(
        self, step: Step, values: Callable[[Any], NDArray[np.floating[Any]]]
    ) -> NDArray[np.floating[Any]] | None:
        """V of the true final observations, [E], where `step` truncated; in next_step mode the dummy step brings it.

        Args:
            step: what `step` returned last.
            values: V(obs), [E], of [E, *obs_shape].
        """
        if self.autoreset == "next_step" or not step.truncated.any():
            return None
        return values(self.final_observations(step))

    def __enter__(self) -> "ActorEnvs":
        return self

    def __exit__(self, *exception: object) -> None:
        self.envs.close()


def _tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`function(leaf, *leaves of the others)` for an array, or for every array of a (nested) dictionary."""
    if isinstance(tree, Mapping):
        return {key: _tree_map(function, branch, *(other[key] for other in others)) for key, branch in tree.items()}
    return function(tree, *others)
