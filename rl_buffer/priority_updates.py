"""New priorities for a batch in one kernel: which rows still hold what was drawn, their masses, and the tree."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_buffer.kernels import FLOAT, FLOATS, FLOATS_2D, FLOATS_IN, INTS, INTS_IN, compiled
from rl_buffer.powers import power
from rl_buffer.sum_tree import SumTree, set_leaves

_SMALLEST_MASS = 1e-200  # a live row never has the mass 0 of a removed one

_REFUSED = -1


@compiled(FLOATS, FLOAT)
def to_masses(magnitudes: Any, alpha: float) -> None:
    """Raise |TD error| + epsilon, [N] float64 > 0, to the power of alpha, in place."""
    if alpha != 1.0:  # else they are the masses, without rounding
        for i in range(magnitudes.size):
            magnitudes[i] = power(magnitudes[i], alpha)
    for i in range(magnitudes.size):
        magnitudes[i] = max(magnitudes[i], _SMALLEST_MASS)


@compiled(FLOATS, FLOATS_2D, INTS, INTS, INTS_IN, INTS_IN, FLOATS_IN, FLOAT, FLOAT, FLOAT)
def _update(
    leaves: Any,
    nodes: Any,
    levels: Any,
    generations: Any,
    rows: Any,
    drawn_generations: Any,
    td_errors: Any,
    epsilon: float,
    alpha: float,
    largest: float,
) -> int:
    fresh, masses = np.empty(rows.size, np.int64), np.empty(rows.size)
    num_fresh = 0
    for i in range(rows.size):
        row, magnitude = rows[i], abs(td_errors[i]) + epsilon
        if row < 0 or row >= leaves.size or not np.isfinite(td_errors[i]):
            return _REFUSED
        # Odd: a forged update must not make a row sampleable that is still being written.
        if generations[row] == drawn_generations[i] and drawn_generations[i] & 1:
            if magnitude > largest or leaves[row] == 0.0:
                return _REFUSED
            fresh[num_fresh] = row
            masses[num_fresh] = magnitude
            num_fresh += 1
    to_masses(masses[:num_fresh], alpha)
    set_leaves(leaves, nodes, levels, fresh[:num_fresh], masses[:num_fresh])
    num_stale: int = rows.size - num_fresh
    return num_stale


def update_fresh(
    tree: SumTree,
    generations: NDArray[np.int64],
    rows: NDArray[np.int64],
    drawn_generations: NDArray[np.int64],
    td_errors: NDArray[np.float64],
    *,
    epsilon: float,
    alpha: float,
    largest: float,
) -> int | None:
    """Give rows the mass (|TD error| + epsilon)^alpha where they hold what was drawn; of duplicates the last counts.

    Args:
        tree: of all rows; those of odd generations have mass.
        generations: of all rows, as `ReplayTableState` counts them.
        rows: [N] int64, contiguous, as are the two that follow.
        drawn_generations: [N] int64, of the rows when they were drawn.
        td_errors: [N] float64.
        epsilon: > 0.
        alpha: >= 0.
        largest: the most that |TD error| + epsilon may be.

    Returns:
        How many rows hold something else. None if a row is out of range or has no mass, or a TD error is not finite or
        too large: nothing has changed then.
    """
    num_stale = _update(*tree.arrays, generations, rows, drawn_generations, td_errors, epsilon, alpha, largest)
    return None if num_stale == _REFUSED else num_stale
