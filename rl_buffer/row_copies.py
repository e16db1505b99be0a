"""Rows of a table copied into one block: a kernel that keeps many cache misses in flight.

Rows are whole cache lines, which RowLayout sees to. Knows nothing of what is in them.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_buffer.cache_lines import LINE, copy_line, prefetch
from rl_buffer.kernels import INT, INTS, INTS_IN, compiled

# Lines that are asked for ahead. 256 rows of 192 B from 1 M (64 k): 7.2 us (4.4) where ndarray.take has 8.6 (6.0);
# half as many or four times as many cost 0.3 us more.
_LINES_AHEAD = 48
NO_WORDS = np.empty(0, np.int64)


@compiled()
def num_rows_ahead(row_words: int) -> int:
    """How many rows before its copy a row is asked for."""
    return max(1, _LINES_AHEAD * LINE // max(1, row_words))


@compiled()
def ask_for_row(source: Any, row_words: int, row: Any) -> None:
    """Have the lines of a row loaded."""
    for word in range(row * row_words, (row + 1) * row_words, LINE):
        prefetch(source, word)


@compiled()
def copy_row(source: Any, row_words: int, row: Any, target: Any, place: int) -> None:
    """Copy a row of `source` (words of all rows, flat) to where the row `place` of `target` (flat) lies."""
    for word in range(0, row_words, LINE):
        copy_line(target, place * row_words + word, source, row * row_words + word)


@compiled(INTS, INT, INTS_IN, INTS, INTS_IN)
def _copy_rows(source: Any, row_words: int, rows: Any, target: Any, asked: Any) -> None:
    # As unsigned numbers negative rows are too large as well.
    last = np.uint64(source.size // row_words - 1)
    ahead = num_rows_ahead(row_words)
    for i in range(-ahead, rows.size):
        if i + ahead < rows.size:
            row = np.int64(min(np.uint64(rows[i + ahead]), last))
            ask_for_row(source, row_words, row)
            if asked.size:
                prefetch(asked, row)
        if i >= 0:
            copy_row(source, row_words, np.int64(min(np.uint64(rows[i]), last)), target, i)


@compiled(INTS, INT, INTS_IN, INTS, INTS_IN)
def _replace_rows(source: Any, row_words: int, rows: Any, target: Any, places: Any) -> None:
    last = np.uint64(source.size // row_words - 1)
    for i in range(rows.size):
        copy_row(source, row_words, np.int64(min(np.uint64(rows[i]), last)), target, places[i])


def gather_rows(
    source: NDArray[np.int64],
    rows: NDArray[np.int64],
    target: NDArray[np.int64],
    asked: NDArray[np.int64] = NO_WORDS,
) -> None:
    """Copy `rows` ([B] int64) of `source` into `target`; a row that is not there is replaced by the last.

    Args:
        source: flat, [num_rows * row_words], of whole cache lines; at least one row.
        rows: [B], contiguous.
        target: flat, [B * row_words], B >= 1, elsewhere.
        asked: a number of each row, [num_rows], which is about to be read too; [0] if none is.
    """
    _copy_rows(source, target.size // rows.size, rows, target, asked)


def replace_rows(
    source: NDArray[np.int64],
    rows: NDArray[np.int64],
    target: NDArray[np.int64],
    places: NDArray[np.int64],
    row_words: int,
) -> None:
    """As `gather_rows`, of few rows: `rows`, [N], to where the rows `places`, [N] < B, of `target` lie."""
    _replace_rows(source, row_words, rows, target, places)
