"""What a writer may write, what it has sent, and what it may have to send again.

    commits    1 2 3 | 4 5 6 | 7 8
           forgotten | sent  | to be sent again, before anything new
        acknowledged ^       ^ sequence

Grants bring rows, commits give them away. Of a commit that is not acknowledged its message and the numbers of its rows
are kept: what is in them lies in shared memory, which stays mapped when the server ends. `rescue` copies it from there,
and after `open` on a channel of the next server it is written into other rows. No torch. One thread at a time.
"""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from rl_buffer import frames, messages
from rl_buffer.connection import Channel
from rl_buffer.errors import RLBufferError
from rl_buffer.failpoints import reached
from rl_buffer.frames import Commit
from rl_buffer.stats_tracker import Episode

_NO_ROWS = np.empty(0, np.int64)
_WRITER_ID_NBYTES = 16

Words: TypeAlias = NDArray[np.int64]  # [N, stride / 8], whole rows


@dataclass(slots=True)
class _Kept:
    """A commit that is not acknowledged."""

    commit: Commit
    rows: NDArray[np.int64]  # [N] where its items are
    generations: NDArray[np.int64]  # [N] of these rows before it was sent
    words: Words | None = None  # [N, stride / 8] instead, once the server that it was sent to is lost
    num_published: int = 0  # rows that it had at first and that are left out

    def rescue(self, block: Words, generations: NDArray[np.int64]) -> None:
        """Copy the items out of the memory of a server that is lost, unless they are here already."""
        if self.words is None:
            words = block[self.rows]
            # A look after the copy. A row that was published is one generation on; what is more has been evicted, and
            # that goes in the order of publication.
            num_evicted = np.count_nonzero(generations[self.rows] - self.generations > 1)
            self.words = words
            self._leave_out(int(num_evicted))

    def resume(self, num_published: int, *, forget_version: bool) -> None:
        """Leave out the first rows, of those that it had at first: the server has them."""
        self._leave_out(max(0, num_published - self.num_published))
        self.num_published = num_published
        if forget_version:
            self.commit = self.commit._replace(parameter_version=0)

    def _leave_out(self, num_rows: int) -> None:
        assert self.words is not None
        self.words, td_errors = self.words[num_rows:], self.commit.td_errors
        self.commit = self.commit._replace(
            num_rows=len(self.words),
            num_wanted=len(self.words),
            td_errors=None if td_errors is None else td_errors[num_rows:],
        )
        self.num_published += num_rows


class Outbox:
    """The rows and commits of one writer, over all the servers that it writes to."""

    def __init__(
        self,
        call: Callable[[Channel, messages.Request], messages.Reply],
        table: str,
        max_commit_rows: int,
        num_wanted: int,
    ) -> None:
        """Remember what to ask for; `open` says where."""
        self.reserved = _NO_ROWS  # to be written, in this order
        self.acknowledged = 0  # commits up to this one are published
        self.sequence = 0  # of the last commit sent on this channel
        self._call = call
        self._table = table
        self._max_commit_rows = max_commit_rows
        self._num_wanted = num_wanted
        self._writer_id = os.urandom(_WRITER_ID_NBYTES)
        self._kept: deque[_Kept] = deque()  # the first has number `acknowledged` + 1
        self._epoch = 0
        self._num_grants = 0  # on this channel
        self._num_items = 0  # that were ever sent

    def open(self, channel: Channel) -> bool:
        """Write on this channel from now on. After `rescue`, what the server has of the kept commits is dropped.

        Returns:
            Whether its server is of another epoch than the one before, if there was one: versions of parameters begin
            anew, and those that were counted there are forgotten.

        Raises:
            RequestRefused, DeadlineExceeded, ServerLost: nothing has changed.
        """
        opened = self._call(
            channel,
            messages.OpenWriter(
                channel.number,
                self._table,
                self._max_commit_rows,
                self._num_wanted,
                self._writer_id,
                self.acknowledged,
            ),
        )
        assert isinstance(opened, messages.Opened)
        rows, generations = channel.connection.segments[self._table]
        self._generations: NDArray[np.int64] = generations.array("int64")
        self.block: Words = rows.array("int64").reshape(len(self._generations), -1)
        self._channel = channel
        self._num_grants = 0
        for _ in range(min(opened.sequence - self.acknowledged, len(self._kept))):
            self._kept.popleft()
        num_published, is_other_epoch = opened.num_published, self._epoch not in (0, channel.connection.epoch)
        for kept in self._kept:
            kept.resume(num_published, forget_version=is_other_epoch)
            num_published = 0  # they are published in order
        self.acknowledged = self.sequence = opened.sequence
        self._epoch = channel.connection.epoch
        return is_other_epoch

    def rescue(self) -> None:
        """Copy what is not acknowledged out of the memory of a lost server. Nothing is written there any more."""
        with contextlib.suppress(RLBufferError):
            while self._receive(0.0):  # it may have acknowledged some before it ended
                pass
        for kept in self._kept:
            kept.rescue(self.block, self._generations)
        self.reserved = _NO_ROWS

    @property
    def num_acknowledged(self) -> int:
        """Items, of all that were ever sent, that are known to be published."""
        return self._num_items - sum(kept.commit.num_rows for kept in self._kept)

    @property
    def rescued(self) -> Iterator[Words]:
        """The items of each commit that is to be sent again; [N, stride / 8], may be changed."""
        return (kept.words for kept in self._kept if kept.words is not None)

    def reserve(self, num_rows: int, deadline_s: float | None) -> bool:
        """Hold so many rows, by the deadline or (None) at once."""
        while self._receive(0.0):
            pass
        while len(self.reserved) < num_rows:
            if deadline_s is None or not self._receive(max(0.0, deadline_s - time.monotonic())):
                return False
        return True

    def send(
        self,
        num_rows: int,
        parameter_version: int,
        td_errors: NDArray[np.float64] | None,
        episodes: list[Episode],
    ) -> None:
        """Publish the first reserved rows, which are written; `send_again` comes first. If it raises, it did nothing.

        Raises:
            DeadlineExceeded, ServerLost: see `Channel.send`.
        """
        commit = Commit(0, num_rows, 0, parameter_version, num_rows, td_errors, episodes)
        self._kept.append(self._sent(commit))
        self._num_items += num_rows

    def send_again(self, deadline_s: float | None) -> bool:
        """Send what other servers did not acknowledge. False: there were no rows for it by the deadline (None: now)."""
        while (num_sent := self.sequence - self.acknowledged) < len(self._kept):
            kept = self._kept[num_sent]
            assert kept.words is not None
            if not self.reserve(len(kept.words), deadline_s):
                return False
            self.block[self.reserved[: len(kept.words)]] = kept.words
            sent = self._sent(kept.commit)
            kept.rows, kept.generations, kept.words = sent.rows, sent.generations, None
        return True

    def settle(self, deadline_s: float) -> bool:
        """Wait until all that was sent is acknowledged; False at the deadline."""
        while self.acknowledged < self.sequence:
            if not self._receive(max(0.0, deadline_s - time.monotonic())):
                return False
        return True

    def _sent(self, commit: Commit) -> _Kept:
        """Send it with the next number and the first reserved rows."""
        rows = self.reserved[: commit.num_rows]
        generations = self._generations[rows]  # before, because the server raises them after
        commit = commit._replace(epoch=self._epoch, sequence=self.sequence + 1)
        self._channel.send(commit.encode())
        # From here on the rows are the server's. Had it failed, nothing would have changed.
        self.sequence += 1
        self.reserved = self.reserved[commit.num_rows :]
        return _Kept(commit, rows, generations)

    def _receive(self, timeout_s: float) -> bool:
        """Take one grant."""
        frame = self._channel.receive(timeout_s)
        if frame is None:
            return False
        # A grant that was lost or repeated would have other rows published than those that were written.
        grant = frames.decode_grant(frame, self._num_grants + 1)
        self._num_grants += 1
        reached("writer.granted")
        if grant.acknowledged > self.acknowledged:
            for _ in range(grant.acknowledged - self.acknowledged):
                self._kept.popleft()
            self.acknowledged = grant.acknowledged
            reached("writer.acknowledged")
        self.reserved = np.concatenate((self.reserved, grant.rows)) if len(self.reserved) else grant.rows
        return True
