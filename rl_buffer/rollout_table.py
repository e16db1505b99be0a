"""One rollout table's bookkeeping: which fragment is being written, finished, read, and who may begin another.

    FREE --reserve--> WRITING --commit--> FINISHED --lease--> READING --finish--> FREE
                      WRITING --release--> FREE       (the writer is gone)
                                          FINISHED --(too much lag)--> FREE
                                          READING --give_back--> FINISHED, before all others     (the learner is gone)

Finished fragments are handed out in the order of their commits; where writers wait rather than be late, in the order in
which they were begun, so that none is overtaken by others of a faster writer. A fragment is handed out again only if
its reader died before `finish`. As in a replay table a row's generation is odd while it is finished or read, and is
raised at both ends of that time. Only the server changes any of this; contents, sockets and clocks are not known here.
"""

import sys
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rl_buffer.allocator import RowQueue, Rows, require_each_once
from rl_buffer.errors import InvalidInput
from rl_buffer.tables import RolloutTable, TableCut

_NEVER = sys.maxsize  # number of a fragment that will not be committed, though somebody may write into it


class Fragment(NamedTuple):
    """A finished fragment."""

    row: int
    number: int  # in the order of hand-out
    version: int  # the oldest that one of its steps was made with


class Lease(NamedTuple):
    """What `RolloutTableState.lease` did."""

    fragments: list[Fragment]  # handed out
    dropped: Rows  # for too much lag


class RolloutTableState:
    """The table's changing part. Every method either does all of its work or raises and does none.

    Invariant: num_free + num_held + num_writing + len(self) + num_reading == num_fragments.
    """

    def __init__(self, config: RolloutTable, generations: NDArray[np.int64] | None = None) -> None:
        """Start empty; `generations` are int64 [num_fragments], even, zeros by default."""
        self.config = config
        self.generations = np.zeros(config.num_fragments, np.int64) if generations is None else generations
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
        self._uncopied: list[int] = []  # rows that a checkpoint still needs
        self._held: list[int] = []  # those of them that hold nothing any more

    def __len__(self) -> int:
        """Finished fragments that nobody reads."""
        return len(self._finished)

    @property
    def num_free(self) -> int:
        """Fragments that hold nothing."""
        return self._free.length

    @property
    def num_held(self) -> int:
        """Fragments that nobody gets before they have been copied."""
        return len(self._held)

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
        num_awaited = sum(begun < _NEVER for begun in self._writing.values())
        in_flight = num_awaited + len(self) + self.num_reading
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

    def number_of(self, row: int) -> int:
        """Of a fragment that is being written: its place in the order of hand-out if it is committed now."""
        return self._writing[row] if self._waits else self.num_commits

    def commit(self, rows: Rows, version: int) -> None:
        """Queue fragments that are written, whose oldest step was made with parameters `version`."""
        for row in rows.tolist():
            fragment = Fragment(row, self.number_of(row), version)
            del self._writing[row]
            self.generations[row] += 1
            self._queue([fragment])
            self.num_commits += 1

    def lease(self, most: int, newest_version: int) -> Lease:
        """Hand out up to `most` finished fragments, in their order, and drop those with too much lag."""
        leased: list[Fragment] = []
        dropped: list[int] = []
        # Where writers wait it happens too: to what a learner held that published, and died before its release.
        limit = self.config.max_version_lag
        end = min(self._writing.values(), default=self._num_begun) if self._waits else self.num_commits
        while self._finished and len(leased) < most and self._finished[0].number < end:
            fragment = self._finished.popleft()
            if limit is not None and newest_version - fragment.version > limit:
                dropped.append(fragment.row)
            else:
                self._reading[fragment.row] = fragment
                leased.append(fragment)
        self.num_handed_out += len(leased)
        self.num_dropped += len(dropped)
        lease = Lease(leased, np.array(dropped, np.int64))
        self._retire(lease.dropped)
        return lease

    def finish(self, rows: Rows) -> None:
        """Free fragments that were read.

        Raises:
            InvalidInput: one is not being read, or named twice. Nothing changes.
        """
        require_each_once(rows, self._reading, "fragment")
        for row in rows.tolist():
            del self._reading[row]
        self._retire(rows)

    def give_back(self, rows: Rows) -> None:
        """Queue fragments again whose reader is gone, where they were.

        Raises:
            InvalidInput: one is not being read, or named twice. Nothing changes.
        """
        require_each_once(rows, self._reading, "fragment")
        self._queue([self._reading.pop(row) for row in rows.tolist()])

    def clear(self) -> None:
        """Drop what is finished; what is being written or read stays."""
        self._retire(np.array([fragment.row for fragment in self._finished], np.int64))
        self._finished.clear()

    def _retire(self, rows: Rows) -> None:
        # The generation first: a writer copies what it sent and then looks whether it was still there.
        self.generations[rows] += 1
        self._held += rows.tolist()
        self.copied(0)

    def resume(
        self,
        finished: list[Fragment],
        reading: list[Fragment],
        abandoned: Rows,
        num_commits: int,
        num_handed_out: int,
        num_dropped: int,
    ) -> None:
        """Take over what an earlier server had, for a new table. Generations of finished fragments are odd already.

        Args:
            finished: in any order.
            reading: finished ones that somebody still reads.
            abandoned: still held by somebody who will not commit them; nothing waits for them until they are released.
            num_commits: so far.
            num_handed_out: likewise.
            num_dropped: likewise.
        """
        numbers = [fragment.number for fragment in (*finished, *reading)]
        self.num_commits, self.num_handed_out, self.num_dropped = num_commits, num_handed_out, num_dropped
        self._num_begun = max(numbers, default=-1) + 1
        self._queue(finished)
        self._reading = {fragment.row: fragment for fragment in reading}
        self._writing = dict.fromkeys(abandoned.tolist(), _NEVER)
        taken = {*(fragment.row for fragment in finished), *self._reading, *self._writing}
        rows = self._free.pop(self.num_free)
        self._free.push(rows[[row not in taken for row in rows.tolist()]])

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def freeze(self) -> TableCut:
        """Take everything as it is for a checkpoint; fragments stay as they are until they are `copied`.

        One that is being read counts as finished: its reader may be gone when it is restored.
        """
        fragments = sorted((*self._finished, *self._reading.values()), key=lambda fragment: fragment.number)
        self._uncopied = [fragment.row for fragment in fragments]
        counts = (self.num_commits, self.num_handed_out, self.num_dropped)
        values = {"fragments": [(fragment.number, fragment.version) for fragment in fragments], "counts": counts}
        return TableCut([np.array(self._uncopied, np.int64)], None, values)

    def copied(self, num_fragments: int) -> None:
        """`num_fragments` more of the cut, in its order, have been copied or need not be."""
        del self._uncopied[:num_fragments]
        free = [row for row in self._held if row not in self._uncopied]
        self._held = [row for row in self._held if row in self._uncopied]
        self._free.push(np.array(free, np.int64))

    def restore_cut(self, num_rows: int, masses: object, values: Mapping[str, Any]) -> None:
        """Take over what `freeze` returned, for a new table whose first `num_rows` rows were filled in that order.

        Raises:
            InvalidInput: it contradicts itself. Nothing changes.
        """
        fragments = [Fragment(row, *map(int, pair)) for row, pair in enumerate(values["fragments"])]
        num_commits, num_handed_out, num_dropped = map(int, values["counts"])
        numbers = [fragment.number for fragment in fragments]
        if not len(fragments) == num_rows <= self.num_free or numbers != sorted(set(numbers)):
            raise InvalidInput(f"{num_rows} fragments have the numbers {numbers}")
        self.generations[:num_rows] += 1
        self.resume(fragments, [], np.zeros(0, np.int64), num_commits, num_handed_out, num_dropped)

    def _queue(self, fragments: list[Fragment]) -> None:
        in_order = sorted([*self._finished, *fragments], key=lambda fragment: fragment.number)
        self._finished = deque(in_order)
