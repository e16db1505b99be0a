"""Which process is at the other end of a Unix socket, how to see it end, and how to find it again."""

import errno
import math
import os
import select
import socket
import sys
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from rl_buffer.errors import ConnectionRefused

_SO_PEERPIDFD = 77  # linux/socket.h since 6.5; Python 3.11 does not name it
_UCRED_NBYTES = 12  # pid, uid, gid
_LONGEST_POLL_MS = 2**31 - 1  # 24 days


class Process(NamedTuple):
    """A process, and what tells it from a later one that has its number."""

    pid: int  # 0: it is in another PID namespace
    started: int  # clock ticks since boot; 0: not known
    boot: int  # of the machine
    namespace: int  # in which `pid` counts


UNKNOWN_PROCESS = Process(0, 0, 0, 0)


def identify(pid: int) -> Process:
    """The process that has this number now."""
    return Process(pid, _started(pid), *_here())


def find_again(process: Process) -> int | None:
    """A pidfd of a process that was identified earlier, perhaps by a process that is gone; None if it has ended.

    Raises:
        LookupError: it cannot be known: it is, or was identified, in another PID namespace.
    """
    boot, namespace = _here()
    if process.boot != boot:
        return None
    if process.pid == 0 or process.namespace != namespace:
        raise LookupError(f"process {process.pid} is in another PID namespace")
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL, errno.ENOENT):  # or it is the number of a thread now
            return None
        raise
    # After the pidfd: from here on the number is not given to another.
    if process.started and _started(process.pid) not in (0, process.started):
        os.close(pidfd)
        return None
    return pidfd


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped it; False where that cannot be seen. 20 us."""
    return _stat(pid)[:1] in (["T"], ["t"])


def _started(pid: int) -> int:
    try:
        return int(_stat(pid)[19])
    except (ValueError, IndexError):
        return 0


def _stat(pid: int) -> list[str]:
    """The fields of proc(5) from the third on; [] if they cannot be read."""
    try:
        # The name before them may hold anything but ends with the last parenthesis.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return []


def _here() -> tuple[int, int]:
    """Boot and PID namespace."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")
    return int(boot_id[:15], 16), os.stat("/proc/self/ns/pid").st_ino


def peer_process(connected: socket.socket, uids: Collection[int]) -> tuple[int, int, int]:
    """(pid, uid, pidfd) of the process that connected or listens; the pidfd becomes readable when it ends.

    Raises:
        ConnectionRefused: it runs as none of the users `uids`, or cannot be watched.
    """
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED_NBYTES)
    pid, uid = (int.from_bytes(credentials[start : start + 4], sys.byteorder) for start in (0, 4))
    if uid not in uids:
        expected = " or ".join(map(str, dict.fromkeys(uids)))
        raise ConnectionRefused(
            f"the other side runs as user {uid}, and this one expects user {expected}; see allowed_uids= of "
            "BufferServer and server_uid= of rb.connect"
        )
    try:
        return pid, uid, connected.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:  # before Linux 6.5
        if pid == 0:
            raise ConnectionRefused(
                "the other side runs in another PID namespace, which needs Linux 6.5 to be watched"
            ) from None
        return pid, uid, os.pidfd_open(pid)


def readable(fd: int, timeout_s: float) -> bool:
    """Whether a descriptor becomes readable in time: a socket has something, or the process of a pidfd has ended."""
    poller = select.poll()  # not select(), which refuses descriptors above 1023
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(min(math.ceil(timeout_s * 1000), _LONGEST_POLL_MS)))
