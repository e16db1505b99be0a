"""The server's process: sockets, descriptors and signals around `ServerCore`. It only polls and passes on.

Started by `BufferServer` as `python -m rl_buffer.server`: the configuration comes by stdin; lines of JSON on stdout
tell how far it is, and at last ready or why not. It ends on SIGTERM, or when its parent process has ended.
"""

import contextlib
import os
import resource
import secrets
import select
import signal
import socket
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec
import zmq

from rl_buffer import frames, messages
from rl_buffer.address import Address
from rl_buffer.errors import InvalidInput, NotEnoughMemory, RLBufferError
from rl_buffer.messages import ServerConfig, ServerStatus
from rl_buffer.parameter_slots import BOARD_LENGTH, NUM_SLOTS, ParameterSlots
from rl_buffer.peers import peer_process, readable
from rl_buffer.replay_table import ReplayTableState
from rl_buffer.rollout_table import RolloutTableState
from rl_buffer.server_core import Outgoing, ServerCore
from rl_buffer.spec import Field, RowLayout
from rl_buffer.storage import OwnedSegment, check_memory
from rl_buffer.tables import ReplayTable, RolloutTable

MAX_PARAMETER_SETS = 64
_MESSAGES_PER_TURN = 256  # then attaching clients and exits get their turn
_SEND_HWM = 10_000  # replies that a client may leave unread; more are dropped
_INT64_NBYTES = 8


class _Stop(BaseException):
    """SIGTERM arrived while the server was starting."""


@dataclass(slots=True)
class _TableMemory:
    config: ReplayTable | RolloutTable
    rows: OwnedSegment
    generations: OwnedSegment


@dataclass(slots=True)
class _ParameterMemory:
    fields: list[tuple[str, Field]]
    rows: OwnedSegment
    board: OwnedSegment


@dataclass(slots=True, eq=False)
class _Connection:
    socket: socket.socket
    pidfd: int
    pid: int
    token: bytes = b""  # empty until Hello


class ServerLoop:
    """One epoch: from bind to the last reply. Leaving its `with` block removes the address."""

    def __init__(self, config: ServerConfig) -> None:
        """Reserve memory, compile kernels and bind, in this order, so that a bound address is a working one."""
        self._address = Address(config.address)
        self._lock_fd = self._address.acquire()
        try:
            self._config = config
            self._memory = _reserve_tables(config.tables)
            states = {name: _new_state(memory) for name, memory in self._memory.items()}
            epoch = secrets.randbits(63) | 1
            self._core = ServerCore(epoch, states, config.stats)
            self._parameters: dict[str, _ParameterMemory] = {}
            self._connections: dict[int, _Connection] = {}  # by descriptor of the socket or of the process
            self._epoll = select.epoll()
            self._bind()
        except BaseException:
            self._address.release(self._lock_fd)
            raise

    def _bind(self) -> None:
        previous_mask = os.umask(0o177)
        try:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            self._listener.bind(os.fspath(self._address.attach))
            self._context = zmq.Context()
            self._router = self._context.socket(zmq.ROUTER)
            self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._router.setsockopt(zmq.LINGER, 0)
            self._router.setsockopt(zmq.SNDHWM, _SEND_HWM)
            self._router.setsockopt(zmq.RCVHWM, _SEND_HWM)
            self._router.setsockopt(zmq.MAXMSGSIZE, frames.MAX_MESSAGE_NBYTES)
            self._router.bind(self._address.control_endpoint)
            self._listener.listen(128)  # last: clients look for this one
        finally:
            os.umask(previous_mask)
        self._epoll.register(self._listener, select.EPOLLIN)

    def run(self, ends: Collection[int]) -> None:
        """Serve until one of the descriptors `ends` is readable."""
        for fd in ends:
            self._epoll.register(fd, select.EPOLLIN)
        # epoll inside zmq's poll: however many clients there are, each turn polls two descriptors.
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._epoll.fileno(), zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._router in ready:
                self._serve_messages()
            if self._epoll.fileno() in ready:
                for fd, _ in self._epoll.poll(0):
                    if fd in ends:
                        return
                    self._serve_descriptor(fd)

    def __enter__(self) -> "ServerLoop":
        return self

    def __exit__(self, *exception: object) -> None:
        self._context.destroy(linger=0)
        self._listener.close()
        self._address.release(self._lock_fd)

    # ---- control socket ------------------------------------------------------------------------------------

    def _serve_messages(self) -> None:
        for _ in range(_MESSAGES_PER_TURN):
            try:
                channel_id, *parts = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            frame = parts[0] if len(parts) == 1 else b""  # no message has parts: refused as an unknown kind
            self._send(self._core.handle(channel_id, frame, time.monotonic()))

    def _send(self, outgoing: Outgoing) -> None:
        for channel_id, frame in outgoing:
            # Gone, or not reading: its own deadline will tell it. Nobody else waits for it.
            with contextlib.suppress(zmq.Again, zmq.ZMQError):
                self._router.send_multipart((channel_id, frame), zmq.NOBLOCK)

    # ---- attach socket -------------------------------------------------------------------------------------

    def _serve_descriptor(self, fd: int) -> None:
        if fd == self._listener.fileno():
            self._accept()
            return
        connection = self._connections.get(fd)
        if connection is None:
            return
        if fd == connection.pidfd:
            # Looked at again: the event may be an older one, of a descriptor closed meanwhile that had this number.
            if not readable(fd, 0.0):
                return
            self._forget(connection)
            self._send(self._core.exited(connection.token))
            return
        try:
            packet = connection.socket.recv(messages.MAX_ATTACH_NBYTES)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if packet:
            self._answer(connection, packet)
        else:
            # Not the process's end: it may have closed the socket and still write. Its rows stay until it exits.
            self._epoll.unregister(fd)
            connection.socket.close()
            del self._connections[fd]
            self._core.disconnected(connection.token)
            # One that closed its writers holds nothing to wait for: a process may connect and close for years.
            if not self._core.has_leases(connection.token):
                self._forget(connection)
                self._send(self._core.exited(connection.token))

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:  # gone again, or out of descriptors: it sees its deadline
            return
        client.setblocking(False)
        try:
            pid, pidfd = peer_process(client)
        except OSError as error:  # ConnectionRefused is one
            with contextlib.suppress(OSError):
                client.send(messages.encode_attach(messages.Refused(str(error))))
            client.close()
            return
        connection = _Connection(client, pidfd, pid)
        for fd in (client.fileno(), pidfd):
            self._connections[fd] = connection
            self._epoll.register(fd, select.EPOLLIN)

    def _forget(self, connection: _Connection) -> None:
        del self._connections[connection.pidfd]
        os.close(connection.pidfd)  # closing takes it out of epoll
        if connection.socket.fileno() >= 0:
            del self._connections[connection.socket.fileno()]
            connection.socket.close()

    def _answer(self, connection: _Connection, packet: bytes) -> None:
        fds: list[int] = []
        reply: messages.AttachReply
        try:
            request = messages.decode_attach_request(packet)
            if isinstance(request, messages.Hello):
                reply = self._welcome(connection, request, fds)
            elif not connection.token:
                raise InvalidInput("the first message must be Hello")
            else:
                reply = self._parameter_memory(request, fds)
        except (InvalidInput, NotEnoughMemory) as error:
            reply, fds = messages.Refused(str(error)), []
        with contextlib.suppress(OSError):
            socket.send_fds(connection.socket, [messages.encode_attach(reply)], fds)

    def _welcome(self, connection: _Connection, hello: messages.Hello, fds: list[int]) -> messages.Welcome:
        if hello.protocol_version != messages.PROTOCOL_VERSION:
            raise InvalidInput(
                f"client speaks protocol {hello.protocol_version}, this server {messages.PROTOCOL_VERSION}; "
                "install the same version of rl_buffer on both sides"
            )
        if connection.token:
            raise InvalidInput("Hello was said already")
        # zmq keeps routing ids that begin with a zero byte for itself.
        token = bytes((1 + secrets.randbelow(255),)) + secrets.token_bytes(frames.TOKEN_NBYTES - 1)
        self._core.attach(token, hello.name, connection.pid, time.monotonic())
        connection.token = token
        tables = {
            name: messages.TableInfo(
                memory.config,
                memory.config.layout.digest,
                _offer(memory.rows, fds),
                _offer(memory.generations, fds),
            )
            for name, memory in self._memory.items()
        }
        return messages.Welcome(self._core.epoch, token, tables, self._config.stats)

    def _parameter_memory(
        self, request: messages.GetParameters | messages.CreateParameters, fds: list[int]
    ) -> messages.ParametersInfo:
        name = request.name
        if isinstance(request, messages.CreateParameters):
            if name not in self._parameters:
                self._create_parameters(name, request.fields)
            if self._parameters[name].fields != request.fields:
                difference = _first_difference(self._parameters[name].fields, request.fields)
                raise InvalidInput(
                    f"parameters {name!r} exist with other tensors: {difference}; publish another network under "
                    "another name"
                )
        if name not in self._parameters:
            return messages.ParametersInfo([], 0, None, None)
        memory = self._parameters[name]
        return messages.ParametersInfo(memory.fields, NUM_SLOTS, _offer(memory.rows, fds), _offer(memory.board, fds))

    def _create_parameters(self, name: str, fields: list[tuple[str, Field]]) -> None:
        if len(self._parameters) >= MAX_PARAMETER_SETS:
            raise InvalidInput(f"{MAX_PARAMETER_SETS} parameter sets exist, which is the limit")
        nbytes = NUM_SLOTS * RowLayout(dict(fields)).stride_nbytes
        check_memory(nbytes)
        rows = OwnedSegment(f"parameters:{name}", nbytes)
        board = OwnedSegment(f"board:{name}", BOARD_LENGTH * _INT64_NBYTES, readers_only=True)
        self._parameters[name] = _ParameterMemory(fields, rows, board)
        self._core.parameters[name] = ParameterSlots(board.array("int64"))


def _new_state(memory: _TableMemory) -> ReplayTableState | RolloutTableState:
    if isinstance(memory.config, RolloutTable):
        return RolloutTableState(memory.config)
    return ReplayTableState(memory.config, memory.generations.array("int64"))


def _reserve_tables(tables: dict[str, ReplayTable | RolloutTable]) -> dict[str, _TableMemory]:
    total = sum(table.rows_nbytes + table.num_rows * _INT64_NBYTES for table in tables.values())
    # Masses, their sums and the queues of the bookkeeping: about 5 words a row, ordinary memory.
    check_memory(total + sum(table.num_rows * 5 * _INT64_NBYTES for table in tables.values()))
    reserved, memory = 0, {}
    for name, table in tables.items():

        def progress(nbytes: int, _: int, base: int = reserved) -> None:
            _say(ServerStatus(reserved_nbytes=base + nbytes, total_nbytes=total))

        rows = OwnedSegment(f"rows:{name}", table.rows_nbytes, progress=progress)
        generations = OwnedSegment(f"generations:{name}", table.num_rows * _INT64_NBYTES, readers_only=True)
        memory[name] = _TableMemory(table, rows, generations)
        reserved += rows.nbytes + generations.nbytes
    return memory


def _offer(segment: OwnedSegment, fds: list[int]) -> messages.SegmentInfo:
    fds.append(segment.fd)
    return messages.SegmentInfo(len(fds) - 1, segment.nbytes)


def _first_difference(ours: list[tuple[str, Field]], theirs: list[tuple[str, Field]]) -> str:
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            return f"{mine} here, {other} in the request"
    return f"{len(ours)} tensors here, {len(theirs)} in the request"


def _say(status: ServerStatus) -> None:
    # The parent may be gone or not listening; its pidfd will tell which.
    with contextlib.suppress(OSError):
        sys.stdout.buffer.write(msgspec.json.encode(status) + b"\n")
        sys.stdout.buffer.flush()


def main() -> None:
    """Read the configuration from stdin and serve."""
    with contextlib.suppress(_Stop):
        _main()


def _main() -> None:
    def stop(*_: Any) -> NoReturn:
        raise _Stop

    # A signal that comes just before poll() would be seen after it only, so each one also writes to a pipe.
    signals_fd, signals_writing_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(signals_writing_fd)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us in order
    # Each client takes five descriptors or more, and libzmq aborts the process when there are none left.
    hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    try:
        # Not end-of-file on stdin: a forked child of the parent would hold it open.
        parent_pidfd = os.pidfd_open(os.getppid())
        config = msgspec.json.decode(sys.stdin.buffer.readline(), type=ServerConfig)
        if os.getppid() != config.parent_pid:
            return  # it ended before we could watch it
        loop = ServerLoop(config)
    except (RLBufferError, msgspec.MsgspecError, OSError) as error:
        _say(ServerStatus(error=str(error), error_class=type(error).__name__))
        raise SystemExit(1) from None
    with loop:
        signal.signal(signal.SIGTERM, lambda *_: None)  # the pipe is enough, and no message is cut short
        _say(ServerStatus(ready=True))
        loop.run((parent_pidfd, signals_fd))
