"""Which n-step transitions a history of steps yields, and their initial priorities.

Only scalars are handled here: whoever owns the observations moves them by the indices that `Windows` returns.
Pure functions of the caller's history [H, E]; they must not know of rows, tables or autoreset modes.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rl_buffer.errors import InvalidInput

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Windows:
    """N transitions that can be emitted now, sorted by (first, env). All arrays are [N]."""

    first: NDArray[np.int64]  # history step whose obs and action the transition takes
    last: NDArray[np.int64]  # history step whose next_obs and flags it takes, first <= last
    envs: NDArray[np.int64]  # column of the history
    rewards: NDArray[np.float32]  # sum of gamma^k * reward[first + k], 0 <= k < n_steps, added up in float64
    n_steps: NDArray[np.int32]  # steps actually summed, 1..n_step
    discounts: NDArray[np.float32]  # gamma^n_steps * (1 - terminated)
    terminated: BoolArray  # of step `last`
    truncated: BoolArray  # of step `last`; both flags may be true at once

    def __len__(self) -> int:
        """Number of transitions N."""
        return len(self.first)

    def __getitem__(self, part: slice) -> "Windows":
        """Some of them, in their order."""
        return Windows(*(getattr(self, field.name)[part] for field in fields(self)))


def assemble(
    rewards: FloatArray,
    terminated: BoolArray,
    truncated: BoolArray,
    cut: BoolArray,
    startable: BoolArray,
    *,
    n_step: int,
    gamma: float,
    needs_next: bool | BoolArray = False,
    close: bool = False,
) -> Windows:
    """Find every n-step transition whose window is closed.

    A window takes the steps from its start up to the first cut, or up to n_step steps. If the history
    ends before either it stays open and is left for a later call. So tails (n_steps < n_step) come out at
    every cut and nothing crosses one. No start comes out twice if the caller then clears
    `startable[first, envs]`; of the history it must keep the steps from the earliest start that is left.
    An autoreset dummy is not startable and the step before it is a cut, so no window contains one.

    O(n_step * H * E) in NumPy: 40-80 us for H = 67, E = 1, n_step = 3; 250 us for E = 64.

    Args:
        rewards: [H, E] float; H steps of E environments, the oldest first.
        terminated: [H, E] bool; a window that closes here does not bootstrap.
        truncated: [H, E] bool.
        cut: [H, E] bool; steps after which nothing may be joined: terminated | truncated, and manual resets.
        startable: [H, E] bool; real steps from which no transition has been emitted yet.
        n_step: steps per window, at least 1.
        gamma: discount per step, 0..1.
        needs_next: bool or [H, E] bool. A window that closes at a step where this holds waits until the next
            step is in the history, for instance because its initial priority needs the value of that state.
        close: no more steps will come. Emit the open and the waiting windows too, with the steps that there
            are; an open one bootstraps from its last next_obs.

    Raises:
        InvalidInput: the shapes differ, n_step or gamma is out of range, or an end is not marked as a cut.
    """
    shapes = [array.shape for array in (rewards, terminated, truncated, cut, startable)]
    if rewards.ndim != 2 or shapes.count(rewards.shape) != len(shapes):
        raise InvalidInput(f"rewards, terminated, truncated, cut, startable must be [H, E] alike, not {shapes}")
    if n_step < 1 or not 0.0 <= gamma <= 1.0:
        raise InvalidInput(f"n_step must be at least 1 and gamma in 0..1, not {n_step} and {gamma}")

    first, envs = _indices(startable)
    if n_step == 1:  # a quarter of the time, and what most buffers are
        last, n_steps, sums = first, np.ones(len(first), np.int32), _at(rewards, first, envs, n_step)
        emitted = None
    else:
        if np.count_nonzero((terminated | truncated) & ~cut):
            raise InvalidInput("cut must hold at every terminated or truncated step, or windows cross the end")
        last, n_steps, sums = _grow(first, envs, rewards, cut, startable, n_step, gamma)
        emitted = None if close else (n_steps == n_step) | cut[last, envs]
    if not close and needs_next is not False:
        goes_on = last < len(rewards) - 1
        if not isinstance(needs_next, bool):
            goes_on |= ~needs_next[last, envs]
        emitted = goes_on if emitted is None else emitted & goes_on
    if emitted is not None:
        first, last, envs, n_steps, sums = (array[emitted] for array in (first, last, envs, n_steps, sums))
    ended = _at(terminated, last, envs, n_step)
    powers = (gamma ** np.arange(n_step + 1.0)).astype(np.float32)
    discounts = powers[1] if n_step == 1 else powers[n_steps]
    return Windows(
        first=first,
        last=last,
        envs=envs,
        rewards=sums.astype(np.float32),
        n_steps=n_steps,
        discounts=np.where(ended, np.float32(0.0), discounts),
        terminated=ended,
        truncated=_at(truncated, last, envs, n_step),
    )


def _indices(startable: BoolArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Steps and environments of the windows that can begin."""
    num_steps, num_envs = startable.shape
    if np.count_nonzero(startable) < startable.size:
        steps, envs = np.nonzero(startable)
        return steps, envs
    # The common case, in a tenth of the time: 4 us for 64 x 64.
    return np.arange(num_steps).repeat(num_envs), np.resize(np.arange(num_envs), startable.size)


def _at(array: NDArray[Any], steps: NDArray[np.int64], envs: NDArray[np.int64], n_step: int) -> NDArray[Any]:
    """Elements of [H, E] at steps and environments, a copy; of single steps, which are distinct, perhaps all."""
    return array.flatten() if n_step == 1 and len(steps) == array.size else array[steps, envs]


def _grow(
    first: NDArray[np.int64],
    envs: NDArray[np.int64],
    rewards: FloatArray,
    cut: BoolArray,
    startable: BoolArray,
    n_step: int,
    gamma: float,
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float64]]:
    """Last step, number of steps and sum of each window that begins in the history, as far as it goes."""
    num_steps = len(rewards)
    sums, counts, growing = rewards.astype(np.float64), startable.astype(np.int32), startable.copy()
    for k in range(1, min(n_step, num_steps)):
        starts = num_steps - k  # of the windows whose step k is in the history
        growing[:starts] &= ~cut[k - 1 : -1]
        # `where`, not a product with the mask: what lies beyond a cut may be NaN.
        np.add(sums[:starts], gamma**k * rewards[k:], out=sums[:starts], where=growing[:starts])
        counts[:starts] += growing[:starts]
    n_steps = counts[first, envs]
    return first + n_steps - 1, n_steps, sums[first, envs]


def td_errors(
    windows: Windows,
    q_taken: FloatArray,
    state_values: FloatArray,
    final_values: FloatArray,
    *,
    cut: BoolArray,
    dummy: BoolArray,
) -> NDArray[np.float64]:
    """TD error of each window, whose size is the initial priority of Ape-X (Horgan et al. 2018, algorithm 1).

    delta = R + discount * V(next_obs of `last`) - Q(obs, action of `first`). V is `final_values[last]` where
    given, else `state_values[last + 1]` where that step is in the history and its obs is the next_obs of
    `last`. That is so unless `last` is a cut; after a cut it is so for an autoreset dummy alone, which in
    NEXT_STEP mode sees the true final observation. In SAME_STEP mode and after a manual reset the next step
    sees a reset observation.

    Args:
        windows: what `assemble` returned for this history.
        q_taken: [H, E] float; Q(obs_t, action_t), NaN where unknown.
        state_values: [H, E] float; V(obs_t), max_a Q(obs_t, a) in Q-learning; NaN where unknown.
        final_values: [H, E] float; V(true next_obs of step t) where an episode ends, else NaN.
        cut: [H, E] bool; as for `assemble`.
        dummy: [H, E] bool; autoreset dummies.

    Returns:
        [N] float64, signed. NaN where a value is unknown: the table then chooses the priority.
    """
    last, envs = windows.last, windows.envs
    following = np.minimum(last + 1, len(cut) - 1)
    continues = (last + 1 < len(cut)) & (~cut[last, envs] | dummy[following, envs])
    values = np.where(continues, state_values[following, envs], np.nan)
    given = final_values[last, envs]
    values = np.where(np.isnan(given), values, given)
    # 0 * NaN is NaN: an unknown value must not poison a window that does not bootstrap.
    values = np.where(windows.discounts == 0, 0.0, values)
    errors: NDArray[np.float64] = windows.rewards + windows.discounts * values - q_taken[windows.first, envs]
    return errors
