"""Steps made into sequences for recurrent policies: the items of a replay table with `sequence_length`.

Kapturowski et al. 2019, "Recurrent Experience Replay in Distributed Reinforcement Learning" (R2D2). With L =
sequence_length, B = burn_in, O = overlap, n = n_step and T = B + L + n, an episode of m steps becomes

    step       0 1 2 3 4 5 6         L = 4, B = 2, O = 2, n = 1, m = 7, ended
    sequence   t t t t l             regular windows: trained from k (L - O), L steps long
               b b t t t t l
                 b b t t t t F       the last one, shifted back to end with the episode

    t trained   b burn-in   l lookahead, bootstrapped from   F the final observation alone, no step

An episode here is what lies between two cuts, ends or manual resets. A shorter one than L is a padded sequence or none.

A row is aligned left: index 0 is a real step, whose recurrent state is stored, and padding is at the end only. So the
trained steps do not begin at a fixed index; `train_mask` marks them. (Padding in front would run the network over
steps that never happened. The first steps of an episode are trained as well: the stored state is exact there, and
needs no burn-in.)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_buffer import n_step
from rl_buffer.episode_ends import Autoreset
from rl_buffer.errors import InvalidInput
from rl_buffer.failpoints import reached
from rl_buffer.samplers import Prioritized
from rl_buffer.spec import leaves_below
from rl_buffer.step_history import StepHistory
from rl_buffer.tables import ReplayTable


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence that can be emitted now: steps of one episode, as they are numbered in the history.

    [start, stop) is stored, [train_start, train_stop) of it is trained.
    """

    env: int  # column of the history
    start: int  # history step whose recurrent state is stored
    train_start: int
    train_stop: int
    stop: int
    is_final: bool  # the episode ends here: behind its steps the row has the last one's next_obs, if there is room

    @property
    def trained(self) -> slice:
        """The trained steps, counted from `start`."""
        return slice(self.train_start - self.start, self.train_stop - self.start)


class SequenceHistory(StepHistory[list[Span]]):
    """The steps that sequences may still need, and where in its episode every environment's next sequence begins."""

    def __init__(self, table: ReplayTable, num_envs: int, autoreset: Autoreset | None, num_new_steps: int) -> None:
        """Make room for `num_new_steps` on top of the steps that wait."""
        assert table.sequence_length is not None
        # What may still be needed once the complete items are out: the next window, trained from s on, stores steps
        # from s - B on, and is open, so there are fewer than s + L + n. Should the episode end with the m steps that it
        # has, its last window stores them from m - L - B on. The last B + L + n - 1 steps do for both.
        self._num_needed = table.num_sequence_steps - 1
        # To forget is to move what is needed: once in T / 4 steps, not whenever items are emitted. (0.15 ms a step
        # instead of 3.3 for 64 environments, T = 125, 512 floats of state, items emitted after each step.)
        num_unneeded = table.num_sequence_steps // 4
        super().__init__(table, num_envs, autoreset, self._num_needed + num_unneeded + num_new_steps)
        self._length = table.sequence_length
        self._stride = table.sequence_length - table.overlap
        self._num_new_steps = num_new_steps
        self._num_steps_before = 0  # steps that were there when items were last emitted
        # Of the running episode, in history steps; negative once forgotten.
        self._episode_starts = np.zeros(num_envs, np.int64)
        self._next_starts = np.zeros(num_envs, np.int64)  # of the next regular window's trained part
        self._after: dict[int, tuple[int, int]] = {}  # env -> both, once the items that `complete` returned are out

    @property
    def is_full(self) -> bool:
        """Whether `stage` has no place: `num_new_steps` have come since items were emitted.

        Not when the memory is full: short episodes in all of it would be many more items at once.
        """
        return self.num_steps - self._num_steps_before >= self._num_new_steps

    @property
    def max_items(self) -> int:
        """See `StepHistory`: E * (1 + ceil((n - 1) / (L - O)) + ceil(num_new_steps / steps per item)).

        Items of an episode differ in the last trained step. In the episode that was open when items were last
        emitted that step is one of the last n of then, or a new one; L - O apart, but for the episode's last item.
        A later episode of r new steps is one item if r < L (r = 1 at the least), if such are kept at all; else
        1 + ceil((r - L) / (L - O)), of which r = L + 1 makes two.
        """
        if self._table.pad_short_episodes:
            later = self._num_new_steps
        else:
            later = -(-2 * self._num_new_steps // min(2 * self._stride, self._length + 1))
        return self._num_envs * (1 - (1 - self._table.n_step) // self._stride + later)

    def complete(self, *, close: bool) -> list[Span]:
        """See `StepHistory`. O(new steps * E) in NumPy, and a Python loop over environments that have a sequence.

        Environments stay where they are in their episodes until `emitted`; no step may be accepted in between.
        """
        self._after = {}
        if not self.num_steps:
            return []
        ends = self._episode_ends(close)
        has_window = self._next_starts <= self.num_steps - self._length - self._table.n_step
        envs = {*ends, *np.flatnonzero(has_window).tolist()}
        spans = [span for env in envs for span in self._spans(env, ends.get(env, []))]
        return sorted(spans, key=lambda span: (span.train_start, span.env))

    def td_errors(self, items: list[Span]) -> NDArray[np.float64] | None:
        """See `StepHistory`: the mix of the trained steps' TD errors, see `sequence_td_errors`."""
        if not self._computes_td_errors:
            return None
        errors = np.full((len(items), self._length), np.nan)
        train_mask = np.zeros(errors.shape, np.bool_)
        for i, span in enumerate(items):
            num_trained = span.train_stop - span.train_start
            errors[i, :num_trained] = self._step_td_errors(span)[span.trained]
            train_mask[i, :num_trained] = True
        return sequence_td_errors(errors, train_mask, self._table.eta)

    def copy_rows(self, items: list[Span], views: Mapping[str, NDArray[Any]], rows: NDArray[np.int64]) -> None:
        """See `StepHistory`."""
        for span, row in zip(items, rows.tolist(), strict=True):
            # With the ellipsis also a recurrent state of shape () is a view.
            self._copy_row(span, {path: view[row, ...] for path, view in views.items()})
            reached("writer.half_written")

    def emitted(self, items: list[Span]) -> None:
        """See `StepHistory`. An episode that `close` cut is over: a step that comes after all begins another."""
        for env, (episode_start, next_start) in self._after.items():
            self._episode_starts[env] = episode_start
            self._next_starts[env] = next_start
        if self.num_steps + self._num_new_steps > self.capacity:
            num_forgotten = self.num_steps - self._num_needed
            self._forget(num_forgotten)
            self._episode_starts -= num_forgotten
            self._next_starts -= num_forgotten
        self._num_steps_before = self.num_steps

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """See `StepHistory`."""
        arrays, values = super().state()
        return arrays, values | {"num_steps_before": self._num_steps_before}

    def restore(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> None:
        """See `StepHistory`."""
        num_steps_before = int(values["num_steps_before"])
        super().restore(arrays, values)
        self._num_steps_before = num_steps_before

    @property
    def _computes_td_errors(self) -> bool:
        return self._any_values and isinstance(self._table.sampler, Prioritized)

    def _episode_ends(self, close: bool) -> dict[int, list[int]]:
        """Env -> where its unfinished episodes stop, in order; with `close` the history's end is one more."""
        # Older cuts have been dealt with, but the last old step may have been cut since. An end that is known already,
        # here and at close, is the end of an episode of no steps.
        begin = max(self._num_steps_before - 1, 0)
        ends: dict[int, list[int]] = {}
        for step, env in np.argwhere(self._cut[begin : self.num_steps]).tolist():
            stop = begin + step + 1
            if stop < self.num_steps or not self._final_value_follows(env):
                ends.setdefault(env, []).append(stop)
        if close:
            for env in range(self._num_envs):
                ends.setdefault(env, []).append(self.num_steps)
        return ends

    def _final_value_follows(self, env: int) -> bool:
        """Whether the last step, an end, should wait for the autoreset dummy, which brings V(final observation)."""
        last = self.num_steps - 1
        return bool(
            self._computes_td_errors
            and self._autoreset == "next_step"
            and self._previous_ended[env]
            and not self._terminated[last, env]
            and np.isnan(self._final_values[last, env])
            and not np.isnan(self._state_values[last, env])
        )

    def _spans(self, env: int, ends: list[int]) -> list[Span]:
        """The sequences of one environment whose episodes stop at `ends`; notes in `_after` where it is then."""
        spans = []
        episode_start, next_start = int(self._episode_starts[env]), int(self._next_starts[env])
        for stop in (*ends, None):  # None: the running episode
            if next_start == episode_start < self.num_steps and self._dummy[episode_start, env]:
                episode_start = next_start = episode_start + 1
            num_known = self.num_steps if stop is None else stop
            for train_start, train_stop in self._trained_parts(episode_start, next_start, num_known, stop is not None):
                start = max(episode_start, train_start - self._table.burn_in)
                row_stop = min(train_stop + self._table.n_step, num_known)
                # The cut as well: an end that waits for its value may be the end of a window that does not.
                is_final = row_stop == stop or bool(self._cut[row_stop - 1, env])
                spans.append(Span(env, start, train_start, train_stop, row_stop, is_final))
                next_start = train_start + self._stride
            if stop is not None:
                episode_start = next_start = stop
        self._after[env] = episode_start, next_start
        return spans

    def _trained_parts(self, episode_start: int, next_start: int, stop: int, ended: bool) -> Iterator[tuple[int, int]]:
        """[start, stop) of the trained parts from `next_start` on, of an episode that ended at `stop` or got so far."""
        complete_stop = stop if ended else stop - self._table.n_step
        while next_start + self._length <= complete_stop:
            yield next_start, next_start + self._length
            next_start += self._stride
        if not ended:
            return
        if next_start > episode_start:
            trained_stop = next_start + self._table.overlap
            if trained_stop < stop:
                yield stop - self._length, stop
        elif self._table.pad_short_episodes and episode_start < stop:
            yield episode_start, stop

    def _windows(self, span: Span) -> n_step.Windows:
        """The n-step windows that begin at the steps of a span, one each, in span steps; shorter ones at its end."""
        steps, column = slice(span.start, span.stop), slice(span.env, span.env + 1)
        return n_step.assemble(
            self._rewards[steps, column],
            self._terminated[steps, column],
            self._truncated[steps, column],
            self._cut[steps, column],
            np.ones((span.stop - span.start, 1), np.bool_),
            n_step=self._table.n_step,
            gamma=self._table.gamma,
            close=True,
        )

    def _step_td_errors(self, span: Span) -> NDArray[np.float64]:
        """TD error of each window of a span, NaN where unknown."""
        # One step more: if it is the dummy after an end, it has the value of the final observation.
        steps, column = slice(span.start, min(span.stop + 1, self.num_steps)), slice(span.env, span.env + 1)
        return n_step.td_errors(
            self._windows(span),
            self._q_taken[steps, column],
            self._state_values[steps, column],
            self._final_values[steps, column],
            cut=self._cut[steps, column],
            dummy=self._dummy[steps, column],
        )

    def _copy_row(self, span: Span, row: Mapping[str, NDArray[Any]]) -> None:
        """Write one sequence; `row` holds [T, *shape] by path, of the recurrent state [*shape]."""
        steps = slice(span.start, span.stop)
        num_steps = span.stop - span.start
        for path, leaf in self._leaves.items():
            if path.startswith("recurrent_states"):
                row[path][...] = leaf[span.start, span.env]
            elif not path.startswith("next_observations"):
                _fill(row[path], leaf[steps, span.env])
        if span.is_final and num_steps < self._table.num_sequence_steps:
            final_obs = leaves_below("observations", row)
            for path, leaf in self._next_obs.items():
                final_obs[path][num_steps] = leaf[span.stop - 1, span.env]
        windows = self._windows(span)
        _fill(row["step_rewards"], self._rewards[steps, span.env])
        _fill(row["rewards"], windows.rewards)
        _fill(row["dones"], windows.terminated)
        _fill(row["discounts"], windows.discounts)
        _fill(row["n_steps"], windows.n_steps)
        _fill(row["terminateds"], windows.terminated)
        _fill(row["truncateds"], windows.truncated)
        row["mask"][:] = False
        row["mask"][:num_steps] = True
        row["train_mask"][:] = False
        row["train_mask"][span.trained] = True


def sequence_td_errors(
    td_errors: NDArray[np.floating], train_mask: NDArray[np.bool_], eta: float
) -> NDArray[np.float64]:
    """One TD error per sequence: eta * max |delta| + (1 - eta) * mean |delta| over its trained steps.

    Kapturowski et al. 2019, section 2.3, with eta = 0.9: the mean alone is much the same for all long sequences.

    Args:
        td_errors: [N, T] float, signed or not; what is not trained is not looked at and may be NaN.
        train_mask: [N, T] bool.
        eta: in [0, 1].

    Returns:
        [N] float64, >= 0; NaN where the TD error of a trained step is NaN.

    Raises:
        InvalidInput: the shapes differ, eta is out of range, or a sequence has no trained step.
    """
    if td_errors.ndim != 2 or td_errors.shape != train_mask.shape:
        raise InvalidInput(f"td_errors and train_mask must be [N, T] alike, not {td_errors.shape}, {train_mask.shape}")
    if not 0.0 <= eta <= 1.0:
        raise InvalidInput(f"eta must be in [0, 1], got {eta}")
    num_trained = np.count_nonzero(train_mask, axis=1)
    if not num_trained.all():
        raise InvalidInput(f"sequence {np.argmin(num_trained)} has no trained step in train_mask")
    # `where`, not a product with the mask: 0 * NaN is NaN.
    sizes = np.where(train_mask, np.abs(td_errors), 0.0).astype(np.float64)
    largest, means = sizes.max(axis=1, initial=0.0), sizes.sum(axis=1) / num_trained
    mixed: NDArray[np.float64] = eta * largest + (1.0 - eta) * means
    return mixed


def _fill(row: NDArray[Any], steps: NDArray[Any]) -> None:
    """Write [num_steps, *shape] into [T, *shape], and zeros behind it: the row may have held another sequence."""
    row[: len(steps)] = steps
    row[len(steps) :] = 0
