"""The steps of E environments that may still become transitions: staged, made into n-step windows, copied out.

    stage -> (the caller may still refuse) -> accept -> windows -> copy_rows -> emitted
                                                  ^ what is still open is carried over

Kept in ordinary memory because an n-step transition is complete only n steps later. Knows tables and autoreset modes,
but neither rows' numbers nor servers. No torch.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rl_buffer.episode_ends import Autoreset, final_observation
from rl_buffer.errors import InvalidInput
from rl_buffer.inputs import as_flags, as_numpy, copy_array, copy_numbers
from rl_buffer.n_step import Windows, assemble, td_errors
from rl_buffer.samplers import Prioritized
from rl_buffer.spec import flatten
from rl_buffer.tables import ReplayTable

_UNKNOWN = np.nan
_STAGED = ("observations", "next_observations", "actions", "extras")


class StagedStep(NamedTuple):
    """A step that has been copied in and not yet accepted; everything is [E]."""

    rewards: NDArray[np.float64]
    ended: NDArray[np.bool_]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    dummy: NDArray[np.bool_] | None  # next_step mode: where nothing happened; None: nowhere


class StepHistory:
    """The last steps of E environments, the oldest first: every input of `add`, and what became of it.

    Arrays are [capacity, E, ...]; the first `num_steps` rows are filled.
    """

    def __init__(self, table: ReplayTable, num_envs: int, autoreset: Autoreset | None, capacity: int) -> None:
        self.num_steps = 0
        self.capacity = capacity
        self._table = table
        self._num_envs = num_envs
        self._autoreset = autoreset
        self._obs_paths = [path.removeprefix("obs").lstrip("/") for path, _ in flatten("obs", table.spec.obs)]
        self._action_paths = [path.removeprefix("act").lstrip("/") for path, _ in flatten("act", table.spec.action)]
        self._leaves = {
            path: np.zeros((capacity, num_envs, *field.shape), field.dtype)
            for path, field in table.spec.transition_fields().items()
            if path.split("/")[0] in _STAGED
        }
        shape = (capacity, num_envs)
        self._rewards = np.zeros(shape)
        self._terminated = np.zeros(shape, np.bool_)
        self._truncated = np.zeros(shape, np.bool_)
        self._cut = np.zeros(shape, np.bool_)  # nothing is joined across: ends and manual resets
        self._dummy = np.zeros(shape, np.bool_)  # next_step mode: the step after an end did not happen
        self._startable = np.zeros(shape, np.bool_)  # real, and not emitted yet
        self._q_taken = np.full(shape, _UNKNOWN)
        self._state_values = np.full(shape, _UNKNOWN)
        self._final_values = np.full(shape, _UNKNOWN)
        self._priorities = np.full(shape, _UNKNOWN)
        arrays = [array for array in vars(self).values() if isinstance(array, np.ndarray)]
        self._arrays = [*self._leaves.values(), *arrays]
        self._previous_ended = np.zeros(num_envs, np.bool_)
        self._any_values = False  # whether any step came with values or a priority; such a table computes priorities

    @property
    def is_full(self) -> bool:
        """Whether `stage` has no place."""
        return self.num_steps == self.capacity

    def stage(
        self,
        obs: Any,
        action: Any,
        reward: Any,
        done: Any,
        next_obs: Any,
        truncated: Any,
        terminated: Any,
        priority: Any,
        q_taken: Any,
        state_value: Any,
        final_value: Any,
        extras: Mapping[str, Any] | None,
        infos: Any,
    ) -> StagedStep:
        """Copy in what `ReplayWriter.add` was given; until `accept`, nothing has happened.

        Raises:
            InvalidInput: a wrong shape, dtype or value, by name.
        """
        self._stage_tree("obs", "observations", self._obs_paths, obs)
        self._stage_tree("next_obs", "next_observations", self._obs_paths, next_obs)
        self._stage_tree("action", "actions", self._action_paths, action)
        self._stage_extras(extras)
        rewards = self._rewards[self.num_steps]
        copy_numbers("reward", rewards, reward)
        flags = as_flags("done", done, self._num_envs)
        truncateds = as_flags("truncated", truncated, self._num_envs)
        if terminated is None:
            terminateds = flags & ~truncateds
        else:
            terminateds = as_flags("terminated", terminated, self._num_envs)
        self._stage_values(priority, q_taken, state_value, final_value)
        ended = flags | truncateds | terminateds
        if self._autoreset == "same_step":
            self._stage_final_observations(ended, infos)
        if self._autoreset != "next_step" or not np.count_nonzero(self._previous_ended):
            return StagedStep(rewards, ended, terminateds, truncateds, None)
        dummy = self._previous_ended
        rewards[dummy] = 0.0
        return StagedStep(rewards, ended & ~dummy, terminateds & ~dummy, truncateds & ~dummy, dummy)

    def accept(self, staged: StagedStep) -> None:
        """Take the staged step for good."""
        step = self.num_steps
        self._terminated[step] = staged.terminated
        self._truncated[step] = staged.truncated
        self._cut[step] = staged.ended
        self._dummy[step] = False if staged.dummy is None else staged.dummy
        self._startable[step] = True if staged.dummy is None else ~staged.dummy
        self._previous_ended = staged.ended
        self.num_steps += 1

    def cut(self, mask: NDArray[np.bool_]) -> None:
        """Environments in `mask` [E] were reset by hand: their next step is a real one and joins nothing before."""
        if self.num_steps:
            self._cut[self.num_steps - 1] |= mask
        self._previous_ended = self._previous_ended & ~mask

    def windows(self, *, close: bool) -> Windows:
        """The transitions that are complete; with `close` the unfinished ones too, as they are."""
        steps = slice(0, self.num_steps)
        needs_next: bool | NDArray[np.bool_] = False
        if self._any_values:
            # The value of the state behind the window comes with the next step, unless there is none to come.
            needs_next = ~self._terminated[steps] & np.isnan(self._final_values[steps])
            needs_next &= ~np.isnan(self._state_values[steps])
            if self._autoreset != "next_step":
                needs_next &= ~self._cut[steps]
        return assemble(
            self._rewards[steps],
            self._terminated[steps],
            self._truncated[steps],
            self._cut[steps],
            self._startable[steps],
            n_step=self._table.n_step,
            gamma=self._table.gamma,
            needs_next=needs_next,
            close=close,
        )

    def td_errors(self, windows: Windows) -> NDArray[np.float64] | None:
        """Initial TD errors [N] of the windows, NaN where unknown; None where no priorities are in play."""
        if not isinstance(self._table.sampler, Prioritized) or not self._any_values:
            return None
        steps = slice(0, self.num_steps)
        errors = td_errors(
            windows,
            self._q_taken[steps],
            self._state_values[steps],
            self._final_values[steps],
            cut=self._cut[steps],
            dummy=self._dummy[steps],
        )
        priorities = self._priorities[windows.first, windows.envs]
        return np.where(np.isnan(priorities), errors, priorities)

    def copy_rows(self, windows: Windows, views: Mapping[str, NDArray[Any]], rows: NDArray[np.int64]) -> None:
        """Write the windows as transitions into `rows` [N] of the leaf views of a table."""
        for path, leaf in self._leaves.items():
            steps = windows.last if path.startswith("next_observations") else windows.first
            views[path][rows] = leaf[steps, windows.envs]
        views["rewards"][rows] = windows.rewards
        views["dones"][rows] = windows.terminated
        views["discounts"][rows] = windows.discounts
        views["n_steps"][rows] = windows.n_steps
        views["terminateds"][rows] = windows.terminated
        views["truncateds"][rows] = windows.truncated

    def emitted(self, windows: Windows) -> None:
        """Forget the windows, and every step before the earliest that can still start one."""
        self._startable[windows.first, windows.envs] = False
        alive = np.flatnonzero(self._startable[: self.num_steps].any(axis=1))
        first = int(alive[0]) if len(alive) else self.num_steps
        kept = self.num_steps - first
        if first:
            for array in self._arrays:
                array[:kept] = array[first : self.num_steps]
        self.num_steps = kept

    def _stage_tree(self, argument: str, name: str, paths: list[str], tree: Any) -> None:
        for path in paths:
            if not path:
                copy_array(argument, self._leaves[name][self.num_steps], tree)
                return
            leaf = tree
            for key in path.split("/"):
                if not isinstance(leaf, Mapping) or key not in leaf:
                    raise InvalidInput(f"{argument} must be a mapping with {path!r}, got {type(leaf).__name__}")
                leaf = leaf[key]
            copy_array(f"{argument}[{path!r}]", self._leaves[f"{name}/{path}"][self.num_steps], leaf)

    def _stage_extras(self, extras: Mapping[str, Any] | None) -> None:
        given, expected = set(extras or ()), set(self._table.spec.extras)
        if given != expected:
            raise InvalidInput(f"extras have keys {sorted(given)}, the table's are {sorted(expected)}")
        for key, value in (extras or {}).items():
            copy_array(f"extras[{key!r}]", self._leaves[f"extras/{key}"][self.num_steps], value)

    def _stage_values(self, priority: Any, q_taken: Any, state_value: Any, final_value: Any) -> None:
        step = self.num_steps
        if priority is not None and not isinstance(self._table.sampler, Prioritized):
            raise InvalidInput("priority= was given, but the table is sampled uniformly; leave it out")
        if priority is not None and self._table.n_step != 1:
            raise InvalidInput(
                f"priority= is for n_step = 1, this table has {self._table.n_step}; pass q_taken= and state_value=, "
                "then the writer computes it when the window closes"
            )
        for argument, target, value in (
            ("priority", self._priorities, priority),
            ("q_taken", self._q_taken, q_taken),
            ("state_value", self._state_values, state_value),
            ("final_value", self._final_values, final_value),
        ):
            if value is None:
                target[step] = _UNKNOWN
            else:
                copy_numbers(argument, target[step], value)
                self._any_values = True
        if priority is not None and (self._priorities[step] < 0).any():
            raise InvalidInput(f"priority must be >= 0, got {self._priorities[step].min()}")

    def _stage_final_observations(self, ended: NDArray[np.bool_], infos: Any) -> None:
        for env in np.flatnonzero(ended).tolist():
            for path in self._obs_paths:
                leaf = self._leaves[f"next_observations/{path}" if path else "next_observations"]
                final = as_numpy(final_observation(infos, env, path))
                # With the ellipsis also an observation of shape () is a view.
                copy_array(f"infos['final_obs'][{env}]", leaf[self.num_steps, env, ...], final)
