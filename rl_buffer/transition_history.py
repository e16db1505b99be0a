"""Steps made into n-step transitions: the items of an ordinary replay table."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rl_buffer.episode_ends import Autoreset
from rl_buffer.failpoints import reached
from rl_buffer.n_step import Windows, assemble, td_errors
from rl_buffer.samplers import Prioritized
from rl_buffer.step_history import StepHistory
from rl_buffer.step_leaves import as_bytes, joined
from rl_buffer.tables import ReplayTable

# Written at a time: most of many are runs then, and a row's other leaves find it in the cache.
_PART_ROWS = 2048


class _Copy(NamedTuple):
    """Of the steps that transitions begin or end with, to their rows."""

    of_end: bool
    target: NDArray[np.void]  # [num_rows]
    steps: NDArray[np.void]  # [H * E]


class TransitionHistory(StepHistory[Windows]):
    """The steps that may still begin or end a transition; see `n_step` for what a transition is made of."""

    def __init__(self, table: ReplayTable, num_envs: int, autoreset: Autoreset | None, capacity: int) -> None:
        super().__init__(table, num_envs, autoreset, capacity)
        self._views: Mapping[str, NDArray[Any]] | None = None  # that rows were last written to
        self._copies: list[_Copy] = []  # to there

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
        priorities = self._priorities[steps].reshape(-1).take(items.starts)
        return np.where(np.isnan(priorities), errors, priorities)

    def copy_rows(self, items: Windows, views: Mapping[str, NDArray[Any]], rows: NDArray[np.int64]) -> None:
        """See `StepHistory`."""
        if views is not self._views:
            self._views, self._copies = views, self._copies_to(views)
        for start in range(0, len(rows), _PART_ROWS):
            part = slice(start, start + _PART_ROWS)
            self._copy_part(items[part], views, rows[part])

    def _copy_part(self, items: Windows, views: Mapping[str, NDArray[Any]], rows: NDArray[np.int64]) -> None:
        where, starts = _run(rows), _run(items.starts, is_sorted=True)
        ends = starts if self._table.n_step == 1 else _run(items.ends)
        for of_end, target, steps in self._copies:
            target[where] = steps[ends if of_end else starts]
            reached("writer.half_written")
        views["rewards"][where] = items.rewards
        views["dones"][where] = items.terminated
        views["discounts"][where] = items.discounts
        views["n_steps"][where] = items.n_steps
        views["terminateds"][where] = items.terminated
        views["truncateds"][where] = items.truncated

    def _copies_to(self, views: Mapping[str, NDArray[Any]]) -> list[_Copy]:
        """What must be copied, as little as possible: leaves that are neighbours here and there are one.

        Each row is one element: copies of elements take half of the time of copies of rows of numbers.
        """
        groups: list[tuple[bool, NDArray[np.uint8], NDArray[np.uint8]]] = []
        for path, leaf in self._leaves.items():
            # With n_step = 1 a transition ends where it begins.
            of_end = self._table.n_step > 1 and path.startswith("next_observations")
            group = of_end, as_bytes(views[path], 1), as_bytes(leaf, 2)
            if groups and groups[-1][0] == of_end:
                target, steps = (joined(*pair) for pair in zip(groups[-1][1:], group[1:], strict=True))
                if target is not None and steps is not None:
                    groups[-1] = of_end, target, steps
                    continue
            groups.append(group)
        return [
            _Copy(of_end, *(block.view(f"V{block.shape[1]}")[:, 0] for block in blocks)) for of_end, *blocks in groups
        ]

    def let_go(self) -> None:
        """See `StepHistory`."""
        self._views, self._copies = None, []

    def emitted(self, items: Windows) -> None:
        """See `StepHistory`: the steps before the earliest that can still begin a transition go."""
        waiting = self._startable[: self.num_steps].reshape(-1)
        num_waiting = np.count_nonzero(waiting) - len(items)
        if not num_waiting:  # the common case of one step
            self._forget(self.num_steps)
            return
        waiting[items.starts] = False
        self._forget(int(waiting.argmax()) // self._num_envs)


def _run(numbers: NDArray[np.int64], *, is_sorted: bool = False) -> slice | NDArray[np.int64]:
    """Distinct numbers as a slice if they follow each other, as a writer's rows and starts do: quicker to copy."""
    num_more = len(numbers) - 1
    if (
        num_more >= 0
        and numbers[-1] - numbers[0] == num_more
        and (is_sorted or np.count_nonzero(numbers[1:] - numbers[:-1] == 1) == num_more)
    ):
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return numbers
