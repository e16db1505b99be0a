"""The server's side of the process that writes a checkpoint: starts it, hands it the cut, and watches it.

    idle --start--> preparing --CutMemory: take_cut--> copying --CheckpointWritten, CheckpointFailed--> ending --> idle
                       |                                  |                                                         ^
                       +-----------it is killed-----------+--> another process removes what it left ----------------+

The socket to the process becomes readable when it says something and when it ends, so nothing here waits.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from rl_buffer import checkpoint_process
from rl_buffer.checkpoint import ParameterMemory, cut_nbytes
from rl_buffer.checkpoint_file import bytes_of, remove_unfinished
from rl_buffer.checkpoint_process import (
    CheckpointFailed,
    CheckpointWritten,
    CutMemory,
    CutTaken,
    Order,
    RemoveUnfinished,
    RowsCopied,
    WriteCheckpoint,
)
from rl_buffer.checkpoint_request import CheckpointRequest
from rl_buffer.errors import RLBufferError
from rl_buffer.failpoints import reached
from rl_buffer.grants import Outgoing
from rl_buffer.server_core import ServerCore

_END_TIMEOUT_S = 3.0


@dataclass(slots=True, eq=False)
class _Run:
    """A process at work."""

    request: CheckpointRequest
    process: subprocess.Popen[bytes]
    socket: socket.socket
    failure: str  # why there will be no checkpoint, if that is known
    removes: bool  # what another process left


class Checkpointer:
    """Carries out what the core was asked for; at most one process at a time."""

    def __init__(
        self,
        core: ServerCore,
        epoll: select.epoll,
        table_fds: Mapping[str, int],
        parameters: Callable[[], Mapping[str, ParameterMemory]],
    ) -> None:
        """Start nothing yet.

        Args:
            core: of the server.
            epoll: where `fd` is registered.
            table_fds: descriptors of the tables' rows.
            parameters: the sets that there are when it is called.
        """
        self._core = core
        self._epoll = epoll
        self._table_fds = table_fds
        self._parameters = parameters
        self._run: _Run | None = None

    @property
    def fd(self) -> int:
        """Readable when `serve` has something to do; -1 while no process is at work."""
        return -1 if self._run is None else self._run.socket.fileno()

    def start(self) -> Outgoing:
        """Begin the checkpoint that the core was asked for, if it was and the last process has ended."""
        request = self._core.checkpoint
        if request is None or self._run is not None:
            return []
        started_s = time.monotonic()
        states = {name: table.state for name, table in self._core.tables.items()}
        try:
            self._launch(request, WriteCheckpoint(request.path, cut_nbytes(states)))
        except OSError as error:
            return self._answer(f"the process that writes checkpoints could not be started: {error}")
        request.pause_s += time.monotonic() - started_s
        return []

    def serve(self) -> Outgoing:
        """Act on the next thing that the process says, or on its end."""
        run = self._run
        assert run is not None
        try:
            status, fds = checkpoint_process.receive(run.socket, checkpoint_process.Status)
        except BlockingIOError:
            return []
        except (EOFError, ConnectionError):
            return self._ended(run)
        match status:
            case CutMemory():
                self._take_cut(run, fds[0])
            case RowsCopied(part=part, num_rows=num_rows):
                return self._core.copied(part, num_rows, time.monotonic())
            case CheckpointWritten(nbytes=nbytes):
                return self._answer(nbytes)
            case CheckpointFailed(reason=reason):
                return self._answer(f"{run.failure}; {reason}" if run.failure else reason)
        return []

    def close(self) -> None:
        """End the process if there is one, and remove what it has not finished."""
        if self._run is not None:
            self._run.process.kill()
            _reap(self._run)
            with contextlib.suppress(OSError, RLBufferError):
                remove_unfinished(self._run.request.path)

    def _launch(self, request: CheckpointRequest, order: Order, failure: str = "") -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            command = [sys.executable, "-m", checkpoint_process.__name__]
            process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        self._epoll.register(ours, select.EPOLLIN)
        self._run = _Run(request, process, ours, failure, isinstance(order, RemoveUnfinished))
        reached("checkpoint.launched")
        try:
            checkpoint_process.send(ours, order)
        except OSError:  # killed already; its end is seen like any other's
            process.kill()

    def _take_cut(self, run: _Run, memory_fd: int) -> None:
        """Write down what is known, for which the server stops, and let the process copy the rows."""
        started_s = time.monotonic()
        try:
            parameters = self._parameters()
            cut, offset = self._core.take_cut(parameters), 0
            reached("checkpoint.frozen")
            for array in cut.arrays:
                offset = _write(memory_fd, array, offset)
            contents = json.dumps(msgspec.to_builtins(cut.contents)).encode()
            _write(memory_fd, np.frombuffer(contents, np.uint8), offset)
            fds = {**self._table_fds, **{f"parameters:{name}": memory.fd for name, memory in parameters.items()}}
            segments = [source.segment for source in cut.sources if source.segment]
            taken = CutTaken(cut.sources, segments, offset, len(contents))
            checkpoint_process.send(run.socket, taken, [fds[segment] for segment in segments])
            reached("checkpoint.handed_over")
        except (BrokenPipeError, ConnectionResetError):  # it has ended, and it will be said how
            run.process.kill()
        except OSError as error:
            run.failure = f"the server could not hand over what is to be copied: {error}"
            run.process.kill()
        finally:
            os.close(memory_fd)
        run.request.pause_s += time.monotonic() - started_s

    def _ended(self, run: _Run) -> Outgoing:
        """The process is gone: start the next, have another clean up, or both."""
        how = _reap(run)
        self._run = None
        if self._core.checkpoint is not run.request:  # it was answered; perhaps there is another already
            return self.start()
        if run.removes:
            return self._answer(run.failure)
        outgoing = self._core.thaw(time.monotonic())
        failure = run.failure or f"the process that wrote it {how}"
        try:
            self._launch(run.request, RemoveUnfinished(run.request.path), failure)
        except OSError as error:
            outgoing += self._answer(f"{failure}; what it left could not be removed: {error}")
        return outgoing

    def _answer(self, outcome: int | str) -> Outgoing:
        return self._core.checkpoint_ended(outcome, time.monotonic())


def _reap(run: _Run) -> str:
    """How a process ended whose end of the socket is closed, or that was killed."""
    run.socket.close()
    try:
        exit_code = run.process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:  # in the midst of a system call of the disk's
        return f"did not end within {_END_TIMEOUT_S} s"
    return f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"


def _write(fd: int, array: NDArray[Any], offset: int) -> int:
    """Write all of it; the offset behind it."""
    data = bytes_of(array)
    while data:
        num_written = os.pwrite(fd, data, offset)
        data, offset = data[num_written:], offset + num_written
    return offset
