"""The front of everything that steps are added to: `add` and `on_reset` of the writers and the in-process buffers.

    add -> (room?) -> StepHistory -> StatsTracker -> (a chunk is full?) -> the subclass moves complete items into rows

No torch, no sockets, no clock.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rl_buffer.episode_ends import Autoreset
from rl_buffer.errors import DeadlineExceeded, InvalidInput, ServerLost
from rl_buffer.inputs import as_flags, copy_numbers
from rl_buffer.offline import checked_leaves
from rl_buffer.samplers import Prioritized
from rl_buffer.sequence_history import SequenceHistory
from rl_buffer.stats_tracker import StatsTracker
from rl_buffer.step_history import StepHistory
from rl_buffer.tables import ReplayTable
from rl_buffer.transition_history import TransitionHistory

# Writes rows ([N] int64) of the leaf views that it is given.
CopyRows: TypeAlias = Callable[[Mapping[str, NDArray[Any]], NDArray[np.int64]], None]


def make_history(
    table: ReplayTable, num_envs: int, autoreset: Autoreset | None, num_new_steps: int
) -> StepHistory[Any]:
    """The history that makes the table's items, with room for `num_new_steps` on top of the steps that wait."""
    if table.sequence_length is None:
        # A start waits for n steps at most, one of them for the value of the state behind its window.
        return TransitionHistory(table, num_envs, autoreset, num_new_steps + table.n_step)
    return SequenceHistory(table, num_envs, autoreset, num_new_steps)


class ReplayInput(ABC):
    """Takes the steps of E environments, and hands on a chunk of them at a time. One thread at a time."""

    def __init__(
        self,
        table: ReplayTable,
        num_envs: int,
        autoreset: Autoreset | None,
        chunk_steps: int,
        stats_tracker: StatsTracker | None,
    ) -> None:
        self.table = table
        self.num_envs = num_envs
        self.autoreset = autoreset
        self.stats_tracker = stats_tracker
        self._chunk_steps = chunk_steps
        self._history = make_history(table, num_envs, autoreset, chunk_steps)
        self._new_steps = 0  # accepted since the last time that items were moved

    @abstractmethod
    def _make_room(self) -> None:
        """Make sure that the history can take a step, or raise."""

    @abstractmethod
    def _chunk_is_full(self) -> None:
        """Move complete items into rows if that is possible now, and set `_new_steps` to 0 if it was."""

    @abstractmethod
    def flush(self) -> None:
        """Move all complete items into rows."""

    @abstractmethod
    def _commit(self, num_rows: int, copy_rows: CopyRows, td_errors: NDArray[np.float64] | None) -> None:
        """Write and publish `num_rows` items, at most `StepHistory.max_items` and the table's capacity, or raise."""

    def add(
        self,
        obs: Any,
        action: Any,
        reward: ArrayLike,
        done: ArrayLike,
        next_obs: Any,
        truncated: ArrayLike | None = None,
        terminated: ArrayLike | None = None,
        priority: ArrayLike | None = None,
        q_taken: ArrayLike | None = None,
        state_value: ArrayLike | None = None,
        extras: Mapping[str, Any] | None = None,
        infos: Any = None,
        metrics: Mapping[str, ArrayLike] | None = None,
        done_reasons: Mapping[str, ArrayLike] | None = None,
        final_value: ArrayLike | None = None,
        recurrent_state: Any = None,
    ) -> None:
        """Take one step of all E environments: what `step` was called with and what it returned.

        Scalars per environment are (E,) or (E, 1), for E = 1 also a plain number; everything is copied. An episode
        ends where done | truncated | terminated. `terminated`, if not given, is done and not truncated: it alone
        stops the bootstrap. A writer's steps appear in its table in chunks, `flush` sends at once what is complete; an
        in-process buffer counts and samples every step at once, as soon as its n steps are there.

        Args:
            obs: [E, *obs_shape], or a mapping of such arrays for dictionary observations; E = 1 may leave E out.
            action: [E, *action_shape].
            reward: float, finite.
            done: bool or 0/1.
            next_obs: what `step` returned, like obs. In same_step mode the final one is taken from `infos`.
            truncated: bool or 0/1.
            terminated: bool or 0/1; with `truncated` both may be true at once.
            priority: |TD error| >= 0 of this transition, for n_step = 1 only.
            q_taken: Q(obs, action) by the actor; with `state_value` the writer computes the initial priority
                |R + discount * V(s_{t+n}) - Q| when the window closes (Ape-X, Horgan et al. 2018).
            state_value: V(obs), for Q-learning max_a Q(obs, a).
            extras: the table's extra Fields, [E, *shape].
            infos: the infos of `step`, needed in same_step mode.
            metrics: key -> (E,), for the StatsTracker.
            done_reasons: key -> (E,) bool, likewise.
            final_value: V(true final observation), read where an episode is truncated; in next_step mode the dummy
                step's `state_value` brings it.
            recurrent_state: what the policy carried into this step, [E, *shape] or a mapping of such; sequences only.

        Raises:
            InvalidInput: a wrong shape, dtype, NaN or infinity, by name. Nothing was added.
            DeadlineExceeded: the table took no rows for `timeout_s`; the message says why. Nothing was added, so
                the same call may be made again.
            ServerLost: of a writer, whose server ended. Nothing was added: it is for after `Client.reconnect`.
        """
        self._make_room()
        staged = self._history.stage(
            obs,
            action,
            reward,
            done,
            next_obs,
            truncated,
            terminated,
            priority,
            q_taken,
            state_value,
            final_value,
            extras,
            infos,
            recurrent_state,
        )
        # The last thing that can refuse: after it the step is taken.
        if self.stats_tracker is not None:
            if metrics is None and done_reasons is None and staged.dummy is None:
                self.stats_tracker.take(staged.rewards, None if staged.is_quiet else staged.ended)
            else:
                self.stats_tracker.update(
                    staged.rewards,
                    staged.ended,
                    metrics=metrics,
                    done_reasons=done_reasons,
                    mask=None if staged.dummy is None else ~staged.dummy,
                )
        elif metrics or done_reasons:
            raise InvalidInput("metrics= and done_reasons= need a StatsTracker; give this buffer stats_tracker=")
        self._history.accept(staged)
        self._new_steps += 1
        if self._new_steps >= self._chunk_steps:
            self._chunk_is_full()

    def on_reset(self, mask: ArrayLike | None = None) -> None:
        """Say that environments were reset by hand: nothing is joined across, running returns are dropped.

        Args:
            mask: (E,) bool; None means all. After an episode's end, or before the first step, it changes nothing.
        """
        reset = np.ones(self.num_envs, np.bool_) if mask is None else as_flags("mask", mask, self.num_envs)
        if self.stats_tracker is not None:
            self.stats_tracker.discard(reset)
        self._history.cut(reset)

    def extend(self, batch: Any, td_errors: ArrayLike | None = None) -> None:
        """Add many items at once as they are, for instance offline data. The StatsTracker is not told.

        Args:
            batch: a batch of a table of the same spec, or a mapping with `observations, actions, rewards,
                next_observations`, `dones` or `terminateds` (where the bootstrap stops), and perhaps `truncateds` and
                `extras`; with n_step > 1 also `n_steps` and `discounts`. Arrays or tensors (N, *shape).
            td_errors: (N,) or (N, 1), signed, for the priorities; None gives the largest one among the live.

        Raises:
            InvalidInput: a part is missing or has a wrong shape, dtype or value, by name. Nothing was added.
            DeadlineExceeded: of a writer, whose table took only some of them in time; the message says how many.
            ServerLost: of a writer, whose server ended; likewise.
        """
        self.flush()
        num_rows, leaves = checked_leaves(self.table, batch)
        errors = None
        if td_errors is not None:
            if not isinstance(self.table.sampler, Prioritized):
                raise InvalidInput("td_errors= was given, but the table is sampled uniformly; leave it out")
            errors = np.empty(num_rows)
            copy_numbers("td_errors", errors, td_errors)
        step = min(self._history.max_items, self.table.capacity)
        for start in range(0, num_rows, step):
            part = slice(start, min(start + step, num_rows))

            def copy_rows(views: Mapping[str, NDArray[Any]], rows: NDArray[np.int64], part: slice = part) -> None:
                for path, values in leaves.items():
                    views[path][rows] = values[part]

            try:
                self._commit(part.stop - start, copy_rows, None if errors is None else errors[part])
            except (DeadlineExceeded, ServerLost) as error:
                raise type(error)(f"{error}; the first {start} of {num_rows} items were added") from error
