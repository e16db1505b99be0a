"""Reverb, as a `team.Store`; runs in an interpreter of its own, because Reverb needs an old TensorFlow.

An item for each transition in a prioritized table, samples by `TimestepDataset`, new priorities by `update_priorities`.
The server is a process of its own, as in rl_buffer. Only so many transitions are filled in beforehand as take seconds.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "GRPC_VERBOSITY": "ERROR"}

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks, for the server's own process

from numpy.typing import NDArray

from benchmarks.team import Load, scheduled_s

_ALPHA = 0.6
_MAX_FILLED = 20_000
_TIMEOUT_S = 120.0
_TABLE = "replay"


class ReverbStore:
    """A server process with one table; TensorFlow is imported after the writers are forked."""

    def __init__(self, load: Load) -> None:
        self._load = load

    def start(self) -> str:
        """See `team.Store`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, str(Path(__file__)), str(port), str(self._load.capacity)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr)
        self._address = f"127.0.0.1:{port}"
        add = self.writer(self._address, self._load)
        columns = self._load.columns(self._load.rows_per_add, 0)
        for _ in range(-(-min(self._load.num_filled, _MAX_FILLED) // self._load.rows_per_add)):
            add(columns)
        return self._address

    def writer(self, address: str, load: Load) -> Callable[[dict[str, NDArray[Any]]], object]:
        """See `team.Store`."""
        import reverb

        client = _connected(address)
        writer = client.trajectory_writer(num_keep_alive_refs=load.rows_per_add)

        def add(columns: dict[str, NDArray[Any]]) -> None:
            for row in range(load.rows_per_add):
                writer.append({name: column[row] for name, column in columns.items()})
                item = {name: writer.history[name][-1] for name in columns}
                writer.create_item(_TABLE, 1.0, item)
            writer.flush()

        _ = reverb
        return add

    def learner(self) -> Callable[[], object]:
        """See `team.Store`."""
        import reverb
        import tensorflow as tf

        tf.config.threading.set_inter_op_parallelism_threads(2)
        client, size = _connected(self._address), self._load.batch_size
        columns = self._load.columns(1, 0)
        dataset = reverb.TrajectoryDataset(
            self._address,
            _TABLE,
            dtypes={name: tf.as_dtype(column.dtype) for name, column in columns.items()},
            shapes={name: tf.TensorShape(column.shape[1:]) for name, column in columns.items()},
            max_in_flight_samples_per_worker=2 * size,
        )
        batches = dataset.batch(size).prefetch(1).as_numpy_iterator()
        priorities = [0.5 + 0.001 * i for i in range(size)]

        def step() -> None:
            info = next(batches).info
            client.mutate_priorities(_TABLE, dict(zip(info.key.reshape(-1).tolist(), priorities, strict=True)))

        return step

    def floor(self, task: str) -> Callable[[], object]:
        """See `team.Store`."""
        raise NotImplementedError("the floor is measured on rl_buffer's rows")

    def server(self) -> dict[str, float]:
        """See `team.Store`."""
        return {"server_cpu_s": scheduled_s(self._process.pid)[0]}

    def stop(self) -> None:
        """See `team.Store`."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def _connected(address: str) -> Any:
    import reverb

    client = reverb.Client(address)
    deadline_s = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            client.server_info(timeout=5)
            return client
        except Exception:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.2)


def serve(port: int, capacity: int) -> None:
    """Serve one table until stdin ends."""
    import reverb

    table = reverb.Table(
        name=_TABLE,
        sampler=reverb.selectors.Prioritized(_ALPHA),
        remover=reverb.selectors.Fifo(),
        max_size=capacity,
        rate_limiter=reverb.rate_limiters.MinSize(1),
    )
    server = reverb.Server([table], port=port)
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
