"""One replay table's bookkeeping: allocator, sampler, limiter and generations kept in step.

The server runs it for shared rows and the in-process buffers run it for their own; neither row contents nor
sockets nor clocks are known here. A row can be sampled from `commit` until the commit that evicts it.

Generations count both changes, so that parity is the row's state:

    even: free or reserved --commit: +1--> odd: committed --evict: +1--> even ...
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_buffer.allocator import RowAllocator, Rows
from rl_buffer.batch_draws import draw_batch, draw_samples
from rl_buffer.errors import InvalidInput
from rl_buffer.failpoints import reached
from rl_buffer.rate_limiters import RateLimiter
from rl_buffer.samplers import (
    PrioritizedSampler,
    make_sampler,
    require_drawable,
    require_initial,
    require_updatable,
)
from rl_buffer.tables import ReplayTable, Sample, TableCut
from rl_buffer.uniforms import new_seed, new_seeds


class ReplayTableState:
    """The table's changing part. Every method either does all of its work or raises and does none."""

    def __init__(
        self, config: ReplayTable, generations: NDArray[np.int64], masses: NDArray[np.float64] | None = None
    ) -> None:
        """Start empty.

        Args:
            config: the table's constants.
            generations: int64 [config.num_rows], even; written here only, read by whoever gathers rows.
            masses: float64 [config.num_rows], in which priorities are to be kept; None takes ordinary memory.
        """
        assert config.headroom is not None
        self.config = config
        self.allocator = RowAllocator(config.capacity, config.headroom)
        self.limiter = RateLimiter(config.rate_limiter)
        self.generations = generations
        self.num_stale_updates = 0
        self._sampler = make_sampler(config.sampler, config.num_rows, masses)
        self._rng = np.random.default_rng(config.seed)

    def __len__(self) -> int:
        return self.allocator.num_committed

    @property
    def num_reservable(self) -> int:
        """Rows that `reserve` can hand out now."""
        return self.allocator.num_reservable

    @property
    def num_reserved(self) -> int:
        """Rows that writers hold."""
        return self.allocator.num_reserved

    def reserve(self, num_rows: int) -> Rows:
        """Let a writer hold rows; see `RowAllocator.reserve`."""
        return self.allocator.reserve(num_rows)

    def num_insertable(self, num_rows: int) -> int:
        """How many of `num_rows` items the limiter lets be committed now."""
        return self.limiter.num_insertable(num_rows)

    def commit(self, rows: Rows, td_errors: NDArray[np.float64] | None) -> None:
        """Make reserved, written rows sampleable, and evict the oldest that no longer fit.

        Args:
            rows: [N] int64, reserved.
            td_errors: [N] float64 for initial priorities; NaN or None means the largest of the live ones.

        Raises:
            InvalidInput: more rows than `capacity`, or a TD error that is infinite or too large.
        """
        if td_errors is not None:
            self.check_td_errors(td_errors)
        evicted = self.allocator.commit(rows)
        reached("server.committing")
        self._retire(evicted)
        reached("server.evicted")
        self.generations[rows] += 1
        reached("server.raised")
        self._sampler.insert(rows, td_errors)
        reached("server.published")
        self.limiter.inserted(len(rows))
        self.limiter.deleted(len(evicted))

    def check_td_errors(self, td_errors: NDArray[np.float64]) -> None:
        """Refuse initial TD errors that `commit` would refuse, for a commit that waits before it is made.

        Raises:
            InvalidInput: one is infinite, or too large for the sampler.
        """
        require_initial(td_errors, self._sampler)

    def commit_priorities_again(self, rows: Rows, td_errors: NDArray[np.float64] | None) -> None:
        """Give committed rows the priorities that `commit` would have given them."""
        self._sampler.remove(rows)
        self._sampler.insert(rows, td_errors)

    def release(self, rows: Rows) -> None:
        """Take back reserved rows that will never be committed, half-written or not."""
        self.allocator.release(rows)

    def draw(self, batch_size: int, num_spares: int, num_batches: int = 1) -> Sample:
        """Draw batches with replacement, and charge the limiter for `num_batches` times `batch_size` samples.

        In the sample each batch is followed by its spares.
        """
        sampler, num_draws = self._sampler, batch_size + num_spares
        require_drawable(batch_size, sampler.num_items)
        if isinstance(sampler, PrioritizedSampler):
            total = sampler.tree.total
            rows, generations, masses = draw_samples(
                sampler.tree, new_seeds(self._rng, num_batches), num_draws, batch_size, self.generations
            )
        else:
            rows, masses, total = sampler.draw(num_batches * num_draws, self._rng)
            generations = self.generations.take(rows)
        self.limiter.sampled(num_batches * batch_size)
        return Sample(rows, generations, masses, total, self.allocator.num_committed)

    def draw_rows(self, batch_size: int) -> Rows:
        """The rows of a `draw` without spares, [batch_size] int64, for who needs nothing else."""
        rows = self._sampler.draw(batch_size, self._rng).rows
        self.limiter.sampled(batch_size)
        return rows

    def draw_batch(
        self, batch_size: int, beta: float, source: NDArray[np.int64], target: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """`draw` without spares from a prioritized table, weights and a copy of the rows, at once.

        Args:
            batch_size: N.
            beta: of the weights, in [0, 1].
            source: the table's rows as words, flat.
            target: words of N rows, flat; empty if they are not to be copied.

        Returns:
            Rows [N], their generations [N] and weights [N], the same that `draw` and `importance_weights` give.
        """
        sampler = self._sampler
        assert isinstance(sampler, PrioritizedSampler)
        require_drawable(batch_size, sampler.num_items)
        drawn = draw_batch(sampler.tree, new_seed(self._rng), batch_size, beta, self.generations, source, target)
        self.limiter.sampled(batch_size)
        return drawn

    def update_priorities(self, rows: Rows, generations: NDArray[np.int64], td_errors: NDArray[np.float64]) -> int:
        """Set new priorities where the row still holds the item that was sampled; return how many did not.

        Raises:
            InvalidInput: a row out of range, a TD error that is not finite, or a table without priorities.
        """
        if isinstance(self._sampler, PrioritizedSampler):
            num_stale = self._sampler.update_fresh(rows, generations, td_errors, self.generations)
            if num_stale is not None:
                self.num_stale_updates += num_stale
                return num_stale
        raise self._refusal(rows, generations, td_errors)

    def _refusal(self, rows: Rows, generations: NDArray[np.int64], td_errors: NDArray[np.float64]) -> InvalidInput:
        """Why `update_priorities` cannot be made."""
        try:
            require_updatable(rows, self.config.num_rows, td_errors)
            fresh = (self.generations[rows] == generations) & (generations & 1 == 1)
            self._sampler.update(rows[fresh], td_errors[fresh])
        except InvalidInput as error:
            return error
        raise AssertionError("an update was refused and then made")

    def explain_sample(self, num_draws: int) -> str:
        """One sentence on why a batch, which the limiter refuses, waits."""
        return self.limiter.explain_sample(num_draws)

    def clear(self) -> None:
        """Forget all committed transitions; reservations and the limiter's inserts and samples stay."""
        evicted = self.allocator.clear()
        self._retire(evicted)
        self.limiter.cleared(len(evicted))

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays and JSON values from which `restore` goes on: contents' places, priorities, counters, random state.

        Reserved rows count as free: what is in them was never committed.
        """
        committed = self.allocator.committed()
        in_use = np.zeros(self.config.num_rows, np.bool_)
        in_use[committed] = True
        free = self.allocator.free()
        in_use[free] = True
        arrays = {
            "free": np.concatenate((free, np.flatnonzero(~in_use))),
            "committed": committed,
            "generations": self.generations.copy(),
            "sampler": self._sampler.state(),
        }
        return arrays, self._values()

    def contents(self) -> tuple[list[Rows], NDArray[np.float64] | None]:
        """Views of the committed rows, oldest first, and of every row's mass if they differ. O(1)."""
        return self.allocator.committed_views(), self._sampler.masses

    def freeze(self) -> TableCut:
        """Take everything as it is for a checkpoint; rows stay as they are until they are `copied`. O(1)."""
        return TableCut(self.allocator.freeze(), self._sampler.masses, self._values())

    def copied(self, num_rows: int) -> None:
        """See `RowAllocator.copied`."""
        self.allocator.copied(num_rows)

    @property
    def num_held(self) -> int:
        """Rows that nobody gets before they have been copied."""
        return self.allocator.num_held

    def _values(self) -> dict[str, Any]:
        rest = {"num_stale_updates": self.num_stale_updates, "rng": self._rng.bit_generator.state}
        return self.limiter.state() | rest

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        """Take over what `state` returned, for a table of the same size and sampler.

        Raises:
            InvalidInput: it does not fit or contradicts itself. Nothing changes.
        """
        committed, generations = arrays["committed"], arrays["generations"]
        if generations.dtype != np.int64 or generations.shape != self.generations.shape or generations.min() < 0:
            raise InvalidInput(f"generations are {generations.dtype}{list(generations.shape)} or negative")
        allocator = RowAllocator(self.allocator.capacity, self.allocator.headroom)
        allocator.restore(arrays["free"], committed)
        rng = np.random.default_rng()
        rng.bit_generator.state = values["rng"]
        num_stale_updates = int(values["num_stale_updates"])
        limiter = RateLimiter(self.config.rate_limiter)
        limiter.restore(values)
        if limiter.size != len(committed):
            raise InvalidInput(f"{values['counts']} are not the counts of {len(committed)} transitions")
        self._sampler.restore(arrays["sampler"], committed)  # the last one that can refuse
        self.allocator, self._rng, self.num_stale_updates = allocator, rng, num_stale_updates
        self.limiter = limiter
        # Rows that were reserved when the state was taken had an even generation: free ones have too.
        self.generations[:] = generations

    def restore_cut(self, num_rows: int, masses: NDArray[np.float64] | None, values: Mapping[str, Any]) -> None:
        """Take over what `freeze` returned, for a new table whose first `num_rows` rows were filled in that order.

        Args:
            num_rows: committed rows, at most `capacity`.
            masses: [num_rows], if the sampler has any.
            values: of the cut.

        Raises:
            InvalidInput: it does not fit or contradicts itself. Nothing changes.
        """
        rows = np.arange(self.config.num_rows)
        sampler: NDArray[Any] = rows[:num_rows]
        if masses is not None:
            sampler = np.zeros(self.config.num_rows)
            sampler[:num_rows] = masses
        generations = self.generations + (rows < num_rows)
        arrays = {"committed": rows[:num_rows], "free": rows[num_rows:], "generations": generations, "sampler": sampler}
        self.restore(arrays, values)

    def _retire(self, rows: Rows) -> None:
        # Out of the sampler first, then the generation: a learner that gathered a row checks the generation
        # afterwards, and the row is granted to a writer only after both.
        if len(rows):
            self._sampler.remove(rows)
            self.generations[rows] += 1
