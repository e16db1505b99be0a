"""`BufferServer`: starts and stops the server process, and knows its address.

The server is a process of its own (`python -m rl_buffer.server`). It ends when `stop` is called, when the `with` block
ends, or when the process that started it is gone, killed or not.
"""

import contextlib
import operator
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from select import select
from typing import IO

import msgspec

from rl_buffer import errors
from rl_buffer.address import Address, fresh_address
from rl_buffer.errors import DeadlineExceeded, InvalidInput, ServerLost
from rl_buffer.messages import ServerConfig, ServerStatus
from rl_buffer.tables import ReplayTable, RolloutTable, StatsConfig

MAX_TABLES = 126  # two descriptors each in the one message that welcomes a client, of 253 (SCM_MAX_FD)
_THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


class BufferServer:
    """A server of one or more tables.

    Args:
        tables: by the name that writers and samplers use.
        address: `ipc:///some/directory` (made if missing, removed at the end) or None for a fresh one.
        directory: where the tables are kept, in files of a tmpfs or a disk (made if missing, 0700, left at the end);
            None keeps them in memory that ends with the server. A server that is started with the directory of an
            earlier one and the same tables goes on where that one ended, however it did: every acknowledged commit,
            priorities and episode statistics are there; parameters are to be published again. It outlives processes,
            not a power loss. Clients of the earlier server keep the rows that they may still write into until they
            `reconnect` or end. To start empty, delete the directory. Nobody must change the files: who has one mapped
            that is cut short is killed by SIGBUS.
        restore: path of a checkpoint with which every `start` begins. Its tables must be these, apart from capacity
            (no less than it holds), headroom and seed.
        allowed_uids: users besides this one whose processes may attach; they can read and write all that is stored,
            and with `directory` end the server by cutting its files short. They pass `server_uid=` to `connect`.
        stats_window: episodes that `client.stats()` looks back on.
        extra_metrics_keys: names of the metrics that writers may pass to `add`.
        done_reason_keys: names of the termination reasons that writers may pass to `add`.

    Raises:
        InvalidInput: no tables, or an address that cannot be one.
    """

    def __init__(
        self,
        tables: Mapping[str, ReplayTable | RolloutTable],
        address: str | None = None,
        *,
        directory: str | os.PathLike[str] | None = None,
        restore: str | os.PathLike[str] | None = None,
        allowed_uids: Collection[int] = (),
        stats_window: int = 100,
        extra_metrics_keys: Sequence[str] = (),
        done_reason_keys: Sequence[str] = (),
    ) -> None:
        if not isinstance(tables, Mapping) or not tables:
            raise InvalidInput(f'BufferServer takes a mapping such as {{"replay": ReplayTable(...)}}, got {tables!r}')
        if len(tables) > MAX_TABLES:
            raise InvalidInput(f"a server has up to {MAX_TABLES} tables, got {len(tables)}; start a second one")
        self.tables = dict(tables)
        self._requested_address = None if address is None else str(Address(address))
        self._stats = StatsConfig(
            window=stats_window,
            extra_metrics_keys=tuple(extra_metrics_keys),
            done_reason_keys=tuple(done_reason_keys),
        )
        self._restore = None if restore is None else os.path.abspath(restore)
        self._directory = None if directory is None else os.path.abspath(directory)
        self._allowed_uids = tuple(operator.index(uid) for uid in allowed_uids)
        self._process: subprocess.Popen[bytes] | None = None
        self._address: str | None = None

    @property
    def address(self) -> str:
        """What `rl_buffer.connect` takes, in any process of the same user.

        Raises:
            InvalidInput: not started.
        """
        if self._address is None:
            raise InvalidInput("the server has no address before start()")
        return self._address

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return None if self._process is None else self._process.pid

    def is_alive(self) -> bool:
        """Whether the server process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self, timeout_s: float = 60.0, progress: Callable[[int, int], None] | None = None) -> "BufferServer":
        """Start the process and wait until it can be connected to.

        Args:
            timeout_s: deadline in seconds. Reserving memory takes about 0.4 s per GB, compiling the kernels some
                seconds the first time.
            progress: called with (bytes reserved, bytes in all).

        Raises:
            NotEnoughMemory: the tables do not fit.
            AddressInUse: another live server has the address or the directory.
            InvalidInput: the directory holds tables of another configuration. It is as it was.
            DeadlineExceeded: it was not ready in time, and has been ended.
            ServerLost: it ended without saying why; see its standard error.
        """
        if self.is_alive():
            raise InvalidInput(f"this server runs already, at {self._address}")
        self.stop()  # what is left of one that was killed
        self._address = self._requested_address or fresh_address()
        self._process = _launch()
        try:
            config = ServerConfig(
                self._address,
                self.tables,
                self._stats,
                os.getpid(),
                self._restore,
                self._directory,
                self._allowed_uids,
            )
            _pipe(self._process.stdin).write(msgspec.json.encode(config) + b"\n")
            _pipe(self._process.stdin).flush()
            self._wait_until_ready(time.monotonic() + timeout_s, timeout_s, progress)
        except BaseException:
            self.stop()
            raise
        return self

    def _wait_until_ready(
        self, deadline_s: float, timeout_s: float, progress: Callable[[int, int], None] | None
    ) -> None:
        stdout, unread = _pipe(self._process.stdout if self._process else None), b""
        while True:
            if not select([stdout], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
                raise DeadlineExceeded(f"the server was not ready within {timeout_s} s; raise start(timeout_s=)")
            chunk = os.read(stdout.fileno(), 1 << 16)
            if not chunk:
                raise ServerLost("the server process ended while it started; its standard error says why")
            *lines, unread = (unread + chunk).split(b"\n")
            for line in lines:
                status = msgspec.json.decode(line, type=ServerStatus)
                if status.ready:
                    return
                if status.error:
                    raise getattr(errors, status.error_class, errors.RLBufferError)(status.error)
                if progress is not None:
                    progress(status.reserved_nbytes, status.total_nbytes)

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the process; within `timeout_s` in order, after that by force. Stopping twice is fine."""
        process, self._process = self._process, None
        if process is None:
            return
        # Not by closing stdin: forked children of this process (AsyncVectorEnv has some) hold it open as well.
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                _pipe(pipe).close()

    def __enter__(self) -> "BufferServer":
        return self if self.is_alive() else self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()


def _launch() -> subprocess.Popen[bytes]:
    """The server process, which waits for its configuration on stdin and answers on stdout."""
    return subprocess.Popen(
        [sys.executable, "-m", "rl_buffer.server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | dict.fromkeys(_THREAD_LIMITS, "1"),
        start_new_session=True,  # Ctrl-C in the terminal is for the parent to act on
    )


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


if __name__ == "__main__":
    from rl_buffer.server_loop import main

    main()
