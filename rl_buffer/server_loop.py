"""The server's process: sockets, descriptors and signals around `ServerCore`. It only polls and passes on.

Started by `BufferServer` as `python -m rl_buffer.server`: the configuration comes by stdin; lines of JSON on stdout
tell how far it is, and at last ready or why not. It ends on SIGTERM, or when its parent process has ended.
"""

import contextlib
import os
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
import numpy as np
import zmq
from numpy.typing import NDArray

from rl_buffer import descriptors, frames, messages
from rl_buffer.address import Address
from rl_buffer.checkpoint import Contents, ParameterMemory, read_contents, restore
from rl_buffer.checkpoint_file import CheckpointReader
from rl_buffer.checkpointer import Checkpointer
from rl_buffer.errors import ConnectionRefused, InvalidInput, NotEnoughMemory, RLBufferError
from rl_buffer.failpoints import reached
from rl_buffer.grants import Outgoing
from rl_buffer.messages import ServerConfig, ServerStatus
from rl_buffer.parameter_slots import BOARD_LENGTH, NUM_SLOTS, ParameterSlots
from rl_buffer.peers import identify, is_stopped, peer_process, readable
from rl_buffer.server_stats import MAX_NAME_LENGTH
from rl_buffer.sessions import WriterProgress
from rl_buffer.spec import Field, RowLayout
from rl_buffer.storage import OwnedSegment, check_memory
from rl_buffer.table_memory import reserve_memory
from rl_buffer.tables import RolloutTable

MAX_PARAMETER_SETS = 64
_MESSAGES_PER_TURN = 256  # then attaching clients and exits get their turn
# Messages that a client may leave unread; more are dropped. Its fragments may come in one message each.
_SEND_HWM = 1_000
_RECEIVE_HWM = 16  # of one channel; then its client waits. 4 clients with 16 send as many a second as with 10,000
_INT64_NBYTES = 8
_ANY_SEGMENT = messages.SegmentInfo(1, 2**63)


class _Stop(BaseException):
    """SIGTERM arrived while the server was starting."""


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
    is_guest: bool = False  # of another user


class ServerLoop:
    """One epoch: from bind to the last reply. Leaving its `with` block removes the address."""

    def __init__(self, config: ServerConfig) -> None:
        """Reserve memory, compile kernels and bind, in this order, so that a bound address is a working one."""
        self._address = Address(config.address)
        self._lock_fd = self._address.acquire(serves_others=bool(config.allowed_uids))
        reached("server.locked")
        try:
            self._config = config
            # What does not fit is refused before memory is reserved.
            with contextlib.nullcontext() if config.restore is None else CheckpointReader(config.restore) as saved:
                contents = None if saved is None else read_contents(saved, config.tables)
                self._memory = reserve_memory(config, _say_reserved)
                reached("server.allocated")
                self._core = self._memory.new_core(secrets.randbits(63) | 1)
                self._parameters: dict[str, _ParameterMemory] = {}
                if saved is not None and contents is not None:
                    self._restore(saved, contents)
            self._memory.complete(self._core)
            self._connections: dict[int, _Connection] = {}  # by descriptor of the socket or of the process
            self._epoll = select.epoll()
            self._watch_survivors()
            table_fds = {f"rows:{name}": memory.rows.fd for name, memory in self._memory.tables.items()}
            self._checkpointer = Checkpointer(self._core, self._epoll, table_fds, self._parameter_contents)
            self._strangers: dict[_Connection, None] = {}  # that have not said hello, the first to come first
            self._bind()
            self._core.max_descriptors = descriptors.num_for_clients()
            self._core.is_stopped = is_stopped
            reached("server.bound")
        except BaseException:
            if hasattr(self, "_memory"):
                self._memory.close()
            self._address.release(self._lock_fd)
            raise

    def _restore(self, saved: CheckpointReader, contents: Contents) -> None:
        """Fill everything from a checkpoint."""
        states = {name: table.state for name, table in self._core.tables.items()}
        rows = {name: _as_rows(memory.rows, memory.config.num_rows) for name, memory in self._memory.tables.items()}
        restore(saved, contents, states, rows, self._core.stats)
        self._core.known_writers |= {
            bytes.fromhex(writer_id): WriterProgress(*progress) for writer_id, progress in contents.writers.items()
        }
        for name, parameters in contents.parameters.items():
            self._create_parameters(name, parameters.fields)
            saved.read_into(f"parameters:{name}", _as_rows(self._parameters[name].rows, NUM_SLOTS)[:1])
            self._core.parameters[name].restore(parameters.version)

    def _bind(self) -> None:
        self._uids = (os.getuid(), *self._config.allowed_uids)
        previous_mask = os.umask(0o111 if self._config.allowed_uids else 0o177)
        try:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
            self._listener.bind(os.fspath(self._address.attach))
            self._context = zmq.Context()
            self._router = self._context.socket(zmq.ROUTER)
            self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._router.setsockopt(zmq.LINGER, 0)
            num_fragments = (t.num_fragments for t in self._config.tables.values() if isinstance(t, RolloutTable))
            self._router.setsockopt(zmq.SNDHWM, _SEND_HWM + max(num_fragments, default=0))
            self._router.setsockopt(zmq.RCVHWM, _RECEIVE_HWM)
            self._router.setsockopt(zmq.MAXMSGSIZE, frames.MAX_MESSAGE_NBYTES)
            for uid in self._uids:
                self._router.setsockopt(zmq.IPC_FILTER_UID, uid)
            self._router.bind(self._address.control_endpoint)
            self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
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
                self._send(self._checkpointer.start())
            if self._epoll.fileno() in ready:
                for fd, _ in self._epoll.poll(0):
                    if fd in ends:
                        return
                    self._serve_descriptor(fd)

    def __enter__(self) -> "ServerLoop":
        return self

    def __exit__(self, *exception: object) -> None:
        self._checkpointer.close()
        self._context.destroy(linger=0)
        self._listener.close()
        self._memory.close()
        self._address.release(self._lock_fd)

    # ---- control socket ------------------------------------------------------------------------------------

    def _serve_messages(self) -> None:
        for _ in range(_MESSAGES_PER_TURN):
            try:
                channel_id, *parts = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            reached("server.received")
            frame = parts[0] if len(parts) == 1 else b""  # no message has parts: refused as an unknown kind
            self._send(self._core.handle(channel_id, frame, time.monotonic()))

    def _send(self, outgoing: Outgoing) -> None:
        for channel_id, frame in outgoing:
            reached("server.answering")
            # Gone, or not reading: its own deadline will tell it. Nobody else waits for it.
            with contextlib.suppress(zmq.ZMQError):
                try:
                    self._router.send_multipart((channel_id, frame), zmq.NOBLOCK)
                except zmq.Again:
                    self._core.num_undelivered += 1
            reached("server.answered")

    # ---- attach socket -------------------------------------------------------------------------------------

    def _serve_descriptor(self, fd: int) -> None:
        if fd == self._listener.fileno():
            self._accept()
            return
        if fd == self._checkpointer.fd:
            self._send(self._checkpointer.serve())
            return
        connection = self._connections.get(fd)
        if connection is None:
            return
        if fd == connection.pidfd:
            # Looked at again: the event may be an older one, of a descriptor closed meanwhile that had this number.
            if not readable(fd, 0.0):
                return
            self._forget(connection)
            self._send(self._core.exited(connection.token, time.monotonic()))
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
                self._send(self._core.exited(connection.token, time.monotonic()))

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # gone again
            return
        except OSError as error:
            self._turn_away(error)
            return
        client.setblocking(False)
        try:
            # The lowest free number is given: all below this one are taken.
            if client.fileno() >= descriptors.limit() - descriptors.MAX_STRANGERS:
                raise ConnectionRefused("the server has as many descriptors open as it may (ulimit -n)")
            pid, uid, pidfd = peer_process(client, self._uids)
        except OSError as error:  # ConnectionRefused is one
            self._refuse(client, error)
            client.close()
            return
        reached("server.accepted")
        if len(self._strangers) == descriptors.MAX_STRANGERS:
            silent = next(iter(self._strangers))
            self._refuse(silent.socket, ConnectionRefused(f"{len(self._strangers)} others have come and said nothing"))
            self._forget(silent)
        connection = _Connection(client, pidfd, pid, is_guest=uid != os.getuid())
        for fd in (client.fileno(), pidfd):
            self._connections[fd] = connection
            self._epoll.register(fd, select.EPOLLIN)
        self._strangers[connection] = None

    def _turn_away(self, error: OSError) -> None:
        """There is no descriptor for the next connection. Left in the queue, it would wake this loop for ever."""
        with contextlib.suppress(OSError):
            os.close(self._spare_fd)
            with self._listener.accept()[0] as client:
                self._refuse(client, error)
        with contextlib.suppress(OSError):
            self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _refuse(self, client: socket.socket, error: Exception) -> None:
        """Say why; to be closed afterwards."""
        refused = messages.Refused(self._core.refused(error))
        with contextlib.suppress(OSError):
            client.send(messages.encode_attach(refused), socket.MSG_DONTWAIT)

    def _watch_survivors(self) -> None:
        """Look out for the end of those clients of an earlier server that may still write into rows of theirs."""
        for survivor in self._memory.survivors:
            if survivor.pidfd is not None:
                closed = socket.socket(socket.AF_UNIX)
                closed.close()
                connection = _Connection(closed, survivor.pidfd, survivor.pid, survivor.token)
                self._connections[survivor.pidfd] = connection
                self._epoll.register(survivor.pidfd, select.EPOLLIN)

    def _forget(self, connection: _Connection) -> None:
        self._strangers.pop(connection, None)
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
                reached("server.greeted")
                reply = self._welcome(connection, request, fds)
            elif not connection.token:
                raise InvalidInput("the first message must be Hello")
            else:
                reply = self._parameter_memory(request, fds)
        except (InvalidInput, NotEnoughMemory) as error:
            reply, fds = messages.Refused(self._core.refused(error)), []
        with contextlib.suppress(OSError):
            socket.send_fds(connection.socket, [messages.encode_attach(reply)], fds)
            reached("server.welcomed")

    def _welcome(self, connection: _Connection, hello: messages.Hello, fds: list[int]) -> messages.Welcome:
        if hello.protocol_version != messages.PROTOCOL_VERSION:
            raise InvalidInput(
                f"client speaks protocol {hello.protocol_version}, this server {messages.PROTOCOL_VERSION}; "
                "install the same version of rl_buffer on both sides"
            )
        if connection.token:
            raise InvalidInput("Hello was said already")
        self._replace(hello.previous, connection.pid)
        # zmq keeps routing ids that begin with a zero byte for itself.
        token = bytes((1 + secrets.randbelow(255),)) + secrets.token_bytes(frames.TOKEN_NBYTES - 1)
        self._core.attach(
            token,
            hello.name,
            connection.pid,
            time.monotonic(),
            identify(connection.pid),
            is_guest=connection.is_guest,
        )
        connection.token = token
        del self._strangers[connection]
        reached("server.attached")
        tables = {
            name: messages.TableInfo(
                memory.config,
                memory.config.layout.digest,
                _offer(memory.rows, fds),
                _offer(memory.generations, fds),
            )
            for name, memory in self._memory.tables.items()
        }
        return messages.Welcome(self._core.epoch, token, tables, self._config.stats)

    def _replace(self, token: bytes, pid: int) -> None:
        """Free what process `pid` held with an earlier connection, if `token` is of one."""
        previous = next((c for c in self._connections.values() if c.token == token != b"" and c.pid == pid), None)
        if previous is not None:
            self._forget(previous)
        self._send(self._core.attached_again(token, pid, time.monotonic()))

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
        if not 1 <= len(name) <= MAX_NAME_LENGTH:
            raise InvalidInput(f"the name of a parameter set has 1 to {MAX_NAME_LENGTH} characters, not {len(name)}")
        described = messages.ParametersInfo(fields, NUM_SLOTS, _ANY_SEGMENT, _ANY_SEGMENT)
        if len(messages.encode_attach(described)) > messages.MAX_ATTACH_NBYTES:
            raise InvalidInput(
                f"{len(fields)} tensors take more than {messages.MAX_ATTACH_NBYTES} bytes to describe; publish them "
                "under several names"
            )
        self._core.require_descriptors(descriptors.PER_PARAMETER_SET)
        nbytes = NUM_SLOTS * RowLayout(dict(fields)).stride_nbytes
        check_memory(nbytes, f"parameters {name!r}", "publish fewer or smaller tensors")
        rows = OwnedSegment(f"parameters:{name}", nbytes)
        board = OwnedSegment(f"board:{name}", BOARD_LENGTH * _INT64_NBYTES, readers_only=True)
        self._parameters[name] = _ParameterMemory(fields, rows, board)
        self._core.parameters[name] = ParameterSlots(board.array("int64"))

    def _parameter_contents(self) -> dict[str, ParameterMemory]:
        return {
            name: ParameterMemory(
                self._core.parameters[name], memory.fields, memory.rows.nbytes // NUM_SLOTS, memory.rows.fd
            )
            for name, memory in self._parameters.items()
        }


def _as_rows(segment: OwnedSegment, num_rows: int) -> NDArray[np.int64]:
    return segment.array("int64").reshape(num_rows, -1)


def _offer(segment: OwnedSegment, fds: list[int]) -> messages.SegmentInfo:
    fds.append(segment.fd)
    return messages.SegmentInfo(len(fds) - 1, segment.nbytes, segment.sealed)


def _first_difference(ours: list[tuple[str, Field]], theirs: list[tuple[str, Field]]) -> str:
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            return f"{mine} here, {other} in the request"
    return f"{len(ours)} tensors here, {len(theirs)} in the request"


def _say_reserved(reserved_nbytes: int, total_nbytes: int) -> None:
    _say(ServerStatus(reserved_nbytes=reserved_nbytes, total_nbytes=total_nbytes))


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
    descriptors.raise_limit()
    try:
        # Not end-of-file on stdin: a forked child of the parent would hold it open.
        parent_pidfd = os.pidfd_open(os.getppid())
        config = msgspec.json.decode(sys.stdin.buffer.readline(), type=ServerConfig)
        if os.getppid() != config.parent_pid:
            return  # it ended before we could watch it
        loop = ServerLoop(config)
    except (RLBufferError, msgspec.MsgspecError, OSError) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # who is told ends us, and we end by ourselves
        _say(ServerStatus(error=str(error), error_class=type(error).__name__))
        raise SystemExit(1) from None
    with loop:
        signal.signal(signal.SIGTERM, lambda *_: None)  # the pipe is enough, and no message is cut short
        _say(ServerStatus(ready=True))
        loop.run((parent_pidfd, signals_fd))
