"""The steps of one on-policy rollout of E environments, written row by row into [T, E] views, then finished by GAE.

    begin(views) -> add, add, ... -> finish(last_values) -> begin(other views) -> ...

The views may be one's own memory or rows of a shared table; a fragment knows neither. One thread at a time. What
carries over from one fragment to the next is which environments ended at the last step: in next_step mode the first
row after it is a dummy. No torch.
"""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rl_buffer.episode_ends import Autoreset
from rl_buffer.errors import InvalidInput
from rl_buffer.gae import generalized_advantages, require_discounts
from rl_buffer.inputs import as_flags, copy_numbers, copy_tree
from rl_buffer.spec import ROLLOUT_FLAGS, ROLLOUT_NUMBERS, ROLLOUT_RESULTS, leaves_below


class StagedStep(NamedTuple):
    """A step that has been copied in and not yet accepted; everything is [E]."""

    rewards: NDArray[np.float64]  # these four until the next `stage`
    values: NDArray[np.float64]
    log_probs: NDArray[np.float64]
    final_values: NDArray[np.float64]  # NaN where unknown
    done: NDArray[np.bool_]  # as given
    ended: NDArray[np.bool_]  # terminated | truncated
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]  # ended, and not only because it terminated
    mask: NDArray[np.bool_] | None  # where a step happened; None: everywhere


class RolloutFragment:
    """Writes up to T steps of E environments, and their advantages, into views of `TransitionSpec.rollout_fields`.

    Rows [0, num_filled) hold steps. Where no step happened (the dummies of next_step mode, and where the caller says
    so) a row has mask False, reward 0 and no flags; its value counts, being that of its observation.
    """

    def __init__(
        self,
        num_steps: int,
        num_envs: int,
        *,
        gamma: float,
        gae_lambda: float,
        autoreset: Autoreset | None = None,
    ) -> None:
        """Remember how; `begin` says where.

        Raises:
            InvalidInput: gamma or gae_lambda is not in 0..1.
        """
        require_discounts(gamma, gae_lambda)
        self.num_steps = num_steps
        self.num_envs = num_envs
        self.num_filled = num_steps  # nothing can be added before `begin`
        self._gamma = gamma
        self._gae_lambda = gae_lambda
        self._autoreset = autoreset
        self._views: Mapping[str, NDArray[Any]] = {}
        self._observations: dict[str, NDArray[Any]] = {}
        self._actions: dict[str, NDArray[Any]] = {}
        self._numbers = tuple(np.empty((len(ROLLOUT_NUMBERS), num_envs)))
        self._previous_ended = np.zeros(num_envs, np.bool_)
        self._last_done = np.zeros(num_envs, np.bool_)

    @property
    def is_full(self) -> bool:
        """Whether `add` has no row."""
        return self.num_filled == self.num_steps

    def begin(self, views: Mapping[str, NDArray[Any]]) -> None:
        """Start at the first row of these views, path -> [T, E, *shape]; what was written before stays as it is."""
        self._views = views
        self._observations = leaves_below("observations", views)
        self._actions = leaves_below("actions", views)
        self.num_filled = 0

    def add(
        self,
        obs: Any,
        action: Any,
        reward: Any,
        done: Any,
        value: Any,
        log_prob: Any,
        truncated: Any = None,
        terminated: Any = None,
        final_values: Any = None,
        mask: Any = None,
    ) -> None:
        """Take one step of all E environments: `stage` and `accept`.

        Raises:
            InvalidInput: as `stage`. Nothing was added.
        """
        self.accept(self.stage(obs, action, reward, done, value, log_prob, truncated, terminated, final_values, mask))

    def stage(
        self,
        obs: Any,
        action: Any,
        reward: Any,
        done: Any,
        value: Any,
        log_prob: Any,
        truncated: Any = None,
        terminated: Any = None,
        final_values: Any = None,
        mask: Any = None,
    ) -> StagedStep:
        """Copy one step in; until `accept`, nothing has happened.

        Scalars per environment are (E,) or (E, 1), for E = 1 also a plain number; arrays or tensors on any device.
        An episode ends where done | truncated | terminated.

        Args:
            obs: [E, *obs_shape], or a mapping of such arrays for dictionary observations; E = 1 may leave E out.
            action: [E, *action_shape], likewise.
            reward: float, finite.
            done: bool or 0/1: THIS step ended the episode.
            value: float, V(obs).
            log_prob: float, log pi(action | obs).
            truncated: bool or 0/1; None is False.
            terminated: bool or 0/1; None is done and not truncated. It alone stops the bootstrap.
            final_values: float, V(true final obs) where the episode is truncated; NaN where unknown.
            mask: bool or 0/1; False where no step happened. In next_step mode the dummies are known without it.

        Raises:
            InvalidInput: the fragment is full, or a wrong shape, dtype or value, by name. Nothing was added.
        """
        if self.is_full:
            raise InvalidInput(f"all {self.num_steps} steps are taken; finish() the fragment and begin() another")
        copy_tree("obs", self._observations, self.num_filled, obs)
        copy_tree("action", self._actions, self.num_filled, action)
        rewards, values, log_probs, finals = self._numbers
        copy_numbers("reward", rewards, reward)
        copy_numbers("value", values, value)
        copy_numbers("log_prob", log_probs, log_prob)
        if final_values is None:
            finals[:] = np.nan
        else:
            copy_numbers("final_values", finals, final_values, nan_is_unknown=True)
        flags = as_flags("done", done, self.num_envs)
        truncateds = as_flags("truncated", truncated, self.num_envs)
        if terminated is None:
            terminateds = flags & ~truncateds
        else:
            terminateds = as_flags("terminated", terminated, self.num_envs)
        happened = None if mask is None else as_flags("mask", mask, self.num_envs)
        if np.count_nonzero(self._previous_ended):
            happened = ~self._previous_ended if happened is None else happened & ~self._previous_ended
        ended = flags | truncateds | terminateds
        if happened is not None:
            rewards[~happened] = 0.0
            ended, terminateds, truncateds = ended & happened, terminateds & happened, truncateds & happened
        # An episode can end with neither flag, where the caller gave `terminated`: not terminated is truncated.
        truncateds = truncateds | (ended & ~terminateds)
        return StagedStep(rewards, values, log_probs, finals, flags, ended, terminateds, truncateds, happened)

    def accept(self, staged: StagedStep) -> None:
        """Take the staged step for good."""
        row, views = self.num_filled, self._views
        views["rewards"][row] = staged.rewards
        views["values"][row] = staged.values
        views["log_probs"][row] = staged.log_probs
        views["final_values"][row] = staged.final_values
        views["terminateds"][row] = staged.terminated
        views["truncateds"][row] = staged.truncated
        views["mask"][row] = True if staged.mask is None else staged.mask
        self._last_done[...] = staged.done
        if self._autoreset == "next_step":
            self._previous_ended = staged.ended
        self.num_filled += 1

    def finish(self, last_values: Any, last_dones: Any = None) -> None:
        """Write advantages and returns of the filled rows; the rows after them are masked out.

        May be called again after further steps. In the modes next_step and disabled `last_values` also serve the
        environments that were truncated at the last row; in the others that row needs `final_values`.

        Args:
            last_values: (E,) or (E, 1) float, V(obs after the last row); not read where the last row terminated.
            last_dones: the `done` of the last row once more. The stored flags count; a difference is warned of.

        Raises:
            InvalidInput: no step was added, a wrong shape or value, or the value after a truncated step is unknown
                (`gae.generalized_advantages`).
        """
        num_filled, views = self.num_filled, self._views
        if not views or not num_filled:
            raise InvalidInput("there is no step to compute returns of; add() some first")
        values = np.empty(self.num_envs)
        copy_numbers("last_values", values, last_values)
        if last_dones is not None:
            self._compare(as_flags("last_dones", last_dones, self.num_envs))
        filled = {path: views[path][:num_filled] for path in (*ROLLOUT_NUMBERS, *ROLLOUT_FLAGS, *ROLLOUT_RESULTS)}
        generalized_advantages(
            filled["rewards"],
            filled["values"],
            filled["terminateds"],
            filled["truncateds"],
            filled["mask"],
            filled["final_values"],
            values,
            gamma=self._gamma,
            gae_lambda=self._gae_lambda,
            last_is_final=self._autoreset in ("next_step", "disabled"),
            out=(filled["advantages"], filled["returns"]),
        )
        for path in ("mask", *ROLLOUT_RESULTS):
            views[path][num_filled:] = 0

    def carried_over(self) -> dict[str, NDArray[np.bool_]]:
        """What goes from one fragment to the next, [E] bool each; `carry_over` takes it."""
        return {"previous_ended": self._previous_ended.copy(), "last_done": self._last_done.copy()}

    def carry_over(self, carried: Mapping[str, NDArray[np.bool_]], num_filled: int) -> None:
        """Go on after `num_filled` rows of the present views, with what another fragment carried over.

        Raises:
            InvalidInput: a shape, a dtype or the number does not fit. Nothing has changed.
        """
        for name, own in self.carried_over().items():
            other = carried.get(name)
            if other is None or (other.shape, other.dtype) != (own.shape, own.dtype):
                raise InvalidInput(f"a rollout carries {name} over as bool[{self.num_envs}], not as {other!r}")
        if not 0 <= num_filled <= self.num_steps:
            raise InvalidInput(f"num_filled is {num_filled}, expected 0..{self.num_steps}")
        self._previous_ended = carried["previous_ended"].copy()
        self._last_done = carried["last_done"].copy()
        self.num_filled = num_filled

    def _compare(self, last_dones: NDArray[np.bool_]) -> None:
        """Warn where `last_dones` is neither what `done` was at the last row nor whether that row ended an episode."""
        last = {path: self._views[path][self.num_filled - 1] for path in ROLLOUT_FLAGS}
        ended = last["terminateds"] | last["truncateds"]
        differs = last["mask"] & (last_dones != ended) & (last_dones != self._last_done)
        if np.count_nonzero(differs):
            env = int(differs.argmax())
            # CleanRL keeps next_done apart and stores it with the next step: the classic slip in moving from it.
            warnings.warn(
                f"last_dones[{env}] is {bool(last_dones[env])}, but the last add() of that environment had done="
                f"{bool(ended[env])}, which is what counts. Is done stored before the step? It must be the flag that "
                "this very step returned.",
                UserWarning,
                stacklevel=4,  # who called RolloutBuffer.compute_returns_and_advantages
            )
