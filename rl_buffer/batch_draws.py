"""A prioritized batch in one kernel: draw rows, weight them, tell what they hold, and copy them.

What `SumTree.draw`, `importance_weights` and `gather_rows` do one after the other, of the same parts. Each of these
calls costs 2 us around its kernel; and here a row's cache lines are on their way while others are weighted.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_buffer.cache_lines import prefetch
from rl_buffer.importance import smallest_of, weight
from rl_buffer.kernels import FLOAT, FLOATS, FLOATS32, FLOATS_2D, INT, INTS, INTS_2D, compiled
from rl_buffer.row_copies import ask_for_row, copy_row, num_rows_ahead
from rl_buffer.sum_tree import SumTree, draw_leaves

_ROWS, _GENERATIONS = 0, 1
NO_WORDS = np.empty(0, np.int64)


@compiled(FLOATS, FLOATS_2D, INTS, FLOATS, FLOAT, INTS, INTS_2D, FLOATS32, INTS, INT, INTS)
def _draw_batch(
    leaves: Any,
    nodes: Any,
    levels: Any,
    uniforms: Any,
    beta: float,
    generations: Any,
    drawn: Any,
    weights: Any,
    source: Any,
    row_words: int,
    target: Any,
) -> None:
    num_draws = uniforms.size
    rows, masses = drawn[_ROWS], np.empty(num_draws)
    draw_leaves(leaves, nodes, levels, uniforms, num_draws, rows, masses)
    smallest = smallest_of(masses)
    ahead = num_rows_ahead(row_words)
    for i in range(-ahead, num_draws):
        if i + ahead < num_draws:
            ask_for_row(source, row_words, rows[i + ahead])
            prefetch(generations, rows[i + ahead])
        if i >= 0:
            copy_row(source, row_words, rows[i], target, i)
            weights[i] = weight(masses[i], smallest, beta)
            drawn[_GENERATIONS, i] = generations[rows[i]]


def draw_batch(
    tree: SumTree,
    uniforms: NDArray[np.float64],
    beta: float,
    generations: NDArray[np.int64],
    source: NDArray[np.int64],
    target: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Draw N rows by mass, one of each N-th part of the total, and copy them.

    Args:
        tree: of the masses of all rows, one of which at least has mass.
        uniforms: [N] float64 in [0, 1); used up.
        beta: as in `importance_weights`.
        generations: of all rows, [num_leaves].
        source: words of all rows, flat: [num_leaves * row_words].
        target: flat, [N * row_words]; where the rows go to. Empty if they are not to be copied.

    Returns:
        Rows and their generations, [2, N] int64, and weights [N].
    """
    drawn, weights = np.empty((2, len(uniforms)), np.int64), np.empty(len(uniforms), np.float32)
    row_words = target.size // len(uniforms)
    _draw_batch(*tree.arrays, uniforms, beta, generations, drawn, weights, source, row_words, target)
    return drawn, weights
