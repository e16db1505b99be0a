"""How fast a table moves, how old and how worn the drawn items are, and how its priorities lie.

Three parts, each cheap where it is on the way of every message, and all else computed when somebody asks. Together they
cost about 0.5 % of the server core's time at full load (up to 2.7 % while ten other processes wanted its two cores):
uv run scripts/benchmarks/diagnostics.py

    RateWindow   counters of the last seconds, noted twice a second, from which rates per second are taken
    ItemWatch    when some rows were committed, with which parameters, and how often each was drawn since
    priorities   quantiles over a bounded random part of the items

Only the server's thread uses it. The clock is passed in; no sockets, and no row contents.
"""

from collections import deque
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_buffer.kernels import FLOAT, INT, INTS_IN, UINTS32, UINTS32_2D, compiled

Counts = tuple[float, ...]

WINDOW_S = 5.0
NOTE_EVERY_S = 0.5
_SHORTEST_S = 0.5  # a rate over less says more about when somebody looked than about the table

# All that an `ItemWatch` knows is one array of lines of four words, because each array costs a kernel's call 0.15 us:
#
#     0             number of looks
#     1 ...         the last looks: a watched row was drawn
#     _MARKS ...    a bit for each row: it may be watched. 1 M of them fit into a core's cache; to look for records at
#                   once cost 6 us a batch of 256, for the cache misses, which is 3 % of the batch
#     records ...   of each row. It is about what the row holds if the generation is still the same
#
# Words have 32 bits: what wraps round is subtracted or compared only. Lag _UNKNOWN says that nothing is known.
_AGE_STEPS, _AGE_MS, _TIMES_SAMPLED, _LAG = range(4)
_NUMBER, _COMMITTED_MS, _VERSION, _GENERATION = range(4)
_LOOKS_KEPT = 2048
_MARKS = 1 + _LOOKS_KEPT
_LINE_BITS = 7  # 128 bits
_UNKNOWN = (1 << 32) - 1
_WATCH_EVERY_S = 0.02  # at 1,000 commits a second one of twenty is watched; noting each cost 0.8 us, which was 1 %

_NUM_LEAVES = 4096
_DESCRIBE_EVERY_S = 0.5  # who asks more often gets the last answer: sorting costs 0.2 ms a table


@compiled(UINTS32_2D, UINTS32, INTS_IN, INTS_IN, INT, FLOAT, INT)
def _note_commit(
    words: Any, times: Any, rows: Any, generations: Any, num_commits: int, now_s: float, version: int
) -> None:
    records = _MARKS + ((times.size - 1) >> _LINE_BITS) + 1
    for i in range(rows.size):
        row = rows[i]
        words[_MARKS + (row >> _LINE_BITS), (row >> 5) & 3] |= np.uint32(1 << (row & 31))
        words[records + row, _NUMBER] = num_commits - rows.size + i
        words[records + row, _COMMITTED_MS] = np.int64(now_s * 1e3)
        words[records + row, _VERSION] = version
        words[records + row, _GENERATION] = generations[i]
        times[row] = 0


@compiled(UINTS32_2D, UINTS32, INTS_IN, INTS_IN, INT, FLOAT, INT)
def _note_draw(
    words: Any, times: Any, rows: Any, generations: Any, num_commits: int, now_s: float, newest_version: int
) -> None:
    """Count each draw of a watched row, and write down what it looks like then."""
    records = _MARKS + ((times.size - 1) >> _LINE_BITS) + 1
    for i in range(rows.size):
        row = rows[i]
        if not words[_MARKS + (row >> _LINE_BITS), (row >> 5) & 3] >> (row & 31) & 1:
            continue
        record = records + row
        if words[record, _GENERATION] != np.uint32(generations[i]):
            words[_MARKS + (row >> _LINE_BITS), (row >> 5) & 3] &= ~np.uint32(1 << (row & 31))
            continue
        times[row] += 1
        version = np.int64(words[record, _VERSION])
        look = 1 + words[0, 0] % _LOOKS_KEPT
        words[0, 0] += 1
        words[look, _AGE_STEPS] = num_commits - 1 - np.int64(words[record, _NUMBER])
        words[look, _AGE_MS] = np.int64(now_s * 1e3) - np.int64(words[record, _COMMITTED_MS])
        words[look, _TIMES_SAMPLED] = times[row]
        words[look, _LAG] = newest_version - version if 0 < version <= newest_version else _UNKNOWN


class ItemWatch:
    """Ages, uses and version lags of drawn items: exact for those that it watches, and it watches some commits only.

    Attributes:
        drawn: to be called as (rows, generations, num_commits, now_s, newest_version) when rows are handed out.
        next_commit_s: when a commit is to be watched again.

    Rows and their generations are [N] int64, contiguous; `now_s` is of a monotonic clock.
    """

    def __init__(self, num_rows: int) -> None:
        """Watch rows 0 <= row < `num_rows`, of which nothing is known yet."""
        num_marks = ((num_rows - 1) >> _LINE_BITS) + 1
        self._words = np.zeros((_MARKS + num_marks + num_rows, 4), np.uint32)
        self._times = np.zeros(num_rows, np.uint32)
        self.next_commit_s = -np.inf
        # Not a method, which would cost 0.15 us more.
        self.drawn: Callable[[NDArray[np.int64], NDArray[np.int64], int, float, int], None]
        self.drawn = partial(_note_draw, self._words, self._times)

    def committed(
        self, rows: NDArray[np.int64], generations: NDArray[np.int64], num_commits: int, now_s: float, version: int
    ) -> None:
        """Rows hold new items, made with parameters `version` (0: not known); to be called if it is `next_commit_s`.

        `num_commits` counts items so far, these included.
        """
        _note_commit(self._words, self._times, rows, generations, num_commits, now_s, version)
        self.next_commit_s = now_s + _WATCH_EVERY_S

    def describe(self) -> dict[str, Any]:
        """Figures of the last draws that were looked at; None for what nothing is known about.

        `age_steps` counts items committed after it, `age_s` seconds since its commit, `times_sampled` this draw and
        those before it, `version_lag` parameter versions published since the item was made.
        """
        looks = self._words[1 : 1 + min(int(self._words[0, 0]), _LOOKS_KEPT)]
        lags = looks[:, _LAG]
        return {
            "draws_looked_at": len(looks),
            "age_steps": _spread(looks[:, _AGE_STEPS]),
            "age_s": _spread(looks[:, _AGE_MS] * 1e-3),
            "times_sampled": _spread(looks[:, _TIMES_SAMPLED]),
            "version_lag": _spread(lags[lags != _UNKNOWN]),
        }


def _spread(values: NDArray[Any]) -> dict[str, float] | None:
    if not len(values):
        return None
    ordered = np.sort(values)
    return {
        "mean": float(ordered.mean()),
        "p50": float(ordered[_place(0.5, len(ordered))]),
        "p90": float(ordered[_place(0.9, len(ordered))]),
        "max": float(ordered[-1]),
    }


def _place(quantile: float, length: int) -> int:
    """Of the value that at least this part of all is no greater than (no interpolation: it is one of them)."""
    return max(0, int(np.ceil(quantile * length)) - 1)


def describe_priorities(masses: NDArray[np.float64]) -> dict[str, float] | None:
    """How sampling masses, (|TD error| + epsilon)^alpha, are distributed; None where there are none.

    Args:
        masses: [N] float64 > 0, of items; N is said as `items_looked_at`.

    `top_1_percent_share` is the share of the sum that the largest hundredth of the items has, at least one item: 0.01
    where all are alike, and near 1 where a few items are all that is ever drawn.
    """
    if not len(masses):
        return None
    ordered = np.sort(masses)
    figures = {f"p{100 * q:.0f}": float(ordered[_place(q, len(ordered))]) for q in (0.1, 0.5, 0.9, 0.99)}
    largest = ordered[-max(1, len(ordered) // 100) :]
    # Divided before they are summed: masses of up to 1e200 may not be added up without care.
    share = float((largest / ordered[-1]).sum() / (ordered / ordered[-1]).sum())
    return {
        "items_looked_at": len(ordered),
        "min": float(ordered[0]),
        **figures,
        "max": float(ordered[-1]),
        "top_1_percent_share": share,
    }


class TableDiagnostics:
    """What is noted of one table, and what is made of it when somebody asks."""

    def __init__(self, num_rows: int) -> None:
        """Nothing is known yet of `num_rows` rows."""
        self.watch = ItemWatch(num_rows)
        self.num_updates = 0  # priorities that learners sent
        # Of its own, so that looking changes no draw of the table's.
        self._rng = np.random.default_rng(0)
        self._described: dict[str, Any] = {}
        self._describe_again_s = -np.inf

    def describe(
        self, committed: list[NDArray[np.int64]], masses: NDArray[np.float64] | None, now_s: float
    ) -> dict[str, Any]:
        """Items and priorities, not older than half a second.

        Args:
            committed: views whose concatenation has the row of every item.
            masses: of every row; None where all items have the same.
            now_s: seconds of a monotonic clock.
        """
        if now_s >= self._describe_again_s:
            priorities = None
            if masses is not None:
                looked_at = masses[self._some(committed)]
                priorities = describe_priorities(looked_at[looked_at > 0.0])
            self._described = {"sampled_items": self.watch.describe(), "priorities": priorities}
            self._describe_again_s = now_s + _DESCRIBE_EVERY_S
        return self._described

    def _some(self, committed: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        """All rows, or a bounded random part of them."""
        parts = []
        num_items = sum(map(len, committed))
        for rows in committed:
            if num_items <= _NUM_LEAVES:
                parts.append(rows)
            elif len(rows):
                parts.append(rows[self._rng.integers(len(rows), size=round(_NUM_LEAVES * len(rows) / num_items))])
        return np.concatenate(parts)


class RateWindow:
    """Changes of counters over the last `WINDOW_S` seconds. Whoever has the counters says what they are.

    Counters only grow. The oldest note that is kept is the newest that is `WINDOW_S` old or older.
    """

    def __init__(self) -> None:
        self._notes: deque[tuple[float, Mapping[Hashable, Counts]]] = deque()
        self.next_note_s = -float("inf")  # when `note` should be called again

    def note(self, now_s: float, counts: Mapping[Hashable, Counts]) -> None:
        """Remember what all counters are. O(number of counters)."""
        self._notes.append((now_s, counts))
        while len(self._notes) > 1 and self._notes[1][0] <= now_s - WINDOW_S:
            self._notes.popleft()
        self.next_note_s = now_s + NOTE_EVERY_S

    def changes(self, key: Hashable, counts: Counts, now_s: float, since_s: float = 0.0) -> tuple[float, Counts]:
        """Over how many seconds, and by how much, `counts` under `key` have grown.

        A key that is younger than the window counts from 0 at `since_s`.
        """
        for noted_s, noted in self._notes:
            if key in noted:
                since_s, before = noted_s, noted[key]
                break
        else:
            before = (0.0,) * len(counts)
        grown = tuple(now - then for now, then in zip(counts, before, strict=True))
        return max(_SHORTEST_S, now_s - since_s), grown
