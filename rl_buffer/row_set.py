"""A set of row numbers with O(1) insertion, removal and access by position, for uniform draws.

The members lie densely in an array, in no order; a removed one is replaced by the last. One thread at a time.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_buffer.errors import InvalidInput
from rl_buffer.kernels import INT, INTS_2D, INTS_IN, compiled

# Rows of the one array that the kernels take: members in their order, and each row's place there (-1: none).
_MEMBERS, _PLACES = 0, 1


@compiled(INTS_2D, INT, INTS_IN)
def _insert(table: Any, size: int, rows: Any) -> int:
    for row in rows:
        if row < 0 or row >= table.shape[1]:
            raise IndexError
    for row in rows:
        if table[_PLACES, row] < 0:
            table[_MEMBERS, size] = row
            table[_PLACES, row] = size
            size += 1
    return size


@compiled(INTS_2D, INT, INTS_IN)
def _remove(table: Any, size: int, rows: Any) -> int:
    for row in rows:
        if row < 0 or row >= table.shape[1]:
            raise IndexError
    for row in rows:
        place = table[_PLACES, row]
        if place >= 0:
            size -= 1
            last = table[_MEMBERS, size]
            table[_MEMBERS, place] = last
            table[_PLACES, last] = place
            # After the line above, because the row may itself be the last.
            table[_PLACES, row] = -1
    return size


class RowSet:
    """Some of the rows 0 <= row < num_rows.

    Invariant: members[places[row]] == row for every row in the set, and places[row] == -1 for every other.
    """

    def __init__(self, num_rows: int) -> None:
        """Start empty; O(num_rows)."""
        self._table = np.full((2, num_rows), -1, np.int64)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def members(self) -> NDArray[np.int64]:
        """The rows in the set, [len] int64 in no order: a view that the next change overwrites."""
        return self._table[_MEMBERS, : self._size]

    def insert(self, rows: NDArray[np.int64]) -> None:
        """Add rows ([N] int64, contiguous); those in the set already stay in it once.

        Raises:
            InvalidInput: a row is out of range. Nothing has changed.
        """
        try:
            self._size = _insert(self._table, self._size, rows)
        except IndexError:
            raise self._out_of_range(rows) from None

    def remove(self, rows: NDArray[np.int64]) -> None:
        """Take rows ([N] int64, contiguous) out; those not in the set are passed over.

        Raises:
            InvalidInput: a row is out of range. Nothing has changed.
        """
        try:
            self._size = _remove(self._table, self._size, rows)
        except IndexError:
            raise self._out_of_range(rows) from None

    def _out_of_range(self, rows: NDArray[np.int64]) -> InvalidInput:
        num_rows = self._table.shape[1]
        position = int(np.flatnonzero((rows < 0) | (rows >= num_rows))[0])
        return InvalidInput(f"row {rows[position]} at position {position}; expected 0 <= row < {num_rows}")
