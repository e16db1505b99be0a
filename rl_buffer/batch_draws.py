"""A prioritized batch in one kernel: draw rows, weight them, tell what they hold, and copy them.

What `SumTree.draw`, `importance_weights` and `gather_rows` do one after the other, of the same parts. Each of these
calls costs 2 us around its kernel; and here a row's generation comes along with the row. Of what a
server draws for others, `draw_samples` does the first half, several batches at once.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_buffer.cache_lines import prefetch
from rl_buffer.importance import weigh
from rl_buffer.kernels import FLOAT, FLOATS, FLOATS32, FLOATS_2D, INT, INTS, compiled
from rl_buffer.row_copies import ask_for_row, copy_row, num_rows_ahead
from rl_buffer.sum_tree import SumTree, draw_leaves
from rl_buffer.uniforms import fill_uniforms


@compiled(FLOATS, FLOATS_2D, INTS, INT, FLOAT, INTS, INTS, INTS, FLOATS32, INTS, INT, INTS)
def _draw_batch(
    leaves: Any,
    nodes: Any,
    levels: Any,
    seed: int,
    beta: float,
    generations: Any,
    rows: Any,
    drawn_generations: Any,
    weights: Any,
    source: Any,
    row_words: int,
    target: Any,
) -> None:
    num_draws = rows.size
    uniforms, masses = np.empty(num_draws), np.empty(num_draws)
    fill_uniforms(seed, uniforms)
    draw_leaves(leaves, nodes, levels, uniforms, num_draws, rows, masses)
    weigh(masses, beta, weights)
    ahead = num_rows_ahead(row_words)
    for i in range(-ahead, num_draws):
        if i + ahead < num_draws:
            ask_for_row(source, row_words, rows[i + ahead])
            prefetch(generations, rows[i + ahead])
        if i >= 0:
            copy_row(source, row_words, rows[i], target, i)
            drawn_generations[i] = generations[rows[i]]


@compiled(FLOATS, FLOATS_2D, INTS, INTS, INT, INTS, INTS, INTS, FLOATS)
def _draw_samples(
    leaves: Any,
    nodes: Any,
    levels: Any,
    seeds: Any,
    num_parts: int,
    generations: Any,
    rows: Any,
    drawn_generations: Any,
    masses: Any,
) -> None:
    num_draws = rows.size // seeds.size
    uniforms = np.empty(num_draws)
    for batch in range(seeds.size):
        start, stop = batch * num_draws, (batch + 1) * num_draws
        fill_uniforms(seeds[batch], uniforms)
        draw_leaves(leaves, nodes, levels, uniforms, num_parts, rows[start:stop], masses[start:stop])
        for i in range(start, stop):
            prefetch(generations, rows[i])
    for i in range(rows.size):
        drawn_generations[i] = generations[rows[i]]


def draw_samples(
    tree: SumTree, seeds: NDArray[np.int64], num_draws: int, num_parts: int, generations: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Draw several batches with spares, as `SumTree.draw` does each, and tell what their rows hold.

    Args:
        tree: of the masses of all rows, one of which at least has mass.
        seeds: [K] int64, of each batch.
        num_draws: of each batch, with its spares.
        num_parts: draws of each batch that fall into one of as many equal parts of the total each; the rest are spares.
        generations: of all rows, [num_leaves].

    Returns:
        Rows [K * num_draws], their generations and masses.
    """
    num_rows = len(seeds) * num_draws
    rows, drawn_generations, masses = np.empty(num_rows, np.int64), np.empty(num_rows, np.int64), np.empty(num_rows)
    _draw_samples(*tree.arrays, seeds, num_parts, generations, rows, drawn_generations, masses)
    return rows, drawn_generations, masses


def draw_batch(
    tree: SumTree,
    seed: int,
    num_draws: int,
    beta: float,
    generations: NDArray[np.int64],
    source: NDArray[np.int64],
    target: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Draw N rows by mass, one of each N-th part of the total, and copy them.

    Args:
        tree: of the masses of all rows, one of which at least has mass.
        seed: of the draws.
        num_draws: N.
        beta: as in `importance_weights`.
        generations: of all rows, [num_leaves].
        source: words of all rows, flat: [num_leaves * row_words].
        target: flat, [N * row_words]; where the rows go to. Empty if they are not to be copied.

    Returns:
        Rows [N], their generations [N] and weights [N].
    """
    rows, drawn_generations = np.empty(num_draws, np.int64), np.empty(num_draws, np.int64)
    weights = np.empty(num_draws, np.float32)
    row_words = target.size // num_draws
    _draw_batch(*tree.arrays, seed, beta, generations, rows, drawn_generations, weights, source, row_words, target)
    return rows, drawn_generations, weights
