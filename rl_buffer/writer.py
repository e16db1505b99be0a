"""`ReplayWriter`: one actor's steps, staged, made into n-step transitions, and written into its reserved rows.

    add -> StepHistory --a chunk of transitions--> reserved rows --Commit--> published
                                                      ^ Grant: the next rows

A chunk costs one vectorised pass and one message. The writer holds two chunks of rows, so that it fills one while the
commit of the other is under way. When the server is lost, what is staged stays here, and what was sent without being
acknowledged is sent again (`outbox`). No torch, no Numba. One thread at a time.
"""

import contextlib
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rl_buffer import messages
from rl_buffer.connection import Channel, ChannelUser
from rl_buffer.episode_ends import Autoreset
from rl_buffer.errors import Closed, DeadlineExceeded, InvalidInput, ServerLost
from rl_buffer.failpoints import reached
from rl_buffer.outbox import Outbox
from rl_buffer.replay_input import CopyRows, ReplayInput
from rl_buffer.stats_tracker import Episode, StatsTracker
from rl_buffer.tables import ReplayTable, StatsConfig

_CHUNK_STEPS = 96
_LEAST_CHUNK = 64
_CHUNK_NBYTES = 1 << 20
_HEADROOM_SHARE = 8  # a writer holds two chunks: four of them fit


def default_chunk_size(table: ReplayTable, num_envs: int) -> int:
    """Transitions per message of a writer that was not told: 96 steps, fewer where they are large or room is scarce.

    A message costs its writer 0.15 to 0.4 ms, an `add` 5 us, of 64 environments 10 us. Twice as many steps would save a
    tenth, and be twice as old when they appear in the table.
    """
    assert table.headroom is not None
    most = min(_CHUNK_NBYTES // table.layout.stride_nbytes, table.headroom // _HEADROOM_SHARE)
    return max(_LEAST_CHUNK, min(_CHUNK_STEPS * num_envs, most))


class ReplayWriter(ReplayInput, ChannelUser):
    """Adds transitions to one table. Made by `client.writer`.

    Not for several threads; make one writer per thread.
    """

    def __init__(
        self,
        channel: Channel,
        call: Callable[[Channel, messages.Request], messages.Reply],
        name: str,
        table: ReplayTable,
        stats: StatsConfig,
        *,
        num_envs: int,
        autoreset: Autoreset | None,
        chunk_size: int,
        timeout_s: float,
        explain: Callable[[], str],
        parameter_version: Callable[[], int],
    ) -> None:
        """Open the channel."""
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
        self._call = call
        self._explain = explain
        self._parameter_version = parameter_version
        self._unsent_episodes: list[Episode] = []
        self._outbox = Outbox(call, name, self._history.max_items, 2 * self._history.max_items)
        self._open(channel)
        reached("writer.opened")

    def _open(self, channel: Channel) -> None:
        self._outbox.open(channel)
        rows, _ = channel.connection.segments[self._name]
        self._rows = self.table.layout.view(rows.buffer, self.table.num_rows)
        self._channel = channel

    def _rescue(self) -> None:
        self._outbox.rescue()
        self._history.let_go()

    def _make_room(self) -> None:
        if self._closed:
            raise Closed("this writer was closed")
        self._channel.connection.check()
        if self._history.is_full and not self._emit(time.monotonic() + self.timeout_s):
            raise self._deadline("add", self.timeout_s)

    def _chunk_is_full(self) -> None:
        # The step is taken: what is wrong with the server is for a later call to say, before it does anything.
        with contextlib.suppress(DeadlineExceeded, ServerLost):
            self._emit(deadline_s=None)

    @property
    def num_acknowledged(self) -> int:
        """Transitions (or sequences) that a server has for certain, of all that were added; the oldest ones."""
        return self._outbox.num_acknowledged

    def flush(self, timeout_s: float | None = None) -> None:
        """Publish all complete transitions and wait until the server has them.

        Raises:
            DeadlineExceeded: the table did not take them in time; they stay staged and nothing is lost.
            ServerLost: the server ended; `Client.reconnect` keeps what it had not acknowledged.
        """
        self._finish(timeout_s, close=False)

    def close(self, timeout_s: float | None = None) -> None:
        """Publish everything, unfinished items as shorter ones, and give the rows back. Twice is fine.

        Raises:
            DeadlineExceeded: the table did not take them in time; the writer stays open and nothing is lost.
            ServerLost: the server ended; the writer stays open, and `Client.reconnect` keeps what was not acknowledged.
        """
        if self._closed:
            return
        self._finish(timeout_s, close=True)
        reached("writer.closing")
        self._leave()

    def _finish(self, timeout_s: float | None, *, close: bool) -> None:
        if self._closed:
            raise Closed("this writer was closed")
        self._channel.check_server()
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + timeout_s
        if not (self._emit(deadline_s, close=close) and self._outbox.settle(deadline_s)):
            raise self._deadline("close" if close else "flush", timeout_s)

    def _emit(self, deadline_s: float | None, *, close: bool = False) -> bool:
        """Write and commit what is complete. False: there were no rows for it by the deadline (None: at once)."""
        items = self._history.complete(close=close)
        if not self._reserve(len(items), deadline_s):
            return False
        self._unsent_episodes += self._tracker.drain()
        if len(items) or self._unsent_episodes:
            self._history.copy_rows(items, self._rows, self._outbox.reserved[: len(items)])
            self._send(len(items), self._history.td_errors(items))
        self._history.emitted(items)
        self._new_steps = 0
        return True

    def _commit(self, num_rows: int, copy_rows: CopyRows, td_errors: NDArray[np.float64] | None) -> None:
        if not self._reserve(num_rows, time.monotonic() + self.timeout_s):
            raise self._deadline("extend", self.timeout_s)
        copy_rows(self._rows, self._outbox.reserved[:num_rows])
        self._send(num_rows, td_errors)

    def _reserve(self, num_rows: int, deadline_s: float | None) -> bool:
        """Hold so many rows for new items, by the deadline or (None) at once; what must be sent again is sent first."""
        reached("writer.reserving")
        held = self._outbox.send_again(deadline_s) and self._outbox.reserve(num_rows, deadline_s)
        if held:
            reached("writer.reserved")
        return held

    def _send(self, num_rows: int, td_errors: NDArray[np.float64] | None) -> None:
        """Publish the first reserved rows, which are written."""
        reached("writer.written")
        self._outbox.send(num_rows, self._parameter_version(), td_errors, self._unsent_episodes)
        reached("writer.committed")
        self._unsent_episodes = []

    def _deadline(self, call: str, timeout_s: float) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"{call} on table {self._name!r} waited {timeout_s} s for the server to take rows: {self._explain()}"
        )
