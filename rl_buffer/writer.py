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
from numpy.typing import NDArray

from rl_buffer import frames, messages
from rl_buffer.connection import Channel
from rl_buffer.episode_ends import Autoreset
from rl_buffer.errors import Closed, DeadlineExceeded, InvalidInput, RLBufferError
from rl_buffer.frames import Commit
from rl_buffer.replay_input import CopyRows, ReplayInput
from rl_buffer.stats_tracker import Episode, StatsTracker
from rl_buffer.tables import ReplayTable, StatsConfig


class ReplayWriter(ReplayInput):
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
        # A commit is at most a table: smaller chunks for a small one.
        chunk_size = min(chunk_size, table.capacity - table.n_step * num_envs)
        self._tracker = StatsTracker(
            num_envs, stats.window, stats.category, stats.extra_metrics_keys, stats.done_reason_keys
        )
        super().__init__(table, num_envs, autoreset, max(1, -(-chunk_size // num_envs)), self._tracker)
        self.timeout_s = timeout_s
        self._name = name
        self._channel = channel
        self._call = call
        self._rows = rows
        self._explain = explain
        self._parameter_version = parameter_version
        self._unsent_episodes: list[Episode] = []
        self._max_commit_rows = self._history.max_items
        self._reserved = np.empty(0, np.int64)
        self._sequence = 0
        self._acknowledged = 0
        self._closed = False
        call(messages.OpenWriter(channel.number, name, self._max_commit_rows, 2 * self._max_commit_rows))

    def _make_room(self) -> None:
        if self._closed:
            raise Closed("this writer was closed")
        self._channel.connection.check()
        if self._history.is_full and not self._emit(time.monotonic() + self.timeout_s):
            raise self._deadline("add", self.timeout_s)

    def _chunk_is_full(self) -> None:
        self._emit(deadline_s=None)

    def flush(self, timeout_s: float | None = None) -> None:
        """Publish all complete transitions and wait until the server has them.

        Raises:
            DeadlineExceeded: the table did not take them in time; they stay staged and nothing is lost.
        """
        self._finish(timeout_s, close=False)

    def close(self, timeout_s: float | None = None) -> None:
        """Publish everything, unfinished items as shorter ones, and give the rows back. Twice is fine.

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
        self._channel.leave(self._call)

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
        items = self._history.complete(close=close)
        if not self._reserve(len(items), deadline_s):
            return False
        self._unsent_episodes += self._tracker.drain()
        if len(items) or self._unsent_episodes:
            self._history.copy_rows(items, self._rows, self._reserved[: len(items)])
            self._send(len(items), self._history.td_errors(items))
        self._history.emitted(items)
        self._new_steps = 0
        return True

    def _commit(self, num_rows: int, copy_rows: CopyRows, td_errors: NDArray[np.float64] | None) -> None:
        if not self._reserve(num_rows, time.monotonic() + self.timeout_s):
            raise self._deadline("extend", self.timeout_s)
        copy_rows(self._rows, self._reserved[:num_rows])
        self._send(num_rows, td_errors)

    def _reserve(self, num_rows: int, deadline_s: float | None) -> bool:
        """Hold so many rows, by the deadline or (None) at once."""
        while self._receive(None):
            pass
        while len(self._reserved) < num_rows:
            if deadline_s is None or not self._receive(deadline_s):
                return False
        return True

    def _send(self, num_rows: int, td_errors: NDArray[np.float64] | None) -> None:
        """Publish the first reserved rows, which are written."""
        commit = Commit(
            epoch=self._channel.connection.epoch,
            num_rows=num_rows,
            sequence=self._sequence + 1,
            parameter_version=self._parameter_version(),
            num_wanted=num_rows,
            td_errors=td_errors,
            episodes=self._unsent_episodes,
        )
        self._channel.send(commit.encode())
        # Sent: from here on the rows are the server's. Had it failed, nothing would have changed.
        self._sequence += 1
        self._reserved = self._reserved[num_rows:]
        self._unsent_episodes = []

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
