"""`ReplayWriter`: one actor's steps, staged, made into n-step transitions, and written into its reserved rows.

    add -> staged steps [H, E] --n_step.assemble--> transitions --copy--> reserved rows --Commit--> published
                 ^ what is still open is carried over                          ^ Grant: the next rows

Steps are staged in ordinary memory because an n-step transition is complete only n steps later; a chunk of them
costs one vectorised pass and one message. The writer holds two chunks of rows, so that it fills one while the
commit of the other is under way. No torch, no Numba. One thread at a time.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rl_buffer import frames, messages
from rl_buffer.connection import Channel
from rl_buffer.episode_ends import Autoreset, final_observation
from rl_buffer.errors import Closed, DeadlineExceeded, InvalidInput, RLBufferError
from rl_buffer.frames import Commit
from rl_buffer.n_step import Windows, assemble, td_errors
from rl_buffer.samplers import Prioritized
from rl_buffer.spec import flatten
from rl_buffer.stats_tracker import StatsTracker
from rl_buffer.tables import ReplayTable, StatsConfig

_UNKNOWN = np.nan
_LARGEST_NUMBER = 1e34  # of rewards and values: the sum of 1024 steps, the most n_step can be, is still a float32


class StepHistory:
    """The last H steps of E environments, the oldest first: every input of `add`, and what became of it.

    Arrays are [H, E, ...]; the first `num_steps` rows are filled.
    """

    def __init__(self, table: ReplayTable, num_envs: int, capacity: int) -> None:
        self.num_steps = 0
        self.capacity = capacity
        leaves = table.spec.transition_fields()
        self.leaves = {
            path: np.zeros((capacity, num_envs, *field.shape), field.dtype)
            for path, field in leaves.items()
            if path.split("/")[0] in ("observations", "next_observations", "actions", "extras")
        }
        shape = (capacity, num_envs)
        self.rewards = np.zeros(shape)
        self.terminated = np.zeros(shape, np.bool_)
        self.truncated = np.zeros(shape, np.bool_)
        self.cut = np.zeros(shape, np.bool_)  # nothing is joined across: ends and manual resets
        self.dummy = np.zeros(shape, np.bool_)  # next_step mode: the step after an end did not happen
        self.startable = np.zeros(shape, np.bool_)  # real, and not emitted yet
        self.q_taken = np.full(shape, _UNKNOWN)
        self.state_values = np.full(shape, _UNKNOWN)
        self.final_values = np.full(shape, _UNKNOWN)
        self.priorities = np.full(shape, _UNKNOWN)
        self._all = [
            *self.leaves.values(),
            *(array for array in vars(self).values() if isinstance(array, np.ndarray)),
        ]

    def drop_finished(self) -> None:
        """Move the earliest step that can still start a transition, and all after it, to the front."""
        alive = np.flatnonzero(self.startable[: self.num_steps].any(axis=1))
        first = int(alive[0]) if len(alive) else self.num_steps
        kept = self.num_steps - first
        if first:
            for array in self._all:
                array[:kept] = array[first : self.num_steps]
        self.num_steps = kept


class ReplayWriter:
    """Adds transitions to one table. Made by `client.writer`.

    Not for several threads; make one writer per thread.
    """

    def __init__(
        self,
        channel: Channel,
        call: Callable[[messages.Request], messages.Reply],
        name: str,
        table: ReplayTable,
        rows: Mapping[str, NDArray[Any]],
        stats: StatsConfig,
        *,
        num_envs: int,
        autoreset: Autoreset | None,
        chunk_size: int,
        timeout_s: float,
        explain: Callable[[], str],
        parameter_version: Callable[[], int],
    ) -> None:
        """Open the channel; `rows` are the views of the shared rows by path."""
        if num_envs < 1 or chunk_size < 1:
            raise InvalidInput(f"num_envs and chunk_size must be >= 1, got {num_envs} and {chunk_size}")
        self.table = table
        self.num_envs = num_envs
        self.autoreset = autoreset
        self.timeout_s = timeout_s
        self.stats_tracker = StatsTracker(
            num_envs, stats.window, stats.category, stats.extra_metrics_keys, stats.done_reason_keys
        )
        self._name = name
        self._channel = channel
        self._call = call
        self._rows = rows
        self._explain = explain
        self._parameter_version = parameter_version
        self._chunk_steps = -(-chunk_size // num_envs)
        # A start waits for n steps at most, one of them for the value of the state behind its window.
        self._history = StepHistory(table, num_envs, self._chunk_steps + table.n_step)
        self._new_steps = 0
        self._previous_ended = np.zeros(num_envs, np.bool_)
        self._any_values = False
        self._any_priorities = False
        self._max_commit_rows = self._history.capacity * num_envs
        self._reserved = np.empty(0, np.int64)
        self._sequence = 0
        self._acknowledged = 0
        self._closed = False
        self._obs_paths = [path.removeprefix("obs").lstrip("/") for path, _ in flatten("obs", table.spec.obs)]
        self._action_paths = [path.removeprefix("act").lstrip("/") for path, _ in flatten("act", table.spec.action)]
        call(messages.OpenWriter(channel.number, name, self._max_commit_rows, 2 * self._max_commit_rows))

    # ---- adding --------------------------------------------------------------------------------------------

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
    ) -> None:
        """Take one step of all E environments: what `step` was called with and what it returned.

        Scalars per environment are (E,) or (E, 1), for E = 1 also a plain number; everything is copied. An episode
        ends where done | truncated | terminated. `terminated`, if not given, is done and not truncated: it alone
        stops the bootstrap. Transitions appear in the table in chunks; `flush` sends at once what is complete.

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
            final_value: V(true final observation) where an episode is truncated; in next_step mode the dummy step's
                `state_value` brings it.

        Raises:
            InvalidInput: a wrong shape, dtype, NaN or infinity, by name. Nothing was added.
            DeadlineExceeded: the table took no rows for `timeout_s`; the message says why. Nothing was added, so
                the same call may be made again.
        """
        if self._closed:
            raise Closed("this writer was closed")
        self._channel.connection.check()
        history = self._history
        if history.num_steps == history.capacity and not self._emit(time.monotonic() + self.timeout_s):
            raise self._deadline("add", self.timeout_s)
        step = history.num_steps

        self._stage_tree("obs", "observations", self._obs_paths, obs, step)
        self._stage_tree("next_obs", "next_observations", self._obs_paths, next_obs, step)
        self._stage_tree("action", "actions", self._action_paths, action, step)
        self._stage_extras(extras, step)
        self._stage_numbers("reward", history.rewards[step], reward)
        flags = self._flags("done", done)
        truncateds = self._flags("truncated", truncated)
        terminateds = flags & ~truncateds if terminated is None else self._flags("terminated", terminated)
        ended = flags | truncateds | terminateds
        self._stage_values(step, priority, q_taken, state_value, final_value)
        dummy = self._previous_ended if self.autoreset == "next_step" else None
        if self.autoreset == "same_step":
            self._stage_final_observations(ended, infos, step)
        if dummy is not None and np.count_nonzero(dummy):
            history.rewards[step][dummy] = 0.0
            ended, truncateds, terminateds = ended & ~dummy, truncateds & ~dummy, terminateds & ~dummy
            mask = ~dummy
        else:
            mask = None
        # The last thing that can refuse: from here on the step is taken.
        self.stats_tracker.update(history.rewards[step], ended, metrics=metrics, done_reasons=done_reasons, mask=mask)
        history.terminated[step] = terminateds
        history.truncated[step] = truncateds
        history.cut[step] = ended
        history.dummy[step] = False if mask is None else dummy
        history.startable[step] = True if mask is None else mask
        self._previous_ended = ended
        history.num_steps += 1
        self._new_steps += 1
        if self._new_steps >= self._chunk_steps:
            self._emit(deadline_s=None)

    def on_reset(self, mask: ArrayLike | None = None) -> None:
        """Say that environments were reset by hand: nothing is joined across, running returns are dropped.

        Args:
            mask: (E,) bool; None means all. After an episode's end, or before the first step, it changes nothing.
        """
        reset = np.ones(self.num_envs, np.bool_) if mask is None else self._flags("mask", mask)
        self.stats_tracker.discard(reset)
        if self._history.num_steps:
            self._history.cut[self._history.num_steps - 1] |= reset
        self._previous_ended = self._previous_ended & ~reset  # the next step is a real one

    def flush(self, timeout_s: float | None = None) -> None:
        """Publish all complete transitions and wait until the server has them.

        Raises:
            DeadlineExceeded: the table did not take them in time; they stay staged and nothing is lost.
        """
        self._finish(timeout_s, close=False)

    def close(self, timeout_s: float | None = None) -> None:
        """Publish everything, unfinished windows as shorter ones, and give the rows back. Twice is fine."""
        if self._closed:
            return
        self._finish(timeout_s, close=True)
        self._closed = True
        self._call(messages.CloseChannel(self._channel.number))
        self._channel.close()

    def __enter__(self) -> "ReplayWriter":
        return self

    def __exit__(self, exception_type: object, *_: object) -> None:
        if exception_type is None:
            self.close()
        elif not self._closed:
            self._closed = True
            # The rows go back, what is staged is dropped; and the block's error matters more than one from here.
            with contextlib.suppress(RLBufferError):
                self._call(messages.CloseChannel(self._channel.number))
            self._channel.close()

    # ---- staging -------------------------------------------------------------------------------------------

    def _stage_tree(self, argument: str, name: str, paths: list[str], tree: Any, step: int) -> None:
        for path in paths:
            if not path:
                self._stage_array(argument, self._history.leaves[name][step], tree)
                return
            leaf = tree
            for key in path.split("/"):
                if not isinstance(leaf, Mapping) or key not in leaf:
                    raise InvalidInput(f"{argument} must be a mapping with {path!r}, got {type(leaf).__name__}")
                leaf = leaf[key]
            self._stage_array(f"{argument}[{path!r}]", self._history.leaves[f"{name}/{path}"][step], leaf)

    def _stage_extras(self, extras: Mapping[str, Any] | None, step: int) -> None:
        given, expected = set(extras or ()), set(self.table.spec.extras)
        if given != expected:
            raise InvalidInput(f"extras have keys {sorted(given)}, the table's are {sorted(expected)}")
        for key, value in (extras or {}).items():
            self._stage_array(f"extras[{key!r}]", self._history.leaves[f"extras/{key}"][step], value)

    def _stage_array(self, argument: str, target: NDArray[Any], value: Any) -> None:
        """Copy finite numbers of the right shape and kind into the history."""
        self._copy(argument, target, value)
        # A sum of squares is finite unless an element is not or is huge; only then look at each one. (A sum of
        # infinities of both signs would warn.)
        if target.dtype.kind == "f" and not math.isfinite(_sum_of_squares(target)):
            bad = np.argwhere(~np.isfinite(target))
            if len(bad):
                raise InvalidInput(
                    f"{argument} is {target[tuple(bad[0])]} at {tuple(bad[0].tolist())}; expected finite numbers"
                )

    def _stage_numbers(self, argument: str, target: NDArray[np.float64], value: Any) -> None:
        """Rewards or values, (E,) or (E, 1)."""
        self._copy(argument, target, value)
        if not _sum_of_squares(target) <= _LARGEST_NUMBER**2:  # NaN fails too
            bad = np.flatnonzero(~(np.abs(target) <= _LARGEST_NUMBER))
            if len(bad):
                raise InvalidInput(
                    f"{argument} is {target[bad[0]]} at ({bad[0]},); expected finite numbers within "
                    f"+-{_LARGEST_NUMBER:.0e}"
                )

    def _copy(self, argument: str, target: NDArray[Any], value: Any) -> None:
        array = _as_numpy(value)
        if array.shape != target.shape:
            if array.size != target.size or array.shape not in _same_rows(target.shape):
                raise InvalidInput(f"{argument} has shape {array.shape}, expected {target.shape}")
            array = array.reshape(target.shape)
        if array.dtype != target.dtype and not np.can_cast(array.dtype, target.dtype, "same_kind"):
            raise InvalidInput(f"{argument} has dtype {array.dtype}, expected {target.dtype}")
        target[...] = array

    def _stage_values(self, step: int, priority: Any, q_taken: Any, state_value: Any, final_value: Any) -> None:
        history = self._history
        if priority is not None:
            if self.table.n_step != 1:
                raise InvalidInput(
                    f"priority= is for n_step = 1, this table has {self.table.n_step}; pass q_taken= and state_value=, "
                    "then the writer computes it when the window closes"
                )
            self._stage_numbers("priority", history.priorities[step], priority)
            if (history.priorities[step] < 0).any():
                raise InvalidInput(f"priority must be >= 0, got {history.priorities[step].min()}")
            self._any_priorities = True
        else:
            history.priorities[step] = _UNKNOWN
        for argument, target, value in (
            ("q_taken", history.q_taken, q_taken),
            ("state_value", history.state_values, state_value),
            ("final_value", history.final_values, final_value),
        ):
            if value is None:
                target[step] = _UNKNOWN
            else:
                self._stage_numbers(argument, target[step], value)
                self._any_values = True

    def _stage_final_observations(self, ended: NDArray[np.bool_], infos: Any, step: int) -> None:
        for env in np.flatnonzero(ended).tolist():
            for path in self._obs_paths:
                leaf = self._history.leaves[f"next_observations/{path}" if path else "next_observations"]
                final = _as_numpy(final_observation(infos, env, path))
                # With the ellipsis also an observation of shape () is a view.
                self._stage_array(f"infos['final_obs'][{env}]", leaf[step, env, ...], final)

    def _flags(self, argument: str, value: Any) -> NDArray[np.bool_]:
        if value is None:
            return np.zeros(self.num_envs, np.bool_)
        array = _as_numpy(value)
        if array.shape != (self.num_envs,):
            if array.shape not in _same_rows((self.num_envs,)):
                raise InvalidInput(f"{argument} has shape {array.shape}, expected ({self.num_envs},)")
            array = array.reshape(self.num_envs)
        if array.dtype == np.bool_:
            return array.copy()
        flags: NDArray[np.bool_] = array != 0
        if not ((array == 1) | ~flags).all():
            raise InvalidInput(f"{argument} must be bool, 0 or 1, got {array}")
        return flags

    # ---- emitting ------------------------------------------------------------------------------------------

    def _finish(self, timeout_s: float | None, *, close: bool) -> None:
        if self._closed:
            raise Closed("this writer was closed")
        self._channel.connection.check()
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + timeout_s
        if not self._emit(deadline_s, close=close):
            raise self._deadline("close" if close else "flush", timeout_s)
        while self._acknowledged < self._sequence:
            if not self._receive(deadline_s):
                raise self._deadline("close" if close else "flush", timeout_s)

    def _emit(self, deadline_s: float | None, *, close: bool = False) -> bool:
        """Write and commit what is complete. False: there were no rows for it by the deadline (None: at once)."""
        history = self._history
        steps = slice(0, history.num_steps)
        windows = self._windows(steps, close)
        while self._receive(None):
            pass
        while len(self._reserved) < len(windows):
            if deadline_s is None or not self._receive(deadline_s):
                return False
        episodes = self.stats_tracker.drain()
        if len(windows) or episodes:
            rows, self._reserved = self._reserved[: len(windows)], self._reserved[len(windows) :]
            self._write(rows, windows)
            self._sequence += 1
            commit = Commit(
                epoch=self._channel.connection.epoch,
                num_rows=len(windows),
                sequence=self._sequence,
                parameter_version=self._parameter_version(),
                num_wanted=len(windows),
                td_errors=self._td_errors(windows, steps),
                episodes=episodes,
            )
            self._channel.send(commit.encode())
            history.startable[windows.first, windows.envs] = False
        history.drop_finished()
        self._new_steps = 0
        return True

    def _windows(self, steps: slice, close: bool) -> Windows:
        history = self._history
        needs_next: bool | NDArray[np.bool_] = False
        if self._any_values:
            # The value of the state behind the window comes with the next step, unless there is none to come.
            needs_next = ~history.terminated[steps] & np.isnan(history.final_values[steps])
            needs_next &= ~np.isnan(history.state_values[steps])
            if self.autoreset != "next_step":
                needs_next &= ~history.cut[steps]
        return assemble(
            history.rewards[steps],
            history.terminated[steps],
            history.truncated[steps],
            history.cut[steps],
            history.startable[steps],
            n_step=self.table.n_step,
            gamma=self.table.gamma,
            needs_next=needs_next,
            close=close,
        )

    def _td_errors(self, windows: Windows, steps: slice) -> NDArray[np.float64] | None:
        history = self._history
        if not isinstance(self.table.sampler, Prioritized) or not (self._any_values or self._any_priorities):
            return None
        errors = td_errors(
            windows,
            history.q_taken[steps],
            history.state_values[steps],
            history.final_values[steps],
            cut=history.cut[steps],
            dummy=history.dummy[steps],
        )
        priorities = history.priorities[windows.first, windows.envs]
        return np.where(np.isnan(priorities), errors, priorities)

    def _write(self, rows: NDArray[np.int64], windows: Windows) -> None:
        for path, leaf in self._history.leaves.items():
            steps = windows.last if path.startswith("next_observations") else windows.first
            self._rows[path][rows] = leaf[steps, windows.envs]
        self._rows["rewards"][rows] = windows.rewards
        self._rows["dones"][rows] = windows.terminated
        self._rows["discounts"][rows] = windows.discounts
        self._rows["n_steps"][rows] = windows.n_steps
        self._rows["terminateds"][rows] = windows.terminated
        self._rows["truncateds"][rows] = windows.truncated

    def _receive(self, deadline_s: float | None) -> bool:
        """Take one grant; None does not wait."""
        timeout_s = 0.0 if deadline_s is None else max(0.0, deadline_s - time.monotonic())
        frame = self._channel.receive(timeout_s)
        if frame is None:
            return False
        grant = frames.decode_grant(frame)
        self._acknowledged = max(self._acknowledged, grant.acknowledged)
        self._reserved = np.concatenate((self._reserved, grant.rows)) if len(self._reserved) else grant.rows
        return True

    def _deadline(self, call: str, timeout_s: float) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"{call} on table {self._name!r} waited {timeout_s} s for the server to take rows: {self._explain()}"
        )


def _as_numpy(value: Any) -> NDArray[Any]:
    if type(value) is np.ndarray:
        return value
    if hasattr(value, "detach"):  # a tensor, known by its face: torch is not imported here
        value = value.detach().cpu().numpy()
    return np.asarray(value)


def _sum_of_squares(array: NDArray[Any]) -> float:
    flat = array.reshape(-1)
    return float(np.dot(flat, flat))


def _same_rows(shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Shapes that mean the same: (E, 1) for (E,), and without E for one environment."""
    if len(shape) == 1:
        return ((*shape, 1), ()) if shape[0] == 1 else ((*shape, 1),)
    return (shape[1:],) if shape and shape[0] == 1 else ()
