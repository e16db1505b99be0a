"""One table whose items leave with their last use: queues, stacks, and whatever has `max_times_sampled`.

    FREE --reserve--> RESERVED --commit--> WAITING --lease--> READING --finish--> FREE     that was its last use
                      RESERVED --release--> FREE     <--finish--+ |                        it has uses left
                                             |       <--give_back-+                        its reader is gone
                                             +--evict, clear--> FREE

An item that is sampled is its reader's alone until that has copied it: nobody overwrites it, evicts it or is given it
as well. So a batch holds different items, each of them whole, and each use is one batch's: exactly `max_times_sampled`
of them, unless the item is evicted or cleared. What a dead reader had not finished waits again where it was, by its
number, and counts as not sampled.

A row's generation is odd while it waits or is read. It is raised at both ends of that time and with each lease, so that
a release which comes late or twice matches nothing. `capacity` bounds what waits; what is given back may exceed it, and
then commits evict more, or wait if it is a queue. Only the server changes any of this; row contents, sockets and clocks
are not known here.
"""

import heapq
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rl_buffer.allocator import RowQueue, Rows, require_each_once
from rl_buffer.errors import InvalidInput
from rl_buffer.failpoints import reached
from rl_buffer.rate_limiters import RateLimiter
from rl_buffer.samplers import (
    Fifo,
    Lifo,
    PrioritizedSampler,
    UniformSampler,
    make_sampler,
    require_initial,
    require_updatable,
)
from rl_buffer.tables import ReplayTable, Sample, TableCut


class Finished(NamedTuple):
    """What `ConsumedTableState.finish` did."""

    removed: Rows  # with their last use; free
    returned: Rows  # waiting again


class ConsumedTableState:
    """The table's changing part. Every method either does all of its work or raises and does none.

    Invariant: num_free + num_held + num_reserved + len(self) + num_reading == num_rows.
    """

    def __init__(
        self, config: ReplayTable, generations: NDArray[np.int64], masses: NDArray[np.float64] | None = None
    ) -> None:
        """Start empty; the arguments are those of `ReplayTableState`."""
        assert config.headroom is not None
        self.config = config
        self.limiter = RateLimiter(config.rate_limiter)
        self.generations = generations
        self.num_reserved = 0
        self.num_stale_updates = 0
        self.uses = np.zeros(config.num_rows, np.int64)  # finished ones of what is in the row
        self._numbers = np.zeros(config.num_rows, np.int64)  # in the order of commits, from 1 on
        self._free = RowQueue(config.num_rows)
        self._free.push(np.arange(config.num_rows))
        self._waiting = _Order(newest_too=isinstance(config.sampler, Lifo))
        self._reading: dict[int, float] = {}  # row -> its mass
        self._sampler: UniformSampler | PrioritizedSampler | None = None
        if not isinstance(config.sampler, Fifo | Lifo):
            self._sampler = make_sampler(config.sampler, config.num_rows, masses)
        self._rng = np.random.default_rng(config.seed)
        self._uncopied = np.zeros(config.num_rows, np.bool_)  # rows that a checkpoint still needs
        self._cut = np.zeros(0, np.int64)  # these, in its order
        self._held: set[int] = set()  # those of them that hold nothing any more

    def __len__(self) -> int:
        """Items that nobody reads."""
        return len(self._waiting)

    @property
    def num_reading(self) -> int:
        """Items that readers hold."""
        return len(self._reading)

    @property
    def num_held(self) -> int:
        """Rows that nobody gets before they have been copied."""
        return len(self._held)

    @property
    def num_reservable(self) -> int:
        """Rows that `reserve` can hand out now."""
        assert self.config.headroom is not None
        return min(self.config.headroom - self.num_reserved, self._free.length)

    @property
    def num_finished_samples(self) -> int:
        """Samples that their readers have copied."""
        return self.limiter.num_samples - self.num_reading

    def reserve(self, num_rows: int) -> Rows:
        """Let a writer hold rows.

        Raises:
            InvalidInput: more than `num_reservable`. Nothing changes.
        """
        if not 0 <= num_rows <= self.num_reservable:
            raise InvalidInput(f"cannot reserve {num_rows} rows: {self.num_reservable} may be reserved now")
        self.num_reserved += num_rows
        return self._free.pop(num_rows)

    def commit_priorities_again(self, rows: Rows, td_errors: NDArray[np.float64] | None) -> None:
        """Give waiting rows the priorities that `commit` would have given them."""
        if self._sampler is not None:
            self._sampler.remove(rows)
            self._sampler.insert(rows, td_errors)

    def release(self, rows: Rows) -> None:
        """Take back reserved rows that will never be committed."""
        self.num_reserved -= len(rows)
        self._free.push(rows)

    def num_insertable(self, num_rows: int) -> int:
        """How many of `num_rows` items the limiter lets be committed now."""
        return self.limiter.num_insertable(num_rows)

    def check_td_errors(self, td_errors: NDArray[np.float64]) -> None:
        """Refuse initial TD errors that `commit` would refuse.

        Raises:
            InvalidInput: one is infinite, or too large for the sampler.
        """
        require_initial(td_errors, self._sampler)

    def evict_for(self, num_rows: int) -> Rows:
        """Free the oldest items that would not fit beside so many more; to be called before `commit`."""
        num_evicted = max(0, len(self) + num_rows - self.config.capacity) if num_rows else 0
        evicted = self._waiting.pop_oldest(min(len(self), num_evicted))
        self._drop(evicted)
        self.limiter.deleted(len(evicted))
        return evicted

    def commit(self, rows: Rows, td_errors: NDArray[np.float64] | None) -> None:
        """Let reserved, written rows wait to be sampled; `evict_for` as many comes first.

        Args:
            rows: [N] int64, reserved.
            td_errors: [N] float64 for initial priorities; NaN or None means the largest of the waiting ones.

        Raises:
            InvalidInput: a TD error that is infinite or too large.
        """
        if td_errors is not None:
            self.check_td_errors(td_errors)
        reached("server.committing")
        self.num_reserved -= len(rows)
        self.generations[rows] += 1
        reached("server.raised")
        self.uses[rows] = 0
        self._numbers[rows] = np.arange(1, len(rows) + 1) + self.limiter.num_inserts
        self._wait(rows)
        if self._sampler is not None:
            self._sampler.insert(rows, td_errors)
        reached("server.published")
        self.limiter.inserted(len(rows))

    def can_lease(self, num_items: int) -> bool:
        """Whether a batch of so many passes now."""
        return len(self) >= num_items and self.limiter.can_sample(num_items)

    def lease(self, num_items: int) -> Sample:
        """Hand out so many different items, in the sampler's order, and charge the limiter for them.

        Masses and their total are those before the draw.

        Raises:
            InvalidInput: fewer are waiting. Nothing changes.
        """
        if not 1 <= num_items <= len(self):
            raise InvalidInput(f"cannot hand out {num_items} items: {len(self)} wait")
        rows, masses, total = self._take(num_items)
        self._reading.update(zip(rows.tolist(), masses.tolist(), strict=True))
        self.generations[rows] += 2
        self.limiter.sampled(num_items)
        self.limiter.deleted(int(np.count_nonzero(self._is_last_use(rows))))
        return Sample(rows, self.generations[rows], masses, total, len(self))

    def finish(self, rows: Rows) -> Finished:
        """A reader has copied these items.

        Raises:
            InvalidInput: one is not being read, or named twice. Nothing changes.
        """
        require_each_once(rows, self._reading, "row")
        is_last = self._is_last_use(rows)
        removed, returned = rows[is_last], rows[~is_last]
        for row in removed.tolist():
            del self._reading[row]
        self.generations[removed] += 1
        self._retire(removed)
        self.uses[returned] += 1
        self._return(returned)
        return Finished(removed, returned)

    def give_back(self, rows: Rows) -> None:
        """Let items wait again, where they were, whose reader is gone.

        Raises:
            InvalidInput: one is not being read, or named twice. Nothing changes.
        """
        require_each_once(rows, self._reading, "row")
        self.limiter.sampled(-len(rows))
        self.limiter.deleted(-int(np.count_nonzero(self._is_last_use(rows))))
        self._return(rows)

    def update_priorities(self, rows: Rows, generations: NDArray[np.int64], td_errors: NDArray[np.float64]) -> int:
        """Set new priorities of what waits and was not handed out again since; return how many were something else.

        Raises:
            InvalidInput: a row out of range, a TD error that is not finite, or a table without priorities.
        """
        if not isinstance(self._sampler, PrioritizedSampler):
            raise InvalidInput("this table has no priorities to update; give it sampler=Prioritized()")
        require_updatable(rows, self.config.num_rows, td_errors)
        fresh = (self.generations[rows] == generations) & (self._sampler.masses[rows] > 0)
        self._sampler.update(rows[fresh], td_errors[fresh])
        num_stale = len(rows) - int(np.count_nonzero(fresh))
        self.num_stale_updates += num_stale
        return num_stale

    def clear(self) -> None:
        """Drop what waits; what is being written or read stays."""
        rows = self._waiting.pop_oldest(len(self))
        self._drop(rows)
        self.limiter.cleared(len(rows))

    def explain_sample(self, num_items: int) -> str:
        """One sentence on why a batch, which `can_lease` refuses, waits."""
        if not self.limiter.can_sample(num_items):
            reason = self.limiter.explain_sample(num_items)
        else:
            reason = f"sampling waits: {len(self)} of {num_items} items"
        return f"{reason}, {self.num_reading} are being read" if self.num_reading else reason

    # ---- what an earlier server had, and checkpoints -----------------------------------------------------------

    def resume(
        self, items: Rows, uses: NDArray[np.int64], reading: Rows, abandoned: Rows, values: Mapping[str, Any]
    ) -> None:
        """Take over what an earlier server had, for a new table. Generations of its items are odd already.

        Args:
            items: [N] rows in the order of their commits.
            uses: [N] finished ones of each.
            reading: those of them that somebody still reads.
            abandoned: rows that are still held by somebody who will not commit them.
            values: of the limiter, without the samples of those that are read.

        Raises:
            InvalidInput: they contradict the counts, or each other. Nothing changes.
        """
        limiter = RateLimiter(self.config.rate_limiter)
        limiter.restore(values)
        taken = np.zeros(self.config.num_rows, np.bool_)
        taken[items] = taken[abandoned] = True
        if limiter.size != len(items) or np.count_nonzero(taken) != len(items) + len(abandoned):
            raise InvalidInput(f"{values['counts']} are not the counts of {len(items)} items")
        if not np.isin(reading, items).all() or ((uses < 0) | (uses >= self.config.max_times_sampled)).any():
            raise InvalidInput(f"{len(reading)} of {len(items)} items are read, which have {uses.tolist()[:9]} uses")
        self.limiter, self.num_reserved = limiter, len(abandoned)
        self._free = RowQueue(self.config.num_rows)
        self._free.push(np.flatnonzero(~taken))
        self._numbers[items] = np.arange(len(items)) + (limiter.num_inserts - len(items) + 1)
        self.uses[items] = uses
        self._wait(items)
        if reading.size:
            self._waiting.remove(reading.tolist())
            self._reading = dict.fromkeys(reading.tolist(), 0.0)
            limiter.sampled(len(reading))
            limiter.deleted(int(np.count_nonzero(self._is_last_use(reading))))

    def set_masses(self, masses: NDArray[np.float64] | None) -> None:
        """Of all rows that wait, after `resume`; those without one get the largest."""
        if self._sampler is None:
            return
        rows = self._waiting.rows()
        if isinstance(self._sampler, PrioritizedSampler) and masses is not None:
            known = rows[masses[rows] > 0]
            self._sampler.insert_masses(known, masses[known])
            rows = rows[masses[rows] <= 0]
        self._sampler.insert(rows, None)

    def contents(self) -> tuple[list[Rows], NDArray[np.float64] | None]:
        """The rows that wait, oldest first, and of every row its mass if they differ. O(N log N) for N items."""
        masses = None if self._sampler is None else self._sampler.masses
        return [self._waiting.rows(), np.zeros(0, np.int64)], masses

    def freeze(self) -> TableCut:
        """Take everything as it is for a checkpoint; rows stay as they are until they are `copied`.

        What is being read counts as waiting: its reader may be gone when it is restored. O(N log N) for N items.
        """
        reading = np.array(list(self._reading), np.int64)
        rows = np.concatenate((self._waiting.rows(), reading))
        rows = rows[np.argsort(self._numbers[rows])]
        self._uncopied[rows] = True
        self._cut = rows
        state = self.limiter.state()
        state["counts"]["num_samples"] -= len(reading)
        state["counts"]["num_deletes"] -= int(np.count_nonzero(self._is_last_use(reading)))
        used = np.flatnonzero(self.uses[rows])
        values = state | {
            "uses": [used.tolist(), self.uses[rows[used]].tolist()],
            "num_stale_updates": self.num_stale_updates,
            "rng": self._rng.bit_generator.state,
        }
        masses = None
        if isinstance(self._sampler, PrioritizedSampler):
            masses = self._sampler.masses.copy()
            masses[reading] = list(self._reading.values())
        return TableCut([rows], masses, values)

    def copied(self, num_rows: int) -> None:
        """`num_rows` more of the cut, in its order, have been copied or need not be."""
        rows, self._cut = self._cut[:num_rows], self._cut[num_rows:]
        self._uncopied[rows] = False
        if self._held:
            free = [row for row in rows.tolist() if row in self._held]
            self._held.difference_update(free)
            self._free.push(np.array(free, np.int64))

    def restore_cut(self, num_rows: int, masses: NDArray[np.float64] | None, values: Mapping[str, Any]) -> None:
        """Take over what `freeze` returned, for a new table whose first `num_rows` rows were filled in that order.

        Raises:
            InvalidInput: it does not fit or contradicts itself. Nothing changes.
        """
        uses, nothing = np.zeros(num_rows, np.int64), np.zeros(0, np.int64)
        rng = np.random.default_rng()
        rng.bit_generator.state = values["rng"]
        used, times = values["uses"]
        uses[np.array(used, np.int64)] = times
        all_masses = None
        if isinstance(self._sampler, PrioritizedSampler):
            if masses is None or not ((masses > 0) & np.isfinite(masses)).all():
                raise InvalidInput(f"the masses of {num_rows} items are not all above 0")
            all_masses = np.zeros(self.config.num_rows)
            all_masses[:num_rows] = masses
        self.resume(np.arange(num_rows), uses, nothing, nothing, values)
        self.generations[:num_rows] += 1
        self._rng, self.num_stale_updates = rng, int(values["num_stale_updates"])
        self.set_masses(all_masses)

    # ---- parts -------------------------------------------------------------------------------------------------

    def _take(self, num_items: int) -> tuple[Rows, NDArray[np.float64], float]:
        """Rows that wait, which they no longer do then, their masses, and the mass of all before."""
        if self._sampler is None:
            total, is_fifo = float(len(self)), isinstance(self.config.sampler, Fifo)
            rows = self._waiting.pop_oldest(num_items) if is_fifo else self._waiting.pop_newest(num_items)
            return rows, np.ones(num_items), total
        chosen: dict[int, float] = {}
        totals = []
        # One after the other without replacement: a draw of what was drawn before is made anew from the others.
        while len(chosen) < num_items:
            draws = self._sampler.draw(num_items - len(chosen), self._rng)
            totals.append(draws.total)
            drawn = dict(zip(draws.rows.tolist(), draws.masses.tolist(), strict=True))
            self._sampler.remove(np.array(list(drawn), np.int64))
            chosen |= drawn
        self._waiting.remove(chosen)
        return np.array(list(chosen), np.int64), np.array(list(chosen.values())), totals[0]

    def _is_last_use(self, rows: Rows) -> NDArray[np.bool_]:
        last: NDArray[np.bool_] = self.uses[rows] + 1 >= self.config.max_times_sampled
        return last

    def _wait(self, rows: Rows) -> None:
        self._waiting.add(zip(self._numbers[rows].tolist(), rows.tolist(), strict=True))

    def _return(self, rows: Rows) -> None:
        masses = np.array([self._reading.pop(row) for row in rows.tolist()])
        self._wait(rows)
        if isinstance(self._sampler, PrioritizedSampler):
            known = masses > 0  # not of what an earlier server handed out
            self._sampler.insert_masses(rows[known], masses[known])
            self._sampler.insert(rows[~known], None)
        elif self._sampler is not None:
            self._sampler.insert(rows, None)

    def _drop(self, rows: Rows) -> None:
        """Rows that no longer wait hold nothing."""
        if self._sampler is not None:
            self._sampler.remove(rows)
        self.generations[rows] += 1
        self._retire(rows)

    def _retire(self, rows: Rows) -> None:
        """Rows that hold nothing any more are free, unless they must be copied first."""
        kept = self._uncopied[rows]
        self._held.update(rows[kept].tolist())
        self._free.push(rows[~kept])


class _Order:
    """Rows by number: the oldest and the newest of them, and any removed. O(log N) a row.

    A heap from each end that is asked for. What was removed stays in them until it comes to the top, or until more than
    half of a heap is such.
    """

    def __init__(self, *, newest_too: bool) -> None:
        self._numbers: dict[int, int] = {}  # row -> number
        self._oldest: list[tuple[int, int]] = []  # (number, row)
        self._newest: list[tuple[int, int]] | None = [] if newest_too else None  # (-number, row)

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, numbered: Iterable[tuple[int, int]]) -> None:
        """(number, row) each; a row that is there is not added again."""
        for number, row in numbered:
            self._numbers[row] = number
            heapq.heappush(self._oldest, (number, row))
            if self._newest is not None:
                heapq.heappush(self._newest, (-number, row))

    def remove(self, rows: Iterable[int]) -> None:
        """They are there."""
        for row in rows:
            del self._numbers[row]
        self._compact()

    def rows(self) -> Rows:
        """All of them, the oldest first."""
        return np.array(sorted(self._numbers, key=self._numbers.__getitem__), np.int64)

    def pop_oldest(self, num_rows: int) -> Rows:
        """Remove so many with the smallest numbers, in their order."""
        return self._pop(self._oldest, num_rows, 1)

    def pop_newest(self, num_rows: int) -> Rows:
        """Remove so many with the largest numbers, the largest first."""
        assert self._newest is not None
        return self._pop(self._newest, num_rows, -1)

    def _pop(self, heap: list[tuple[int, int]], num_rows: int, sign: int) -> Rows:
        found: list[int] = []
        while len(found) < num_rows:
            number, row = heapq.heappop(heap)
            if self._numbers.get(row) == sign * number:
                del self._numbers[row]
                found.append(row)
        self._compact()
        return np.array(found, np.int64)

    def _compact(self) -> None:
        most = 2 * len(self._numbers) + 64
        if len(self._oldest) > most:
            self._oldest = sorted((number, row) for row, number in self._numbers.items())
        if self._newest is not None and len(self._newest) > most:
            self._newest = sorted((-number, row) for row, number in self._numbers.items())
