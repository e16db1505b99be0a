"""rl_buffer with a server, as a `team.Store`."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.team import GATHER, Load, scheduled_s

_ALPHA, _BETA = 0.6, 0.4
_TIMEOUT_S = 60.0
_MOST_ROWS_PER_MESSAGE, _NBYTES_PER_MESSAGE = 1_600, 1 << 20
_FILL_NBYTES = 32 << 20  # at a time


class RLBufferStore:
    """A table behind a server. No library is imported before the writers are forked, and no torch in a writer."""

    def __init__(self, load: Load) -> None:
        self._load = load

    def start(self) -> str:
        """See `team.Store`."""
        import torch

        import rl_buffer as rb

        torch.set_num_threads(1)
        load = self._load
        self._table = rb.ReplayTable(_spec(load), load.capacity, rb.Prioritized(alpha=_ALPHA), seed=0)
        self._server = rb.BufferServer({"replay": self._table}).start()
        self._client = rb.connect(self._server.address, _TIMEOUT_S, "learner")
        row_nbytes = self._table.layout.stride_nbytes
        num_rows = max(1, min(load.num_filled, _FILL_NBYTES // row_nbytes, (self._table.num_rows - load.capacity) // 4))
        with self._client.writer("replay", num_envs=1, autoreset=None, chunk_size=num_rows) as writer:
            columns = load.columns(num_rows, 0)
            batch = {
                "observations": columns["obs"],
                "actions": columns["action"],
                "rewards": columns["reward"],
                "dones": columns["done"],
                "next_observations": columns["next_obs"],
            }
            for _ in range(-(-load.num_filled // num_rows)):
                writer.extend(batch, np.random.default_rng(0).random(num_rows))
        return self._server.address

    def writer(self, address: str, load: Load) -> Callable[[dict[str, NDArray[Any]]], object]:
        """See `team.Store`."""
        import rl_buffer as rb

        client = rb.connect(address, _TIMEOUT_S, "writer")
        # A message costs its writer and the server as much as writing hundreds of small rows, and interrupts whoever
        # has the core. With 400 rows each, 8 writers add 1.7 M rows a second instead of 3.5 M, and take 27 % instead of
        # 11 % of what the learner gets for its CPU time; the server takes twice as much of a core at the paper's load.
        row_nbytes = client.tables["replay"].layout.stride_nbytes
        chunk_size = max(load.rows_per_add, min(_MOST_ROWS_PER_MESSAGE, _NBYTES_PER_MESSAGE // row_nbytes))
        writer = client.writer(
            "replay", num_envs=load.rows_per_add, autoreset=None, chunk_size=chunk_size, timeout_s=_TIMEOUT_S
        )
        return lambda columns: writer.add(**columns)

    def learner(self) -> Callable[[], object]:
        """See `team.Store`."""
        import torch

        sampler = self._client.sampler("replay", self._load.batch_size, beta=_BETA, timeout_s=_TIMEOUT_S)
        td_errors = torch.rand(self._load.batch_size)

        def step() -> None:
            batch = sampler.sample()
            _ = (batch.observations, batch.actions, batch.rewards, batch.dones, batch.next_observations, batch.weights)
            sampler.update_priorities(batch, td_errors)

        return step

    def floor(self, task: str) -> Callable[[], object]:
        """See `team.Store`: of the shared rows themselves."""
        import torch

        rows, _ = self._client._connection.segments["replay"]
        table = torch.frombuffer(rows.buffer, dtype=torch.int64).view(self._table.num_rows, -1)
        numbers, batch = (
            torch.empty(self._load.batch_size, dtype=torch.int64),
            torch.empty_like(table[: self._load.batch_size]),
        )
        num_blocks, turn = self._load.num_filled // len(batch), 0

        def gather() -> None:
            torch.randint(self._load.num_filled, (len(batch),), out=numbers)
            torch.index_select(table, 0, numbers, out=batch)

        def copy() -> None:
            nonlocal turn
            turn = (turn + 1) % num_blocks
            batch.copy_(table[turn * len(batch) : (turn + 1) * len(batch)])

        return gather if task == GATHER else copy

    def server(self) -> dict[str, float]:
        """See `team.Store`."""
        assert self._server.pid is not None
        return {"server_cpu_s": scheduled_s(self._server.pid)[0], "num_messages": self._client.info()["num_messages"]}

    def stop(self) -> None:
        """See `team.Store`."""
        self._client.close()
        self._server.stop()


def _spec(load: Load) -> Any:
    import rl_buffer as rb

    return rb.TransitionSpec(obs=rb.Field(load.obs_shape, load.obs_dtype), action=rb.Field(load.action_shape))
