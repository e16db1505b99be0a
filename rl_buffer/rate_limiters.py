"""Rate limiters: when a table takes more items, and when it gives samples. Reverb's semantics.

Pure bookkeeping of three counters: no clock, no threads, no queue. The server asks before it lets a request
pass, tells what it let pass, and keeps the waiting requests itself.

    num_inserts  committed items       size   = num_inserts - num_deletes
    num_samples  granted draws         cursor = num_inserts * samples_per_insert - num_samples
    num_deletes  evicted items

Overwriting is an insert and a delete: it leaves the size as it is and still moves the cursor.
Cassirer et al. (2021), "Reverb: A Framework for Experience Replay".
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

    def num_insertable(self, num_items: int) -> int:
        """How many of `num_items` committed together pass now, one after the other as Reverb inserts them.

        Judged by the item and not by the commit: otherwise a commit across the minimum size, or one larger than the
        room left, could wait for samples that wait for it.
        """
        if self._max_diff == math.inf:
            return num_items
        by_ratio = math.floor((self._max_diff + self.num_samples) / self._ratio) - self.num_inserts
        # The quotient is rounded; the rule itself has the last word.
        while by_ratio > 0 and not self._within_max_diff(by_ratio):
            by_ratio -= 1
        return min(num_items, max(0, self._min_size - self.size, by_ratio))

    def _within_max_diff(self, num_items: int) -> bool:
        # Multiplied as one number, as in Reverb: adding to the cursor would round twice.
        return (self.num_inserts + num_items) * self._ratio - self.num_samples <= self._max_diff

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

    def check_sample_possible(self, num_draws: int) -> None:
        """Refuse a batch for which learner and writers could wait for each other for ever.

        Raises:
            InvalidInput: there is a cursor at which neither this batch nor one more item passes.
        """
        room = self._max_diff - self._min_diff
        if num_draws + self._ratio > room:
            raise InvalidInput(
                f"a batch of {num_draws} draws could wait for ever: {num_draws} + samples_per_insert {self._ratio} > "
                f"{room} = max_diff - min_diff; sample at most {math.floor(room - self._ratio)} or widen error_buffer"
            )

    def explain_insert(self, num_items: int) -> str:
        """One sentence on why some of `num_items` wait."""
        missing = math.ceil((self.num_inserts + num_items) * self._ratio - self.num_samples - self._max_diff)
        return (
            f"inserting waits: cursor {self.cursor} + {num_items} * {self._ratio} > {self._max_diff} = max_diff; "
            f"the learner must sample {missing} more"
        )

    def explain_sample(self, num_draws: int) -> str:
        """One sentence on why a batch of `num_draws`, which `can_sample` refuses, waits."""
        if self.size < self._min_size:
            return f"sampling waits: {self.size} of {self._min_size} items"
        missing = math.ceil((self._min_diff + num_draws - self.cursor) / self._ratio)
        return (
            f"sampling waits: cursor {self.cursor} - {num_draws} < {self._min_diff} = min_diff; "
            f"the writers must insert {missing} more"
        )
