"""Rate limiters: when a table takes more items, and when it gives samples. Reverb's semantics.

Pure bookkeeping of three counters: no clock, no threads, no queue. The server asks before it lets a request
pass, tells what it let pass, and keeps the waiting requests itself.

    num_inserts  committed items       size   = num_inserts - num_deletes
    num_samples  granted draws         cursor = num_inserts * samples_per_insert - num_samples
    num_deletes  evicted items

Overwriting is an insert and a delete: it leaves the size as it is and still moves the cursor.
Cassirer et al. (2021), "Reverb: A Framework for Experience Replay", section 3.4.
"""

import math

import msgspec

from rl_buffer.errors import InvalidInput


class MinSize(msgspec.Struct, frozen=True, tag=True):
    """Sampling waits until the table holds `min_size_to_sample` items; inserting never waits."""

    min_size_to_sample: int = 1

    def __post_init__(self) -> None:
        """Refuse what could never let a sample pass."""
        _check_min_size(self.min_size_to_sample)


class SampleToInsertRatio(msgspec.Struct, frozen=True, tag=True):
    """Hold the number of draws per inserted item near `samples_per_insert`.

    Until the table holds `min_size_to_sample` items it works like MinSize. From then on sampling waits where
    it would take the cursor below min_diff, and inserting where it would take it above max_diff.
    """

    samples_per_insert: float
    min_size_to_sample: int
    # A number e means min_size_to_sample * samples_per_insert -+ e; a pair is (min_diff, max_diff) itself.
    error_buffer: float | tuple[float, float]

    def __post_init__(self) -> None:
        """Refuse, as Reverb does, bounds that would block both sides for ever."""
        _check_min_size(self.min_size_to_sample)
        ratio = self.samples_per_insert
        if not 0.0 < ratio < math.inf:
            raise InvalidInput(f"samples_per_insert is {ratio}; expected a finite number above 0")
        min_diff, max_diff = self.bounds
        narrowest = 2.0 * max(1.0, ratio)
        # Narrower, and a single insert and a single draw could each wait for the other. `not >=` refuses NaN.
        if not max_diff - min_diff >= narrowest:
            raise InvalidInput(
                f"error_buffer {self.error_buffer} lets the cursor go from {min_diff} to {max_diff}; expected "
                f"a range of at least {narrowest} = 2 * max(1, samples_per_insert)"
            )
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


def _check_min_size(min_size_to_sample: int) -> None:
    if min_size_to_sample < 1:
        raise InvalidInput(f"min_size_to_sample is {min_size_to_sample}; expected at least 1")


class RateLimiter:
    """The counters of one table and the two questions asked of them. Everything is O(1)."""

    def __init__(self, config: MinSize | SampleToInsertRatio) -> None:
        self.num_inserts = 0
        self.num_samples = 0
        self.num_deletes = 0
        self._min_size = config.min_size_to_sample
        if isinstance(config, MinSize):
            self._ratio, self._min_diff, self._max_diff = 1.0, -math.inf, math.inf
        else:
            self._ratio = config.samples_per_insert
            self._min_diff, self._max_diff = config.bounds

    @property
    def size(self) -> int:
        """Items in the table."""
        return self.num_inserts - self.num_deletes

    @property
    def cursor(self) -> float:
        """Draws that the items inserted so far have earned, less those granted."""
        return self.num_inserts * self._ratio - self.num_samples

    def can_insert(self, num_items: int) -> bool:
        """Whether a commit of `num_items` passes now."""
        return (
            self.size + num_items <= self._min_size
            # Multiplied as one number, as in Reverb: adding to the cursor would round twice.
            or (self.num_inserts + num_items) * self._ratio - self.num_samples <= self._max_diff
        )

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
        """Count items that left the table, by eviction or by `clear`."""
        self.num_deletes += num_items

    def check_insert_possible(self, num_items: int) -> None:
        """Refuse a commit that would wait for ever, whatever the learner draws.

        Raises:
            InvalidInput: it goes beyond the minimum size, and even from min_diff it would pass max_diff.
        """
        room = self._max_diff - self._min_diff
        if self.size + num_items > self._min_size and num_items * self._ratio > room:
            raise InvalidInput(
                f"a commit of {num_items} items could never pass: {num_items} * {self._ratio} > {room} = "
                f"max_diff - min_diff; commit at most {math.floor(room / self._ratio)} or widen error_buffer"
            )

    def check_sample_possible(self, num_draws: int) -> None:
        """Refuse a batch that would wait for ever, whatever the writers commit.

        Raises:
            InvalidInput: even from max_diff it would pass min_diff.
        """
        room = self._max_diff - self._min_diff
        if num_draws > room:
            raise InvalidInput(
                f"a batch of {num_draws} draws could never pass: {num_draws} > {room} = max_diff - min_diff; "
                f"sample at most {math.floor(room)} or widen error_buffer"
            )

    def explain_insert(self, num_items: int) -> str:
        """One sentence on why a commit of `num_items`, which `can_insert` refuses, waits."""
        waits = f"inserting waits: cursor {self.cursor} + {num_items} * {self._ratio} > {self._max_diff} = max_diff"
        if self.size < self._min_size:
            # Nobody can sample yet, so only a smaller commit helps.
            return f"{waits}; commit the {self._min_size - self.size} items that sampling waits for first"
        missing = math.ceil(self.cursor + num_items * self._ratio - self._max_diff)
        return f"{waits}; the learner must sample {missing} more"

    def explain_sample(self, num_draws: int) -> str:
        """One sentence on why a batch of `num_draws`, which `can_sample` refuses, waits."""
        if self.size < self._min_size:
            return f"sampling waits: {self.size} of {self._min_size} items"
        missing = math.ceil((self._min_diff + num_draws - self.cursor) / self._ratio)
        return (
            f"sampling waits: cursor {self.cursor} - {num_draws} < {self._min_diff} = min_diff; "
            f"the writers must insert {missing} more"
        )
