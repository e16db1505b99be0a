"""One rollout table's bookkeeping: which fragment is being written, finished, read, and who may begin another.

    FREE --reserve--> WRITING --commit--> FINISHED --lease--> READING --finish--> FREE
                      WRITING --release--> FREE       (the writer is gone)
                                          FINISHED --(too much lag)--> FREE
                                          READING --give_back--> FINISHED, before all others     (the learner is gone)

Finished fragments are handed out in the order of their commits; where writers wait rather than be late, in the order in
which they were begun, so that none is overtaken by others of a faster writer. A fragment is handed out again only if
its reader died before `finish`. Only the server changes any of this; contents, sockets and clocks are not known here.
"""

from collections import deque
from typing import NamedTuple

import numpy as np

from rl_buffer.allocator import RowQueue, Rows
from rl_buffer.errors import InvalidInput
from rl_buffer.tables import RolloutTable


class Fragment(NamedTuple):
    """A finished fragment."""

    row: int
    number: int  # in the order of hand-out
    version: int  # the oldest that one of its steps was made with


class RolloutTableState:
    """The table's changing part. Every method either does all of its work or raises and does none.

    Invariant: num_free + num_writing + len(self) + num_reading == num_fragments.
    """

    def __init__(self, config: RolloutTable) -> None:
        self.config = config
        self.num_commits = 0
        self.num_handed_out = 0  # one given back and handed out again counts twice
        self.num_dropped = 0  # for too much lag
        self._waits = config.when_late == "wait"
        self._allowed = config.num_fragments  # in flight
        if config.max_version_lag is not None and self._waits:
            # Of one that is begun now, at most this many less one are handed out before it, as they are handed out in
            # that order: at most max_version_lag whole updates.
            self._allowed = (config.max_version_lag + 1) * config.fragments_per_update
        self._num_begun = 0
        self._writing: dict[int, int] = {}  # row -> how many were begun before it
        self._free = RowQueue(config.num_fragments)
        self._free.push(np.arange(config.num_fragments))
        self._finished: deque[Fragment] = deque()  # by number
        self._reading: dict[int, Fragment] = {}  # by row

    def __len__(self) -> int:
        """Finished fragments that nobody reads."""
        return len(self._finished)

    @property
    def num_free(self) -> int:
        """Fragments that hold nothing."""
        return self._free.length

    @property
    def num_writing(self) -> int:
        """Fragments that writers hold."""
        return len(self._writing)

    @property
    def num_reading(self) -> int:
        """Fragments that readers hold."""
        return len(self._reading)

    @property
    def num_reservable(self) -> int:
        """Fragments that writers may begin now."""
        in_flight = self.num_writing + len(self) + self.num_reading
        return max(0, min(self.num_free, self._allowed - in_flight))

    def reserve(self, num_fragments: int) -> Rows:
        """Let a writer begin.

        Raises:
            InvalidInput: more than `num_reservable`. Nothing changes.
        """
        if not 0 <= num_fragments <= self.num_reservable:
            raise InvalidInput(f"cannot begin {num_fragments} fragments: {self.num_reservable} may be begun now")
        rows = self._free.pop(num_fragments)
        for row in rows.tolist():
            self._writing[row] = self._num_begun
            self._num_begun += 1
        return rows

    def num_insertable(self, num_fragments: int) -> int:
        """How many of `num_fragments` may be committed now: all."""
        return num_fragments

    def release(self, rows: Rows) -> None:
        """Take back fragments that will never be finished."""
        for row in rows.tolist():
            del self._writing[row]
        self._free.push(rows)

    def commit(self, rows: Rows, version: int) -> None:
        """Queue fragments that are written, whose oldest step was made with parameters `version`."""
        for row in rows.tolist():
            begun = self._writing.pop(row)
            self._queue([Fragment(row, begun if self._waits else self.num_commits, version)])
            self.num_commits += 1

    def lease(self, most: int, newest_version: int) -> list[Fragment]:
        """Hand out up to `most` finished fragments, in their order, and drop those with too much lag."""
        leased: list[Fragment] = []
        limit = None if self._waits else self.config.max_version_lag
        end = min(self._writing.values(), default=self._num_begun) if self._waits else self.num_commits
        while self._finished and len(leased) < most and self._finished[0].number < end:
            fragment = self._finished.popleft()
            if limit is not None and newest_version - fragment.version > limit:
                self.num_dropped += 1
                self._free.push(np.array([fragment.row]))
            else:
                self._reading[fragment.row] = fragment
                leased.append(fragment)
        self.num_handed_out += len(leased)
        return leased

    def finish(self, rows: Rows) -> None:
        """Free fragments that were read.

        Raises:
            InvalidInput: one is not being read, or named twice. Nothing changes.
        """
        self._require_reading(rows)
        for row in rows.tolist():
            del self._reading[row]
        self._free.push(rows)

    def give_back(self, rows: Rows) -> None:
        """Queue fragments again whose reader is gone, where they were.

        Raises:
            InvalidInput: one is not being read, or named twice. Nothing changes.
        """
        self._require_reading(rows)
        self._queue([self._reading.pop(row) for row in rows.tolist()])

    def clear(self) -> None:
        """Drop what is finished; what is being written or read stays."""
        self._free.push(np.array([fragment.row for fragment in self._finished], np.int64))
        self._finished.clear()

    def _queue(self, fragments: list[Fragment]) -> None:
        in_order = sorted([*self._finished, *fragments], key=lambda fragment: fragment.number)
        self._finished = deque(in_order)

    def _require_reading(self, rows: Rows) -> None:
        listed = rows.tolist()
        for row in listed:
            if row not in self._reading:
                raise InvalidInput(f"fragment {row} is not being read")
        if len(set(listed)) != len(listed):
            raise InvalidInput(f"fragments {listed} are named twice")
