"""cpprb's MPPrioritizedReplayBuffer, as a `team.Store`."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.team import Load

_ALPHA, _BETA = 0.6, 0.4
_FILL_NBYTES = 32 << 20


class CpprbStore:
    """A buffer in memory that forked processes share, with its locks; there is no server."""

    def __init__(self, load: Load) -> None:
        import cpprb

        self._load = load
        obs = {"shape": load.obs_shape, "dtype": np.dtype(load.obs_dtype)}
        fields = {"obs": obs, "act": {"shape": load.action_shape or 1}, "rew": {}, "done": {}, "next_obs": obs}
        self._buffer = cpprb.MPPrioritizedReplayBuffer(load.capacity, fields, alpha=_ALPHA)

    def start(self) -> str:
        """See `team.Store`."""
        load = self._load
        num_rows = max(1, min(load.num_filled, _FILL_NBYTES // load.row_nbytes))
        step = _named(load.columns(num_rows, 0))
        for _ in range(-(-load.num_filled // num_rows)):
            self._buffer.add(**step, priorities=np.random.default_rng(0).random(num_rows, np.float32))
        return ""

    def writer(self, address: str, load: Load) -> Callable[[dict[str, NDArray[Any]]], object]:
        """See `team.Store`."""
        return lambda columns: self._buffer.add(**_named(columns))

    def learner(self) -> Callable[[], object]:
        """See `team.Store`."""
        priorities = np.random.default_rng(0).random(self._load.batch_size, np.float32)

        def step() -> None:
            batch = self._buffer.sample(self._load.batch_size, beta=_BETA)
            self._buffer.update_priorities(batch["indexes"], priorities)

        return step

    def floor(self, task: str) -> Callable[[], object]:
        """See `team.Store`."""
        raise NotImplementedError("the floor is measured on rl_buffer's rows")

    def server(self) -> dict[str, float]:
        """See `team.Store`: there is none."""
        return {}

    def stop(self) -> None:
        """See `team.Store`."""


def _named(columns: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    names = {"obs": "obs", "action": "act", "reward": "rew", "done": "done", "next_obs": "next_obs"}
    return {names[key]: column for key, column in columns.items()}
