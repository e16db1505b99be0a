"""Row bookkeeping for one table: which rows are free, which are written, and in what order they were committed.

    FREE --reserve--> RESERVED --commit--> COMMITTED --evict--> FREE
                      RESERVED --release--> FREE

While a table is copied, the rows that were committed when that began are frozen: once evicted they are free, and yet
not reserved before they have been copied. Both go from the oldest to the newest, so that counters say which they are:

    frozen rows:   oldest ... copied ... evicted ... newest
                                 |  held  |

Only the server (or the in-process buffer) mutates it. There is no head pointer that a stopped writer could block:
its rows stay out of both queues, and everything else goes around them. No torch, no sockets, no clock.
"""

from collections.abc import Container

import numpy as np
from numpy.typing import NDArray

from rl_buffer.errors import InvalidInput

Rows = NDArray[np.int64]


def require_each_once(rows: Rows, held: Container[int], what: str) -> None:
    """Refuse rows of which one is not held, or named twice.

    Args:
        rows: [N].
        held: those that may be named.
        what: they are, in messages: "fragment".

    Raises:
        InvalidInput: which.
    """
    listed = rows.tolist()
    for row in listed:
        if row not in held:
            raise InvalidInput(f"{what} {row} is not being read")
    if len(set(listed)) != len(listed):
        raise InvalidInput(f"{what}s {listed} are named twice")


class RowQueue:
    """A bounded first-in first-out queue of row numbers; both ends O(n) for n rows, whatever is in it.

    Single rows, not runs: a chunk of 64 rows costs two slice copies of 512 B, and nothing ever fragments.
    """

    def __init__(self, capacity: int) -> None:
        self._ring = np.empty(capacity, np.int64)
        self._head = 0
        self.length = 0  # rows in the queue

    def push(self, rows: Rows) -> None:
        """Append rows; the caller knows that they fit."""
        capacity, num_rows = len(self._ring), len(rows)
        assert self.length + num_rows <= capacity, "a row was queued twice"
        tail = (self._head + self.length) % capacity
        first = min(num_rows, capacity - tail)
        self._ring[tail : tail + first] = rows[:first]
        self._ring[: num_rows - first] = rows[first:]
        self.length += num_rows

    def peek(self, num_rows: int) -> Rows:
        """Copy the oldest `num_rows` rows without taking them."""
        assert num_rows <= self.length
        stop = self._head + num_rows
        if stop <= len(self._ring):
            return self._ring[self._head : stop].copy()
        return np.concatenate((self._ring[self._head :], self._ring[: stop - len(self._ring)]))

    def views(self) -> list[Rows]:
        """All rows, oldest first, as two views that the next push may overwrite; the second is empty mostly. O(1)."""
        stop = self._head + self.length
        wrapped = max(0, stop - len(self._ring))
        return [self._ring[self._head : stop - wrapped], self._ring[:wrapped]]

    def pop(self, num_rows: int) -> Rows:
        """Take the oldest `num_rows` rows."""
        rows = self.peek(num_rows)
        self._head = (self._head + num_rows) % len(self._ring)
        self.length -= num_rows
        return rows


class RowAllocator:
    """Hands out rows, and evicts the oldest committed ones when a later commit needs their place.

    Invariants: num_committed <= capacity, num_reserved <= headroom, and
    num_free + num_reserved + num_committed == capacity + headroom == num_rows.
    So a full table keeps exactly `capacity` committed rows however many writers hold reservations.
    """

    def __init__(self, capacity: int, headroom: int) -> None:
        if capacity < 1 or headroom < 1:
            raise InvalidInput(f"capacity and headroom must be >= 1 row, got {capacity} and {headroom}")
        self.capacity = capacity
        self.headroom = headroom
        self.num_rows = capacity + headroom
        self.num_reserved = 0
        self._free = RowQueue(self.num_rows)
        self._free.push(np.arange(self.num_rows, dtype=np.int64))
        self._committed = RowQueue(self.num_rows)
        self._num_uncopied = 0  # frozen rows
        self._num_unevicted = 0  # frozen rows
        self._num_blocked = 0  # rows of `_free` from the first held one on

    @property
    def num_committed(self) -> int:
        """Rows that can be sampled."""
        return self._committed.length

    @property
    def num_reservable(self) -> int:
        """Rows that `reserve` can hand out now."""
        num_left = self.headroom - self.num_reserved
        return min(num_left, self._free.length - self._num_blocked) if self._num_blocked else num_left

    @property
    def num_held(self) -> int:
        """Free rows that must be copied before they are reserved."""
        return max(0, self._num_uncopied - self._num_unevicted)

    def reserve(self, num_rows: int) -> Rows:
        """Take `num_rows` free rows for one writer, the longest free first.

        Raises:
            InvalidInput: more than `num_reservable`. Nothing changes.
        """
        if not 0 <= num_rows <= self.num_reservable:
            raise InvalidInput(f"cannot reserve {num_rows} rows: {self.num_reservable} of {self.headroom} are left")
        self.num_reserved += num_rows
        return self._free.pop(num_rows)

    def commit(self, rows: Rows) -> Rows:
        """Publish reserved rows as the newest; return the rows that this evicted, oldest first.

        The evicted rows are free from here on, so the caller must take them out of the sampler and bump their
        generations before it calls `reserve` again.

        Raises:
            InvalidInput: more rows than `capacity`. Nothing changes.
        """
        if len(rows) > self.capacity:
            raise InvalidInput(f"cannot commit {len(rows)} rows at once: capacity is {self.capacity}")
        evicted = self._evict(max(0, self.num_committed + len(rows) - self.capacity))
        self._committed.push(rows)
        self.num_reserved -= len(rows)
        return evicted

    def release(self, rows: Rows) -> None:
        """Free reserved rows that will not be committed."""
        self.num_reserved -= len(rows)
        self._free.push(rows)
        if self._num_blocked:  # these too, until the held ones before them are copied: few, and not for long
            self._num_blocked += len(rows)

    def freeze(self) -> list[Rows]:
        """Freeze what is committed now, and nothing else; return its rows as `RowQueue.views` does. O(1)."""
        self._num_uncopied = self._num_unevicted = self.num_committed
        self._num_blocked = 0
        return self._committed.views()

    def copied(self, num_rows: int) -> None:
        """`num_rows` more of the frozen rows, the oldest of them, have been copied or need not be. O(1)."""
        num_held = self.num_held
        self._num_uncopied = max(0, self._num_uncopied - num_rows)
        self._num_blocked = self._num_blocked - (num_held - self.num_held) if self.num_held else 0

    def committed(self) -> Rows:
        """All committed rows, oldest first. O(num_committed)."""
        return self._committed.peek(self.num_committed)

    def committed_views(self) -> list[Rows]:
        """The same as two views, which the next commit may overwrite. O(1)."""
        return self._committed.views()

    def free(self) -> Rows:
        """All free rows, the longest free first. O(num_free)."""
        return self._free.peek(self._free.length)

    def restore(self, free: Rows, committed: Rows) -> None:
        """Take over the queues of an allocator of the same size; nothing is reserved afterwards.

        Raises:
            InvalidInput: they are not each row once, or more than `capacity` are committed. Nothing changes.
        """
        rows = np.concatenate((free, committed))
        if len(committed) > self.capacity or not np.array_equal(np.sort(rows), np.arange(self.num_rows)):
            raise InvalidInput(
                f"{len(free)} free and {len(committed)} committed rows are not each of {self.num_rows} rows once, with "
                f"at most {self.capacity} committed"
            )
        self.num_reserved = 0
        self._free, self._committed = RowQueue(self.num_rows), RowQueue(self.num_rows)
        self._free.push(free)
        self._committed.push(committed)

    def clear(self) -> Rows:
        """Evict every committed row and return them; reservations stay."""
        return self._evict(self.num_committed)

    def _evict(self, num_rows: int) -> Rows:
        evicted = self._committed.pop(num_rows)
        self._free.push(evicted)
        num_frozen = min(num_rows, self._num_unevicted)
        self._num_unevicted -= num_frozen
        if self._num_blocked:
            self._num_blocked += num_rows
        elif self._num_uncopied:  # the first held one is among these
            self._num_blocked = num_rows - num_frozen + self.num_held if self.num_held else 0
        return evicted
