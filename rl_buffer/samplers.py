"""Samplers: which rows of a table a learner gets.

A config is a plain value that travels in a table's description; `make_sampler` turns it into the state that
the table's owner keeps, one thread at a time. A sampler knows row numbers and TD errors; not what rows hold, who
wrote them or when. Clients import the configs, so nothing here imports Numba before `make_sampler` needs it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from rl_buffer.errors import InvalidInput

if TYPE_CHECKING:
    from rl_buffer.row_set import RowSet
    from rl_buffer.sum_tree import SumTree

# No sum over a table of them overflows.
_LARGEST_MASS = 1e200


class Uniform(msgspec.Struct, frozen=True, tag=True):
    """Every item is as likely as any other."""


class Prioritized(msgspec.Struct, frozen=True, tag=True):
    """Items are drawn in proportion to (|TD error| + epsilon)^alpha.

    Schaul et al. (2016), "Prioritized Experience Replay", equation 1 with proportional priorities.
    """

    alpha: float = 0.6  # 0 is uniform
    epsilon: float = 1e-6  # keeps an item with TD error 0 in play

    def __post_init__(self) -> None:
        """Raise InvalidInput on values that give no distribution."""
        if not 0.0 <= self.alpha < math.inf:
            raise InvalidInput(f"alpha is {self.alpha}; expected a finite number >= 0, such as 0.6")
        if not 0.0 < self.epsilon < math.inf:
            raise InvalidInput(f"epsilon is {self.epsilon}; expected a finite number > 0, such as 1e-6")


class Fifo(msgspec.Struct, frozen=True, tag=True):
    """The items that were committed first, each given out `max_times_sampled` times."""


class Lifo(msgspec.Struct, frozen=True, tag=True):
    """The items that were committed last, the last one first, each given out `max_times_sampled` times."""


SamplerConfig: TypeAlias = Uniform | Prioritized | Fifo | Lifo


class Draws(NamedTuple):
    """Rows drawn with replacement, and what it takes to weight them, all of one moment."""

    rows: NDArray[np.int64]  # [N], the batch first, then the spares
    masses: NDArray[np.float64]  # [N], each row was drawn with probability mass / total
    total: float  # the mass of all items


class Sampler(Protocol):
    """The rows that can be drawn, and the distribution over them. Rows are [N] int64, contiguous.

    A row out of range raises InvalidInput, and then nothing has changed.
    """

    @property
    def num_items(self) -> int:
        """Rows that can be drawn."""

    @property
    def masses(self) -> NDArray[np.float64] | None:
        """Of every row, 0.0 where it cannot be drawn: a view. None where all have the same."""

    def insert(self, rows: NDArray[np.int64], td_errors: NDArray[np.float64] | None) -> None:
        """Make rows sampleable.

        Args:
            rows: [N] int64.
            td_errors: [N] float64, signed; where it is NaN, or None as a whole, the row gets the largest mass
                among the live ones before this call (1.0 if there are none), so that it is drawn soon. A
                sampler without priorities ignores it.

        Raises:
            InvalidInput: a TD error is infinite or its mass is too large. Nothing has changed.
        """

    def check_insertable(self, td_errors: NDArray[np.float64]) -> None:
        """Raise InvalidInput if `insert` would refuse these TD errors."""

    def remove(self, rows: NDArray[np.int64]) -> None:
        """Never draw these rows until they are inserted again; rows that are out already are passed over."""

    def draw(self, num_draws: int, rng: np.random.Generator, num_spares: int = 0) -> Draws:
        """Draw `num_draws` rows with replacement, and after them `num_spares` independent ones.

        Raises:
            InvalidInput: there is nothing to draw, or `num_draws` < 1.
        """

    def update(self, rows: NDArray[np.int64], td_errors: NDArray[np.float64]) -> None:
        """Give live rows new priorities; of a row named twice the last one counts.

        Raises:
            InvalidInput: a TD error is not finite, a row is not live, or the sampler has no priorities.
                Nothing has changed.
        """

    def state(self) -> NDArray[Any]:
        """Everything that `restore` needs for draws to go on alike, apart from the random state. A copy."""

    def restore(self, state: NDArray[Any], rows: NDArray[np.int64]) -> None:
        """Take over the state of a sampler of as many rows, of which exactly `rows` can be drawn.

        Raises:
            InvalidInput: the state is of another kind or size, or other rows than `rows` could be drawn. Nothing has
                changed.
        """


class UniformSampler:
    """A `Sampler` whose rows all have mass 1. Insertion and removal are O(1) a row, wherever it lies."""

    def __init__(self, live: RowSet) -> None:
        self._live = live

    @property
    def num_items(self) -> int:
        """Rows that can be drawn."""
        return len(self._live)

    @property
    def masses(self) -> None:
        """See `Sampler.masses`: all rows have the same."""
        return None

    def insert(self, rows: NDArray[np.int64], td_errors: NDArray[np.float64] | None) -> None:
        """See `Sampler.insert`; TD errors are ignored."""
        self._live.insert(rows)

    def check_insertable(self, td_errors: NDArray[np.float64]) -> None:
        """See `Sampler.check_insertable`; TD errors are ignored."""

    def remove(self, rows: NDArray[np.int64]) -> None:
        """See `Sampler.remove`."""
        self._live.remove(rows)

    def draw(self, num_draws: int, rng: np.random.Generator, num_spares: int = 0) -> Draws:
        """See `Sampler.draw`."""
        require_drawable(num_draws, self.num_items)
        # Half the time of rng.integers; a place is off its probability by less than num_items in 2^53.
        places = (rng.random(num_draws + num_spares) * self.num_items).astype(np.int64)
        return Draws(self._live.members[places], np.ones(len(places)), float(self.num_items))

    def update(self, rows: NDArray[np.int64], td_errors: NDArray[np.float64]) -> None:
        """Refuse: see `Sampler.update`."""
        raise InvalidInput("a uniform table has no priorities to update; give it sampler=Prioritized()")

    def state(self) -> NDArray[np.int64]:
        """See `Sampler.state`: the live rows in the order of the set."""
        return self._live.members.copy()

    def restore(self, state: NDArray[Any], rows: NDArray[np.int64]) -> None:
        """See `Sampler.restore`."""
        if state.dtype != np.int64 or not np.array_equal(np.sort(state), np.sort(rows)):
            raise InvalidInput(f"the state {state.dtype}{list(state.shape)} is not that of {len(rows)} live rows")
        self._live.remove(self._live.members.copy())
        self._live.insert(np.ascontiguousarray(state))


class PrioritizedSampler:
    """A `Sampler` in proportion to mass = (|TD error| + epsilon)^alpha. Every call is O(N log num_rows).

    A row is live where its mass is above 0.
    """

    def __init__(self, config: Prioritized, tree: SumTree) -> None:
        from rl_buffer.priority_updates import to_masses, update_fresh  # Numba, as in make_sampler

        self._config = config
        self._tree = tree
        self._largest = _largest_magnitude(config)
        self._to_masses, self._update_fresh = to_masses, update_fresh

    @property
    def tree(self) -> SumTree:
        """Of the masses of all rows; for reading."""
        return self._tree

    @property
    def num_items(self) -> int:
        """Rows that can be drawn."""
        return self._tree.num_live

    @property
    def masses(self) -> NDArray[np.float64]:
        """See `Sampler.masses`."""
        return self._tree.leaves

    def insert(self, rows: NDArray[np.int64], td_errors: NDArray[np.float64] | None) -> None:
        """See `Sampler.insert`."""
        largest = self._tree.max or 1.0
        if td_errors is None:
            masses = np.full(rows.shape, largest)
        else:
            missing = np.isnan(td_errors)
            masses = self._masses(np.where(missing, 0.0, td_errors))
            masses[missing] = largest
        self._tree.set(rows, masses)

    def check_insertable(self, td_errors: NDArray[np.float64]) -> None:
        """See `Sampler.check_insertable`."""
        require_masses(self._config, np.where(np.isnan(td_errors), 0.0, td_errors))

    def remove(self, rows: NDArray[np.int64]) -> None:
        """See `Sampler.remove`."""
        self._tree.set(rows, np.zeros(rows.shape))

    def draw(self, num_draws: int, rng: np.random.Generator, num_spares: int = 0) -> Draws:
        """See `Sampler.draw`. Draw i of the batch falls into the i-th of `num_draws` equal parts of the total.

        Schaul et al. (2016), appendix B.2.1: rows are expected as often as without the parts, with less variance.
        """
        require_drawable(num_draws, self._tree.num_live)
        rows, masses = self._tree.draw(rng.random(num_draws + num_spares), num_draws)
        return Draws(rows, masses, self._tree.total)

    def update(self, rows: NDArray[np.int64], td_errors: NDArray[np.float64]) -> None:
        """See `Sampler.update`."""
        masses = self._masses(td_errors)
        before = self._tree.get(rows)
        if np.count_nonzero(before) < len(before):
            dead = before == 0.0
            raise InvalidInput(f"row {rows[dead.argmax()]} at position {dead.argmax()} is not live; drop stale rows")
        self._tree.set(rows, masses)

    def update_fresh(
        self,
        rows: NDArray[np.int64],
        generations: NDArray[np.int64],
        td_errors: NDArray[np.float64],
        current: NDArray[np.int64],
    ) -> int | None:
        """`update` of the rows whose generation is still the `current` one, and how many are not.

        None, and nothing has changed, where rows or TD errors are to be refused.
        """
        config = self._config
        return self._update_fresh(
            self._tree,
            current,
            rows,
            generations,
            td_errors,
            epsilon=config.epsilon,
            alpha=config.alpha,
            largest=self._largest,
        )

    def state(self) -> NDArray[np.float64]:
        """See `Sampler.state`: the mass of every row."""
        return self._tree.leaves.copy()

    def restore(self, state: NDArray[Any], rows: NDArray[np.int64]) -> None:
        """See `Sampler.restore`."""
        fits = state.dtype == np.float64 and state.shape == self._tree.leaves.shape
        if not fits or not np.array_equal(np.flatnonzero(state), np.sort(rows)):
            raise InvalidInput(f"the state {state.dtype}{list(state.shape)} is not the masses of {len(rows)} live rows")
        if not ((state >= 0) & (state <= _LARGEST_MASS)).all():
            raise InvalidInput(f"a mass is not in [0, {_LARGEST_MASS}]")
        self._tree.set(np.arange(len(state)), np.ascontiguousarray(state))

    def insert_masses(self, rows: NDArray[np.int64], masses: NDArray[np.float64]) -> None:
        """Make rows sampleable again with the masses that they had, [N] float64 above 0."""
        self._tree.set(rows, masses)

    def masses_of(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """The masses of rows ([N] int64) as [N] float64; 0.0 where a row cannot be drawn."""
        return self._tree.get(rows)

    def _masses(self, td_errors: NDArray[np.float64]) -> NDArray[np.float64]:
        magnitudes = require_masses(self._config, td_errors)
        self._to_masses(magnitudes, self._config.alpha)
        return magnitudes


def require_masses(config: SamplerConfig, td_errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """|TD error| + epsilon, [N] float64, if each has a mass that no sum over a table overflows of.

    Raises:
        InvalidInput: one is not finite or too large for alpha, or the sampler has no priorities.
    """
    if not isinstance(config, Prioritized):
        raise InvalidInput("a uniform table has no priorities to update; give it sampler=Prioritized()")
    largest = _largest_magnitude(config)
    magnitudes: NDArray[np.float64] = np.abs(td_errors) + config.epsilon
    # Also False for NaN, which max() hands on.
    if not magnitudes.max(initial=0.0) <= largest:
        position = int(np.flatnonzero(~(magnitudes <= largest))[0])
        raise InvalidInput(
            f"TD error {td_errors[position]} at position {position}; expected a finite number of at most "
            f"{largest:.3g} at alpha {config.alpha}"
        )
    return magnitudes


def require_updatable(rows: NDArray[np.int64], num_rows: int, td_errors: NDArray[np.float64]) -> None:
    """Refuse new priorities of rows that a table does not have, or of TD errors that are not finite.

    Raises:
        InvalidInput: with the row or the TD error.
    """
    # As unsigned numbers negative rows are too large as well: one comparison for both ends.
    if len(rows) and rows.view(np.uint64).max() >= num_rows:
        raise InvalidInput(f"rows must be in [0, {num_rows}), got {rows.min()}..{rows.max()}")
    if not np.isfinite(td_errors).all():
        raise InvalidInput(f"TD errors must be finite, got {td_errors[~np.isfinite(td_errors)][0]}")


def require_initial(td_errors: NDArray[np.float64], sampler: Sampler | None) -> None:
    """Refuse initial TD errors, [N] with NaN for unknown ones, that are infinite or too large for the sampler.

    Raises:
        InvalidInput: one is.
    """
    if np.isinf(td_errors).any():
        raise InvalidInput("td_errors of a commit must be finite or NaN (unknown), got inf")
    if sampler is not None:
        sampler.check_insertable(td_errors)


def _largest_magnitude(config: Prioritized) -> float:
    """What _LARGEST_MASS belongs to; for small alpha 1e300, because that one is no float."""
    return float(_LARGEST_MASS ** (1.0 / max(config.alpha, 2.0 / 3.0)))


def require_drawable(num_draws: int, num_items: int) -> None:
    """Raise InvalidInput unless that many draws can be made of so many items."""
    if num_draws < 1:
        raise InvalidInput(f"num_draws is {num_draws}; expected at least 1")
    if num_items == 0:
        raise InvalidInput("the table is empty, so there is nothing to draw")


def make_sampler(
    config: SamplerConfig, num_rows: int, masses: NDArray[np.float64] | None = None
) -> UniformSampler | PrioritizedSampler:
    """The sampler that `config` describes, for rows 0 <= row < num_rows; empty unless `masses` says otherwise.

    Args:
        config: of the sampler.
        num_rows: rows in all.
        masses: [num_rows], in which a prioritized sampler works instead of memory of its own.
    """
    if isinstance(config, Fifo | Lifo):
        raise InvalidInput(f"{type(config).__name__}() is an order of items that leave, which only a server has")
    # Imported here: Numba costs an actor, which only names a config, tens of MB.
    if isinstance(config, Uniform):
        from rl_buffer.row_set import RowSet

        return UniformSampler(RowSet(num_rows))
    from rl_buffer.sum_tree import SumTree

    return PrioritizedSampler(config, SumTree(num_rows, masses))
