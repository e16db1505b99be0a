"""Steps made into n-step transitions: the items of an ordinary replay table."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_buffer.failpoints import reached
from rl_buffer.n_step import Windows, assemble, td_errors
from rl_buffer.samplers import Prioritized
from rl_buffer.step_history import StepHistory


class TransitionHistory(StepHistory[Windows]):
    """The steps that may still begin or end a transition; see `n_step` for what a transition is made of."""

    @property
    def max_items(self) -> int:
        """See `StepHistory`: every step begins one transition."""
        return self.capacity * self._num_envs

    def complete(self, *, close: bool) -> Windows:
        """See `StepHistory`."""
        steps = slice(0, self.num_steps)
        needs_next: bool | NDArray[np.bool_] = False
        if self._any_values:
            # The value of the state behind the window comes with the next step, unless there is none to come.
            needs_next = ~self._terminated[steps] & np.isnan(self._final_values[steps])
            needs_next &= ~np.isnan(self._state_values[steps])
            if self._autoreset != "next_step":
                needs_next &= ~self._cut[steps]
        return assemble(
            self._rewards[steps],
            self._terminated[steps],
            self._truncated[steps],
            self._cut[steps],
            self._startable[steps],
            n_step=self._table.n_step,
            gamma=self._table.gamma,
            needs_next=needs_next,
            close=close,
        )

    def td_errors(self, items: Windows) -> NDArray[np.float64] | None:
        """See `StepHistory`."""
        if not isinstance(self._table.sampler, Prioritized) or not self._any_values:
            return None
        steps = slice(0, self.num_steps)
        errors = td_errors(
            items,
            self._q_taken[steps],
            self._state_values[steps],
            self._final_values[steps],
            cut=self._cut[steps],
            dummy=self._dummy[steps],
        )
        priorities = self._priorities[items.first, items.envs]
        return np.where(np.isnan(priorities), errors, priorities)

    def copy_rows(self, items: Windows, views: Mapping[str, NDArray[Any]], rows: NDArray[np.int64]) -> None:
        """See `StepHistory`."""
        where = _run(rows)
        firsts = self._whole_steps(items.first)
        # With n_step = 1 a transition ends where it begins; else its end is a run only while nothing is cut.
        lasts = firsts if items.last is items.first else None
        for path, leaf in self._leaves.items():
            is_next = path.startswith("next_observations")
            steps, numbers = (lasts, items.last) if is_next else (firsts, items.first)
            if steps is not None and isinstance(where, slice):
                block = views[path][where]
                block.reshape(-1, *leaf.shape[1:])[...] = leaf[steps]
            else:
                views[path][where] = leaf[numbers, items.envs]
            reached("writer.half_written")
        views["rewards"][where] = items.rewards
        views["dones"][where] = items.terminated
        views["discounts"][where] = items.discounts
        views["n_steps"][where] = items.n_steps
        views["terminateds"][where] = items.terminated
        views["truncateds"][where] = items.truncated

    def emitted(self, items: Windows) -> None:
        """See `StepHistory`: the steps before the earliest that can still begin a transition go."""
        waiting = self._startable[: self.num_steps]
        if np.count_nonzero(waiting) == len(items):  # the common case first: nothing waits
            self._forget(self.num_steps)
            return
        self._startable[items.first, items.envs] = False
        self._forget(int(waiting.any(axis=1).argmax()) if np.count_nonzero(waiting) else self.num_steps)

    def _whole_steps(self, first: NDArray[np.int64]) -> slice | None:
        """The steps that sorted, distinct starts are, if they are those of all environments in each."""
        if not len(first):
            return None
        start, stop = int(first[0]), int(first[-1]) + 1
        return slice(start, stop) if len(first) == (stop - start) * self._num_envs else None


def _run(rows: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Rows that follow each other as a slice: copies to it take a quarter of the time. A writer's mostly do."""
    if (
        len(rows)
        and rows[-1] - rows[0] == len(rows) - 1
        and np.count_nonzero(rows[1:] - rows[:-1] == 1) == len(rows) - 1
    ):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows
