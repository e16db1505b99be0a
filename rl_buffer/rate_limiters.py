"""Rate limiters: when a table takes more items, and when it gives samples. Reverb's semantics.

Pure bookkeeping of three counters: no clock, no threads, no queue. The server asks before it lets a request
pass, tells what it let pass, and keeps the waiting requests itself.

    num_inserts  committed items       size   = num_inserts - num_deletes
    num_samples  granted draws         cursor = num_inserts * samples_per_insert - num_samples
    num_deletes  evicted items

    sampling n passes iff   size >= min_size      and   cursor - n >= min_diff
    inserting n passes iff  size + n <= min_size   or   cursor + n * samples_per_insert <= max_diff

Overwriting is an insert and a delete: it leaves the size as it is and still moves the cursor.
Cassirer et al. (2021), "Reverb: A Framework for Experience Replay".

What differs from Reverb, where it says nothing: a limiter that is set on a running table counts from there on, as if
the table had just been filled (`RateLimiter.set`); what `clear` removes from a queue or stack does not stand in the way
of its writers; draws that a dead learner gives back are not charged.
"""

import math
import operator
from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec

from rl_buffer.errors import InvalidInput

COUNTS = ("num_inserts", "num_samples", "num_deletes")


class MinSize(msgspec.Struct, frozen=True, tag=True):
    """Sampling waits until the table holds `min_size_to_sample` items; inserting never waits."""

    min_size_to_sample: int = 1

    def __post_init__(self) -> None:
        """Refuse what could never let a sample pass."""
        _check_count(self, "min_size_to_sample")

    @property
    def samples_per_insert(self) -> float:
        """Of a cursor that nothing waits for."""
        return 1.0

    @property
    def bounds(self) -> tuple[float, float]:
        """None."""
        return -math.inf, math.inf


class SampleToInsertRatio(msgspec.Struct, frozen=True, tag=True):
    """Hold the number of draws per inserted item near `samples_per_insert`.

    Until the table holds `min_size_to_sample` items it works like MinSize. From then on sampling waits where
    it would take the cursor below min_diff, and inserting where it would take it above max_diff.

    With a max_diff below min_size_to_sample * samples_per_insert inserting waits for the first samples as soon as the
    table holds the minimum.
    """

    samples_per_insert: float
    min_size_to_sample: int
    # A number e means min_size_to_sample * samples_per_insert -+ e; a pair is (min_diff, max_diff) itself.
    error_buffer: float | tuple[float, float]

    def __post_init__(self) -> None:
        """Refuse, as Reverb does, bounds that would block both sides for ever."""
        _check_count(self, "min_size_to_sample")
        ratio = _as_number("samples_per_insert", self.samples_per_insert)
        if not 0.0 < ratio < math.inf:
            raise InvalidInput(f"samples_per_insert is {ratio}; expected a finite number above 0")
        error_buffer: float | tuple[float, float]
        if isinstance(self.error_buffer, tuple | list):
            if len(self.error_buffer) != 2:
                raise InvalidInput(f"error_buffer is {self.error_buffer}; expected a number or (min_diff, max_diff)")
            low, high = self.error_buffer
            error_buffer = _as_number("error_buffer", low), _as_number("error_buffer", high)
        else:
            error_buffer = _as_number("error_buffer", self.error_buffer)
        msgspec.structs.force_setattr(self, "samples_per_insert", ratio)
        msgspec.structs.force_setattr(self, "error_buffer", error_buffer)
        min_diff, max_diff = self.bounds
        narrowest = 2.0 * max(1.0, ratio)
        # Narrower, and a single insert and a single draw could each wait for the other. `not >=` refuses NaN.
        if not max_diff - min_diff >= narrowest:
            raise InvalidInput(
                f"error_buffer {self.error_buffer} lets the cursor go from {min_diff} to {max_diff}; expected "
                f"a range of at least {narrowest} = 2 * max(1, samples_per_insert)"
            )
        if not max_diff - min_diff < math.inf:
            raise InvalidInput(f"error_buffer is {self.error_buffer}; expected finite numbers, or use MinSize")
        if min_diff > self.min_size_to_sample * ratio:
            raise InvalidInput(
                f"error_buffer {self.error_buffer} makes min_diff {min_diff}, so sampling would never start; "
                f"expected at most {self.min_size_to_sample * ratio} = min_size_to_sample * samples_per_insert"
            )

    @property
    def bounds(self) -> tuple[float, float]:
        """(min_diff, max_diff), between which the cursor is held."""
        if isinstance(self.error_buffer, tuple):
            return self.error_buffer
        centre = self.min_size_to_sample * self.samples_per_insert
        return centre - self.error_buffer, centre + self.error_buffer


class _Once(msgspec.Struct, frozen=True, tag=True):
    """What queues and stacks share: each item is inserted once and sampled once."""

    capacity: int

    def __post_init__(self) -> None:
        """Refuse room for nothing."""
        _check_count(self, "capacity")

    @property
    def min_size_to_sample(self) -> int:
        """One."""
        return 1

    @property
    def samples_per_insert(self) -> float:
        """One."""
        return 1.0

    @property
    def bounds(self) -> tuple[float, float]:
        """The cursor is the number of items."""
        return 0.0, float(self.capacity)


class Queue(_Once, frozen=True, tag=True):
    """Inserting waits while `capacity` items wait in the table, sampling while there are too few; see `Fifo`."""


class Stack(_Once, frozen=True, tag=True):
    """Inserting waits while `capacity` items wait in the table, sampling while there are too few; see `Lifo`."""


LimiterConfig: TypeAlias = MinSize | SampleToInsertRatio | Queue | Stack


def _check_count(config: msgspec.Struct, name: str) -> None:
    value = getattr(config, name)
    try:
        count = operator.index(value)
    except TypeError:
        raise InvalidInput(f"{name} is {value!r}; expected an integer") from None
    if count < 1:
        raise InvalidInput(f"{name} is {count}; expected at least 1")
    msgspec.structs.force_setattr(config, name, count)  # a plain one of NumPy's


def _as_number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InvalidInput(f"{name} is {value!r}; expected a number") from None


class RateLimiter:
    """The counters of one table and the two questions asked of them. Everything is O(1)."""

    def __init__(self, config: LimiterConfig) -> None:
        """Start with an empty table."""
        self.num_inserts = 0
        self.num_samples = 0
        self.num_deletes = 0
        self._first_config = config
        self._configure(config, 0, 0)

    def _configure(self, config: LimiterConfig, first_insert: int, first_sample: int) -> None:
        self.config = config
        self.first_insert, self.first_sample = first_insert, first_sample  # counts at which the cursor began
        self._ratio = config.samples_per_insert
        self._min_size = config.min_size_to_sample
        self._min_diff, self._max_diff = config.bounds

    def set(self, config: LimiterConfig) -> None:
        """Go on by other rules, and count from here on.

        As if the table had just been filled with what it holds, but for what is above the minimum size: the cursor is
        min(size, min_size) * samples_per_insert, where sampling may begin and nothing is owed. (Counted from the
        table's beginning, a learner that goes from 8 to 4 samples per insert after 100,000 inserts would wait for the
        next 100,000.) In a queue or stack the cursor is the size.
        """
        num_counted = self.size if isinstance(config, _Once) else min(self.size, config.min_size_to_sample)
        self._configure(config, self.num_inserts - num_counted, self.num_samples)

    def state(self) -> dict[str, Any]:
        """All of it, as JSON has it, apart from rules that are still those it was made with."""
        changed = None
        if self.config is not self._first_config:
            changed = {
                "config": msgspec.to_builtins(self.config),
                "first_insert": self.first_insert,
                "first_sample": self.first_sample,
            }
        return {"counts": {name: getattr(self, name) for name in COUNTS}, "limiter": changed}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned; the rules may be missing.

        Raises:
            InvalidInput: the rules are none. Nothing changes.
        """
        counts = {name: int(state["counts"][name]) for name in COUNTS}
        changed = state.get("limiter")
        if changed is not None:
            try:
                config = msgspec.convert(changed["config"], LimiterConfig)
            except msgspec.MsgspecError as error:
                raise InvalidInput(f"{changed} is no rate limiter: {error}") from error
            self._configure(config, int(changed["first_insert"]), int(changed["first_sample"]))
        for name in COUNTS:
            setattr(self, name, counts[name])
        if isinstance(self.config, _Once):
            self.first_insert = self.num_inserts - self.size - (self.num_samples - self.first_sample)

    @property
    def size(self) -> int:
        """Items in the table."""
        return self.num_inserts - self.num_deletes

    @property
    def cursor(self) -> float:
        """Draws that the items inserted so far have earned, less those granted."""
        return (self.num_inserts - self.first_insert) * self._ratio - (self.num_samples - self.first_sample)

    def num_insertable(self, num_items: int) -> int:
        """How many of `num_items` committed together pass now, one after the other as Reverb inserts them.

        Judged by the item and not by the commit: otherwise a commit across the minimum size, or one larger than the
        room left, could wait for samples that wait for it.
        """
        if self._max_diff == math.inf:
            return num_items
        num_counted, num_sampled = self.num_inserts - self.first_insert, self.num_samples - self.first_sample
        by_ratio = math.floor((self._max_diff + num_sampled) / self._ratio) - num_counted
        # The quotient is rounded, either way; the rule itself has the last word.
        while by_ratio > 0 and not self._within_max_diff(by_ratio):
            by_ratio -= 1
        while by_ratio < num_items and self._within_max_diff(by_ratio + 1):
            by_ratio += 1
        return min(num_items, max(0, self._min_size - self.size, by_ratio))

    def _within_max_diff(self, num_items: int) -> bool:
        # Multiplied as one number, as in Reverb: adding to the cursor would round twice.
        num_counted, num_sampled = self.num_inserts - self.first_insert, self.num_samples - self.first_sample
        return (num_counted + num_items) * self._ratio - num_sampled <= self._max_diff

    def can_sample(self, num_draws: int) -> bool:
        """Whether a grant of `num_draws` passes now."""
        return self.size >= self._min_size and self.cursor - num_draws >= self._min_diff

    def inserted(self, num_items: int) -> None:
        """Count items at their commit."""
        self.num_inserts += num_items

    def sampled(self, num_draws: int) -> None:
        """Count draws at their grant (spare draws are not charged)."""
        self.num_samples += num_draws

    def deleted(self, num_items: int) -> None:
        """Count items that left the table, by eviction, by `clear`, or with their last use."""
        self.num_deletes += num_items

    def cleared(self, num_items: int) -> None:
        """Count items that left the table by `clear`."""
        self.deleted(num_items)
        if isinstance(self.config, _Once):  # nobody will sample them, and so nobody must wait for that
            self.first_insert += num_items

    def check_sample_possible(self, num_draws: int) -> None:
        """Refuse a batch for which learner and writers could wait for each other for ever.

        Raises:
            InvalidInput: there is a cursor at which neither this batch nor one more item passes.
        """
        check_sample_possible(self.config, num_draws)

    def describe(self) -> dict[str, Any]:
        """Rules and counters in plain values; None stands for no bound."""
        min_diff, max_diff = (bound if math.isfinite(bound) else None for bound in self.config.bounds)
        return {
            "kind": type(self.config).__name__,
            "parameters": msgspec.structs.asdict(self.config),
            "cursor": self.cursor,
            "min_diff": min_diff,
            "max_diff": max_diff,
            "min_size": self._min_size,
        }

    def explain_insert(self, num_items: int) -> str:
        """One sentence on why some of `num_items` wait."""
        if isinstance(self.config, _Once):
            return f"inserting waits: {self.size} of {self.config.capacity} items are there and not taken"
        num_counted, num_sampled = self.num_inserts - self.first_insert, self.num_samples - self.first_sample
        missing = math.ceil((num_counted + num_items) * self._ratio - num_sampled - self._max_diff)
        return (
            f"inserting waits: cursor {self.cursor} + {num_items} * {self._ratio} > {self._max_diff} = max_diff; "
            f"the learner must sample {missing} more"
        )

    def explain_sample(self, num_draws: int) -> str:
        """One sentence on why a batch of `num_draws`, which `can_sample` refuses, waits."""
        if isinstance(self.config, _Once):
            return f"sampling waits: {self.size} of {num_draws} items"
        if self.size < self._min_size:
            return f"sampling waits: {self.size} of {self._min_size} items"
        missing = math.ceil((self._min_diff + num_draws - self.cursor) / self._ratio)
        return (
            f"sampling waits: cursor {self.cursor} - {num_draws} < {self._min_diff} = min_diff; "
            f"the writers must insert {missing} more"
        )


def check_sample_possible(config: LimiterConfig, num_draws: int) -> None:
    """See `RateLimiter.check_sample_possible`."""
    min_diff, max_diff = config.bounds
    room, ratio = max_diff - min_diff, config.samples_per_insert
    if isinstance(config, _Once):
        if num_draws > config.capacity:  # whole numbers: at any cursor below it one more item passes
            kind = type(config).__name__
            raise InvalidInput(
                f"a batch of {num_draws} items could never pass {kind}({config.capacity}), which lets at most "
                f"{config.capacity} wait; lower batch_size or raise the capacity"
            )
    elif num_draws + ratio > room:
        raise InvalidInput(
            f"a batch of {num_draws} draws could wait for ever: {num_draws} + samples_per_insert {ratio} > "
            f"{room} = max_diff - min_diff; sample at most {math.floor(room - ratio)} or widen error_buffer"
        )
