"""Importance weights of prioritized draws."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_buffer.errors import InvalidInput
from rl_buffer.kernels import FLOAT, FLOATS32, FLOATS_IN, compiled
from rl_buffer.powers import power


@compiled(FLOATS_IN, FLOAT, FLOATS32)
def weigh(masses: Any, beta: float, weights: Any) -> None:
    """See `importance_weights`, for kernels."""
    smallest = np.inf
    for mass in masses:
        smallest = min(smallest, mass)
    for i in range(masses.size):
        weights[i] = power(smallest / masses[i], beta)


def importance_weights(masses: NDArray[np.float64], beta: float) -> NDArray[np.float32]:
    """Weights that undo a prioritized draw's bias, over the largest of the batch.

    w = (num_items * mass / total)^-beta / max w (Schaul et al. 2016, section 3.4). The number of items and the total
    mass of the table stand in each weight alike, so what is left is (smallest mass / mass)^beta.

    Args:
        masses: [N] float64 > 0, contiguous, of the drawn rows.
        beta: 0 leaves the bias, 1 undoes all of it.

    Returns:
        [N] float32, at most 1.

    Raises:
        InvalidInput: `beta` is not in 0..1.
    """
    weights = np.empty(len(masses), np.float32)
    weigh(masses, require_beta(beta), weights)
    return weights


def require_beta(beta: float) -> float:
    """Return beta, or raise InvalidInput unless it is in 0..1."""
    if not 0.0 <= beta <= 1.0:
        raise InvalidInput(f"beta must be in [0, 1], got {beta}")
    return beta
