"""One process's line to a server: the attach socket, shared memory, and zmq channels with deadlines.

Nothing here knows what the messages mean. Every wait watches the server's process as well, so that a killed server
ends it at once and not at the deadline.

A connection is to one epoch, and once it is lost it stays so. What goes on over several servers are a `Client`, which
holds one connection after the other, and the `ChannelUser`s that it made.
"""

import contextlib
import itertools
import math
import os
import select
import socket
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Self

import zmq

from rl_buffer import frames, messages
from rl_buffer.address import Address
from rl_buffer.errors import (
    Closed,
    ConnectionRefused,
    DeadlineExceeded,
    InvalidInput,
    RequestRefused,
    RLBufferError,
    ServerLost,
)
from rl_buffer.failpoints import reached
from rl_buffer.peers import peer_process, readable
from rl_buffer.storage import ProcessGuard, Segment

_RETRY_S = 0.02  # between looks for a server that has not been started yet
_MAX_FDS_PER_PACKET = 253  # SCM_MAX_FD of Linux
_SEND_TIMEOUT_MS = 10_000

_open_lines: "weakref.WeakSet[_Lines]" = weakref.WeakSet()


class Connection:
    """Attached to one server epoch, in the process that made it."""

    def __init__(self, address: Address, name: str, timeout_s: float, previous: "Connection | None" = None) -> None:
        """Attach, waiting for a server that is not there yet.

        Args:
            address: of the server.
            name: for its `info`.
            timeout_s: deadline in seconds.
            previous: one that this takes the place of, abandoned: the server may free what it held.

        Raises:
            DeadlineExceeded: none came up, or it did not answer.
            ConnectionRefused: it does not let this process in.
            ServerLost: one came up, and ended.
        """
        _check_processor()
        self.address = address
        self.name = name
        self.token = b""  # until the server says which
        self.guard = ProcessGuard()
        self._lock = threading.Lock()
        self._channel_numbers = itertools.count(1)
        self._closed = False
        self._abandoned = False
        self._lines = _Lines(*_connect(address, time.monotonic() + timeout_s, timeout_s))
        weakref.finalize(self, self._lines.close).atexit = False
        reached("attach.connected")
        try:
            hello = messages.Hello(messages.PROTOCOL_VERSION, name, b"" if previous is None else previous.token)
            with self.request(hello, timeout_s) as (reply, segment):
                if isinstance(reply, messages.Refused):
                    raise ConnectionRefused(f"{address} refused: {reply.reason}")
                if not isinstance(reply, messages.Welcome):
                    raise InvalidInput(
                        f"{address} answered Hello with {type(reply).__name__}; is it an rl_buffer server?"
                    )
                reached("attach.welcomed")
                self.epoch = reply.epoch
                self.token = reply.token
                self.stats_config = reply.stats
                self.tables = reply.tables
                self.segments = {
                    name: (segment(info.rows, True), segment(info.generations, False))
                    for name, info in reply.tables.items()
                }
            reached("attach.mapped")
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def request(
        self, request: messages.AttachRequest, timeout_s: float
    ) -> "Iterator[tuple[messages.AttachReply, Callable[[messages.SegmentInfo, bool], Segment]]]":
        """Ask on the attach socket; inside the block, `segment(info, writable)` maps what came with the reply."""
        self.check()
        fds: list[int] = []
        with self._lock:
            try:
                with contextlib.suppress(BrokenPipeError):  # the server closed it, and has said why
                    self._lines.attach.send(messages.encode_attach(request))
                if not readable(self._lines.attach.fileno(), timeout_s):
                    raise DeadlineExceeded(f"{self.address} did not answer within {timeout_s} s; is it stopped?")
                packet, fds = _receive(self._lines.attach)
            except OSError as error:
                if isinstance(error, DeadlineExceeded):
                    raise
                raise server_lost(self.address) from error
        try:
            if not packet:
                raise server_lost(self.address)
            yield (
                messages.decode_attach_reply(packet),
                lambda info, writable: Segment(fds[info.position], info.nbytes, writable=writable, sealed=info.sealed),
            )
        finally:
            for fd in fds:
                os.close(fd)

    def channel(self) -> "Channel":
        """A new zmq channel; it belongs to the thread that uses it."""
        self.check()
        return Channel(self, self._lines, next(self._channel_numbers))

    def pause(self, seconds: float) -> None:
        """Let time pass, but not past the server's end.

        Raises:
            ServerLost: its process ended.
            Closed, ForkedClient: see `check`.
        """
        self.check()
        if readable(self._lines.server_pidfd, seconds):
            raise server_lost(self.address)

    def check(self) -> None:
        """Raise if this connection cannot be used here and now; whether the server lives is not looked at.

        Raises:
            ForkedClient: in a forked child.
            ServerLost: it was abandoned.
            Closed: it was closed.
        """
        self.guard.check()
        if self._abandoned:
            raise server_lost(self.address)
        self._check_open()

    def check_server(self) -> None:
        """As `check`, and ServerLost if the server's process ended. 0.5 us."""
        self.pause(0.0)

    @property
    def is_lost(self) -> bool:
        """Whether the server ended or hung up.

        Raises:
            Closed, ForkedClient: see `check`.
        """
        self.guard.check()
        self._check_open()
        return self._abandoned or readable(self._lines.server_pidfd, 0.0) or self._hung_up()

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"the client of {self.address} was closed")

    def _hung_up(self) -> bool:
        poller = select.poll()
        poller.register(self._lines.attach, select.POLLRDHUP)
        return bool(poller.poll(0))

    def abandon(self) -> None:
        """Raise ServerLost from every call from now on: not even the memory will be touched again."""
        self._abandoned = True

    def close(self) -> None:
        """Give up sockets. Mapped memory stays valid as long as arrays refer to it."""
        if not self._closed:
            self._closed = True
            self._lines.close_channels()
            with self._lock:  # a request of another thread ends first
                self._lines.close_descriptors()


class _Lines:
    """The sockets and descriptors of one connection, given up at the latest when nobody has it any more.

    Nothing here leads back to it. What the garbage collector ends it ends in any order; and a context of zmq that ends
    while it has a socket, one of a channel whose owner was dropped for instance, waits for that one for ever.
    """

    def __init__(self, attach: socket.socket, server_pidfd: int) -> None:
        self.attach = attach
        self.server_pidfd = server_pidfd
        self._context = zmq.Context()
        self._sockets: set[zmq.Socket[bytes]] = set()  # the context itself knows them weakly
        _open_lines.add(self)

    def open_socket(self) -> "zmq.Socket[bytes]":
        """A zmq socket, to be closed by `close_socket`."""
        opened = self._context.socket(zmq.DEALER)
        self._sockets.add(opened)
        return opened

    def close_socket(self, opened: "zmq.Socket[bytes]") -> None:
        """Drop what is not sent. Twice is fine."""
        opened.close()
        self._sockets.discard(opened)

    def close_channels(self) -> None:
        """Close all zmq sockets; in a forked child zmq leaves its parent's alone."""
        self._context.destroy(linger=0)
        self._sockets.clear()

    def close_descriptors(self) -> None:
        """The part of `close` that a forked child may do: the descriptors are its own copies."""
        self.attach.close()
        if self.server_pidfd >= 0:
            os.close(self.server_pidfd)
            self.server_pidfd = -1

    def close(self) -> None:
        """Give up everything. Twice is fine."""
        self.close_channels()
        self.close_descriptors()


class Channel:
    """One DEALER socket; its routing id proves to the server which attached client speaks."""

    def __init__(
        self,
        connection: Connection,
        lines: _Lines,
        number: int,
    ) -> None:
        self.connection = connection
        self.number = number
        self._lines = lines
        self._socket = lines.open_socket()
        self._socket.setsockopt(zmq.IDENTITY, connection.token + number.to_bytes(4, "little"))
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, frames.MAX_MESSAGE_NBYTES)
        self._socket.connect(connection.address.control_endpoint)
        self._server_pidfd = server_pidfd = lines.server_pidfd
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(server_pidfd, zmq.POLLIN)
        self._server_end = select.poll()  # kept: to make one takes three times as long as to ask it
        self._server_end.register(server_pidfd, select.POLLIN)

    def check_server(self) -> None:
        """See `Connection.check_server`; in the channel's thread only, and in a third of the time."""
        self.connection.check()
        if self._server_end.poll(0):
            raise server_lost(self.connection.address)

    def send(self, frame: bytes) -> None:
        """Queue one frame.

        Raises:
            DeadlineExceeded: the server has not read for so long that the queue is full.
            ServerLost: its process ended.
            Closed, ForkedClient: see `Connection.check`.
        """
        self.check_server()
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            self._wait_until_read()
            self._socket.send(frame, zmq.NOBLOCK)

    def _wait_until_read(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLOUT)
        poller.register(self._server_pidfd, zmq.POLLIN)
        ready = dict(poller.poll(_SEND_TIMEOUT_MS))
        if self._server_pidfd in ready:
            raise server_lost(self.connection.address)
        if not ready:
            raise DeadlineExceeded(
                f"the server at {self.connection.address} has not read a message for {_SEND_TIMEOUT_MS / 1000} s"
            )

    def receive(self, timeout_s: float) -> bytes | None:
        """The next frame, or None at the deadline. Zero does not wait.

        Raises:
            RequestRefused: the frame says that the server refused something.
            ServerLost: its process ended.
            Closed, ForkedClient: see `Connection.check`.
        """
        self.connection.check()
        frame = self._receive(timeout_s)
        if frame is not None and frames.kind_of(frame) == frames.REFUSAL:
            if self.connection.is_lost:  # abandoned meanwhile, or hung up on: that is the reason then
                raise server_lost(self.connection.address)
            epoch, reason = frames.decode_refusal(frame)
            if epoch != self.connection.epoch:  # zmq reconnected by itself to whoever has the address now
                raise server_lost(self.connection.address)
            raise RequestRefused(reason)
        return frame

    def _receive(self, timeout_s: float) -> bytes | None:
        with contextlib.suppress(zmq.Again):
            return self._socket.recv(zmq.NOBLOCK)
        if timeout_s <= 0:
            return None
        ready = dict(self._poller.poll(math.ceil(timeout_s * 1000)))
        if self._socket in ready:  # first: what a dying server sent still counts
            return self._socket.recv()
        if ready:
            raise server_lost(self.connection.address)
        return None

    def close(self) -> None:
        """Close the socket; unsent frames are dropped."""
        self._lines.close_socket(self._socket)


class ChannelUser(ABC):
    """What lives on a channel of its own: a writer, sampler or reader.

        open --the server ended--> lost --(Client.reconnect: _rescue, then _open on a channel of the next one)--> open
        open --close--> closed, for good

    While it is lost its calls raise ServerLost, and have done nothing. One thread at a time, `reconnect` included.
    """

    _channel: Channel
    _call: "Callable[[Channel, messages.Request], messages.Reply]"
    _closed = False

    @abstractmethod
    def _open(self, channel: Channel) -> None:
        """Begin on this channel, or go on: forget the one before, and what belonged to its server.

        Raises:
            RequestRefused, DeadlineExceeded, ServerLost: nothing has changed.
        """

    @abstractmethod
    def _rescue(self) -> None:
        """Copy out of a lost server's memory what the next one shall have, and write there no more. Twice is fine."""

    @property
    def is_open(self) -> bool:
        """Whether it was not closed; it may be lost."""
        return not self._closed

    def is_on(self, connection: Connection) -> bool:
        """Whether its channel is one of this connection."""
        return self._channel.connection is connection

    def close(self) -> None:
        """Stop, and give back what is held. Twice is fine."""
        self._leave()

    def _leave(self) -> None:
        """Close the channel without sending anything first; the server takes back what this holds."""
        if not self._closed:
            self._closed = True
            try:
                self._call(self._channel, messages.CloseChannel(self._channel.number))
            finally:
                self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception_type: object, *_: object) -> None:
        if exception_type is None:
            self.close()
        else:
            with contextlib.suppress(RLBufferError):  # the block's error matters more
                self._leave()


def _receive(attach: socket.socket) -> tuple[bytes, list[int]]:
    """The next packet and its descriptors; b"" at the end."""
    try:
        packet, fds, _, _ = socket.recv_fds(attach, messages.MAX_ATTACH_NBYTES, _MAX_FDS_PER_PACKET)
    except ConnectionResetError:  # closed before it read our request; what it said before, perhaps why, is still there
        packet, fds, _, _ = socket.recv_fds(attach, messages.MAX_ATTACH_NBYTES, _MAX_FDS_PER_PACKET)
    return packet, fds


def _check_processor() -> None:
    if os.uname().machine != "x86_64":
        raise RLBufferError(
            f"this processor is {os.uname().machine}; readers rely on the load order of x86-64 to see overwritten rows"
        )


def server_lost(address: Address) -> ServerLost:
    """The error of every call that finds the server's process gone."""
    return ServerLost(
        f"the server at {address} ended; start one there and call client.reconnect(), or connect again without what it "
        "had not acknowledged"
    )


def _connect(address: Address, deadline_s: float, timeout_s: float) -> tuple[socket.socket, int]:
    """(connected socket, pidfd of the server), trying until the deadline."""
    while True:
        attach = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            address.check_trusted()
            attach.setblocking(False)  # a stopped server's full backlog would block connect() for ever
            attach.connect(os.fspath(address.attach))
            attach.setblocking(True)
            return attach, peer_process(attach, address.server_uids)[2]
        # ProcessLookupError: it was killed between the two calls.
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError, ProcessLookupError) as error:
            attach.close()
            if time.monotonic() >= deadline_s:
                raise DeadlineExceeded(
                    f"no server came up at {address} within {timeout_s} s ({error.strerror}); start one there "
                    "(scripts/serve.py, or BufferServer.start), or pass the address that it prints"
                ) from error
            time.sleep(_RETRY_S)
        except BaseException:
            attach.close()
            raise


def _close_in_forked_child() -> None:
    for lines in list(_open_lines):
        lines.close_descriptors()


os.register_at_fork(after_in_child=_close_in_forked_child)
