"""`PrioritizedReplayBuffer`: the in-process table sampled in proportion to (|TD error| + epsilon)^alpha."""

import os
from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from rl_buffer.batches import Batch, as_td_errors, drawn_rows
from rl_buffer.errors import InvalidInput
from rl_buffer.importance import require_beta
from rl_buffer.inputs import as_numpy
from rl_buffer.replay_buffer import ReplayBuffer
from rl_buffer.row_copies import NO_WORDS
from rl_buffer.samplers import Prioritized

_REMEMBERED_DRAWS = 16


class PrioritizedReplayBuffer(ReplayBuffer):
    """`ReplayBuffer` with proportional priorities (Schaul et al. 2016, "Prioritized Experience Replay").

    New transitions get the largest priority among the live ones, unless `add` is given `priority=` or values to
    compute it from.

    Attributes:
        beta: exponent of the importance weights in [0, 1]; may be set at any time, commonly from 0.4 up to 1.
    """

    def __init__(
        self,
        *args: Any,
        alpha: float = 0.6,
        beta: float = 0.4,
        epsilon: float = 1e-6,
        eta: float = 0.9,
        **options: Any,
    ) -> None:
        """Reserve the memory.

        Args:
            *args: as `ReplayBuffer`.
            alpha: 0 is uniform, 1 fully proportional.
            beta: 0 leaves the bias of the draws, 1 undoes all of it.
            epsilon: > 0, keeps a transition with TD error 0 in play.
            eta: a sequence's TD error is eta * max |TD| + (1 - eta) * mean |TD| over its trained steps.
            **options: as `ReplayBuffer`.

        Raises:
            InvalidInput: a value is out of range.
        """
        self._sampler = Prioritized(alpha, epsilon)
        self._eta = eta
        self.beta = require_beta(beta)
        super().__init__(*args, **options)
        # Rows and generations that were drawn of late, the newest first: so an update by bare indices can tell that it
        # comes too late.
        self._drawn: deque[tuple[NDArray[np.int64], NDArray[np.int64]]] = deque(maxlen=_REMEMBERED_DRAWS)

    @property
    def num_stale_updates(self) -> int:
        """Priorities that came for transitions that had been overwritten; they were dropped."""
        return self._state.num_stale_updates

    def get(self, batch_size: int, beta: float | None = None) -> Batch:
        """Draw a batch by priority, with replacement; it has `weights`, `indices` and `generations` too.

        Args:
            batch_size: 1 .. num_transitions.
            beta: instead of the attribute, for this batch.

        Raises:
            InvalidInput: fewer transitions are there, or beta is not in [0, 1].
        """
        beta = require_beta(self.beta if beta is None else beta)
        self._require_items(batch_size)
        copied = self._gatherer.source_and_target(batch_size)
        rows, generations, weights = self._state.draw_batch(batch_size, beta, *(copied or (NO_WORDS, NO_WORDS)))
        if copied is None:
            self._gatherer.gather(rows)
        self._drawn.appendleft((rows, generations))
        return self._gatherer.hand_out({"weights": weights, "indices": rows, "generations": generations})

    def sample(self, batch_size: int, beta: float | None = None) -> Batch:
        """Another name of `get`."""
        return self.get(batch_size, beta)

    def update_priorities(self, batch: Any, td_errors: ArrayLike | torch.Tensor) -> None:
        """Set priorities from TD errors, signed or not; of a transition named twice the last one counts.

        Args:
            batch: what `get` returned, or its `indices` alone ((B,) integers). Transitions that were overwritten since
                are left alone and counted in `num_stale_updates`; of bare indices that is known as long as they are
                those of one of the last 16 batches.
            td_errors: (B,) or (B, 1), of a batch of sequences also (B, T); on any device, may require grad.

        Raises:
            InvalidInput: wrong shape, NaN or infinity, or an index out of range. Nothing has changed.
        """
        self.flush()
        drawn = drawn_rows(batch)
        if drawn is not None:
            rows, generations = drawn
        else:
            rows = as_numpy(batch)
            if rows.ndim != 1 or rows.dtype.kind not in "iu":
                raise InvalidInput(f"indices must be integers (B,), got {rows.dtype}{list(rows.shape)}")
            rows = np.ascontiguousarray(rows, np.int64)
            if len(rows) and not (rows.min() >= 0 and rows.max() < self.table.num_rows):
                raise InvalidInput(f"indices must be in [0, {self.table.num_rows}), got {rows.min()}..{rows.max()}")
            generations = self._generations_when_drawn(rows)
        self._state.update_priorities(rows, generations, as_td_errors(self.table, batch, len(rows), td_errors))

    def load(self, path: str | os.PathLike[str]) -> None:
        """See `ReplayBuffer.load`; `beta` stays as it is."""
        super().load(path)
        self._drawn.clear()

    def _generations_when_drawn(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        for drawn, generations in self._drawn:
            if np.array_equal(drawn, rows):
                return generations
        return self._state.generations[rows]
