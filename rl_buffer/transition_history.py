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
        for path, leaf in self._leaves.items():
            steps = items.last if path.startswith("next_observations") else items.first
            views[path][rows] = leaf[steps, items.envs]
            reached("writer.half_written")
        views["rewards"][rows] = items.rewards
        views["dones"][rows] = items.terminated
        views["discounts"][rows] = items.discounts
        views["n_steps"][rows] = items.n_steps
        views["terminateds"][rows] = items.terminated
        views["truncateds"][rows] = items.truncated

    def emitted(self, items: Windows) -> None:
        """See `StepHistory`: the steps before the earliest that can still begin a transition go."""
        self._startable[items.first, items.envs] = False
        waiting = self._startable[: self.num_steps]
        # The common case first: nothing waits.
        first = int(waiting.any(axis=1).argmax()) if np.count_nonzero(waiting) else self.num_steps
        self._forget(first)
