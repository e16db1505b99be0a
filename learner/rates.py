"""Rates per second out of counters that only grow."""

from collections import deque
from collections.abc import Mapping

WINDOW_S = 5.0
COUNTERS = ("env_steps", "updates", "inserts", "samples")


class Rates:
    """Looks back on the last seconds of `wall_s`."""

    def __init__(self) -> None:
        self._rows: deque[tuple[float, ...]] = deque()

    def update(self, row: Mapping[str, float]) -> dict[str, float]:
        """Take the newest figures; return {counter}_per_s of each counter."""
        now = (row["wall_s"], *(row[counter] for counter in COUNTERS))
        while len(self._rows) > 1 and now[0] - self._rows[0][0] > WINDOW_S:
            self._rows.popleft()
        self._rows.append(now)
        elapsed_s = max(1e-9, now[0] - self._rows[0][0])
        changes = (new - old for new, old in zip(now[1:], self._rows[0][1:], strict=True))
        return {f"{counter}_per_s": change / elapsed_s for counter, change in zip(COUNTERS, changes, strict=True)}
