"""`ReplayWriter`: one actor's steps, staged, made into n-step transitions, and written into its reserved rows.

    add -> StepHistory --a chunk of transitions--> reserved rows --Commit--> published
                                                      ^ Grant: the next rows

A chunk costs one vectorised pass and one message. The writer holds two chunks of rows, so that it fills one while the
commit of the other is under way. No torch, no Numba. One thread at a time.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rl_buffer import frames, messages
from rl_buffer.connection import Channel
from rl_buffer.episode_ends import Autoreset
from rl_buffer.errors import Closed, DeadlineExceeded, InvalidInput, RLBufferError
from rl_buffer.frames import Commit
from rl_buffer.inputs import as_flags
from rl_buffer.stats_tracker import Episode, StatsTracker
from rl_buffer.step_history import StepHistory
from rl_buffer.tables import ReplayTable, StatsConfig


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
        # A commit is at most a table: smaller chunks for a small one.
        chunk_size = min(chunk_size, table.capacity - table.n_step * num_envs)
        self._chunk_steps = max(1, -(-chunk_size // num_envs))
        # A start waits for n steps at most, one of them for the value of the state behind its window.
        self._history = StepHistory(table, num_envs, autoreset, self._chunk_steps + table.n_step)
        self._new_steps = 0
        self._unsent_episodes: list[Episode] = []
        self._max_commit_rows = self._history.capacity * num_envs
        self._reserved = np.empty(0, np.int64)
        self._sequence = 0
        self._acknowledged = 0
        self._closed = False
        call(messages.OpenWriter(channel.number, name, self._max_commit_rows, 2 * self._max_commit_rows))

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
        if self._history.is_full and not self._emit(time.monotonic() + self.timeout_s):
            raise self._deadline("add", self.timeout_s)
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
        )
        # The last thing that can refuse: after it the step is taken.
        self.stats_tracker.update(
            staged.rewards,
            staged.ended,
            metrics=metrics,
            done_reasons=done_reasons,
            mask=None if staged.dummy is None else ~staged.dummy,
        )
        self._history.accept(staged)
        self._new_steps += 1
        if self._new_steps >= self._chunk_steps:
            self._emit(deadline_s=None)

    def on_reset(self, mask: ArrayLike | None = None) -> None:
        """Say that environments were reset by hand: nothing is joined across, running returns are dropped.

        Args:
            mask: (E,) bool; None means all. After an episode's end, or before the first step, it changes nothing.
        """
        reset = np.ones(self.num_envs, np.bool_) if mask is None else as_flags("mask", mask, self.num_envs)
        self.stats_tracker.discard(reset)
        self._history.cut(reset)

    def flush(self, timeout_s: float | None = None) -> None:
        """Publish all complete transitions and wait until the server has them.

        Raises:
            DeadlineExceeded: the table did not take them in time; they stay staged and nothing is lost.
        """
        self._finish(timeout_s, close=False)

    def close(self, timeout_s: float | None = None) -> None:
        """Publish everything, unfinished windows as shorter ones, and give the rows back. Twice is fine.

        Raises:
            DeadlineExceeded: the table did not take them in time; the writer stays open and nothing is lost.
            ServerLost: the server ended; what it had not acknowledged is lost.
        """
        if self._closed:
            return
        self._finish(timeout_s, close=True)
        self._leave()

    def __enter__(self) -> "ReplayWriter":
        return self

    def __exit__(self, exception_type: object, *_: object) -> None:
        if exception_type is None:
            self.close()
        elif not self._closed:
            # The rows go back, what is staged is dropped; and the block's error matters more than one from here.
            with contextlib.suppress(RLBufferError):
                self._leave()

    def _leave(self) -> None:
        self._closed = True
        try:
            self._call(messages.CloseChannel(self._channel.number))
        finally:
            self._channel.close()

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
        windows = self._history.windows(close=close)
        while self._receive(None):
            pass
        while len(self._reserved) < len(windows):
            if deadline_s is None or not self._receive(deadline_s):
                return False
        self._unsent_episodes += self.stats_tracker.drain()
        if len(windows) or self._unsent_episodes:
            self._history.copy_rows(windows, self._rows, self._reserved[: len(windows)])
            commit = Commit(
                epoch=self._channel.connection.epoch,
                num_rows=len(windows),
                sequence=self._sequence + 1,
                parameter_version=self._parameter_version(),
                num_wanted=len(windows),
                td_errors=self._history.td_errors(windows),
                episodes=self._unsent_episodes,
            )
            self._channel.send(commit.encode())
            # Sent: from here on the rows are the server's. Had it failed, nothing would have changed.
            self._sequence += 1
            self._reserved = self._reserved[len(windows) :]
            self._unsent_episodes = []
        self._history.emitted(windows)
        self._new_steps = 0
        return True

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
