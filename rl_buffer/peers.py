"""Which process is at the other end of a Unix socket, and how to see it end."""

import math
import os
import select
import socket
import sys

from rl_buffer.errors import ConnectionRefused

_SO_PEERPIDFD = 77  # linux/socket.h since 6.5; Python 3.11 does not name it
_UCRED_NBYTES = 12  # pid, uid, gid


def peer_process(connected: socket.socket) -> tuple[int, int]:
    """(pid, pidfd) of the process that connected or listens; the pidfd becomes readable when it ends.

    Raises:
        ConnectionRefused: it runs as another user, or cannot be watched.
    """
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED_NBYTES)
    pid, uid = (int.from_bytes(credentials[start : start + 4], sys.byteorder) for start in (0, 4))
    if uid != os.getuid():
        raise ConnectionRefused(f"the other side runs as user {uid}, this one as {os.getuid()}; both must be the same")
    try:
        return pid, connected.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:  # before Linux 6.5
        if pid == 0:
            raise ConnectionRefused(
                "the other side runs in another PID namespace, which needs Linux 6.5 to be watched"
            ) from None
        return pid, os.pidfd_open(pid)


def readable(fd: int, timeout_s: float) -> bool:
    """Whether a descriptor becomes readable in time: a socket has something, or the process of a pidfd has ended."""
    poller = select.poll()  # not select(), which refuses descriptors above 1023
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(math.ceil(timeout_s * 1000)))
