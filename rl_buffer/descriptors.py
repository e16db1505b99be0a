"""How many open descriptors the server has for its clients.

libzmq aborts the process when it runs out of them, so whoever could not be served to the end is refused at the door.
The limit is RLIMIT_NOFILE; each figure below was counted in /proc/PID/fd.
"""

import os
import resource

from rl_buffer.errors import RLBufferError

# Attach connection, its process, the control channel, and one channel that is just being opened or closed.
PER_CLIENT = 4
PER_CHANNEL = 1
PER_PARAMETER_SET = 4  # two pieces of memory; a mapping keeps a descriptor of its own
MAX_STRANGERS = 32  # connections that have not said who they are; two descriptors each
_RESERVED = 2 * MAX_STRANGERS + 64  # what else is opened for a while, a checkpoint for instance


def raise_limit() -> None:
    """Let this process open as many as the system lets it: a login's soft limit is 1024."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def limit() -> int:
    """RLIMIT_NOFILE; descriptors are numbered from 0 up to this."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 30 if soft == resource.RLIM_INFINITY else soft


def num_for_clients() -> int:
    """What is left for clients of a server that has opened all of its own.

    Raises:
        RLBufferError: it is not enough for a single one.
    """
    num_open = len(os.listdir("/proc/self/fd"))
    num_left = limit() - num_open - _RESERVED
    if num_left < PER_CLIENT + PER_CHANNEL:
        need = num_open + _RESERVED + PER_CLIENT + PER_CHANNEL
        raise RLBufferError(
            f"this server may open {limit()} descriptors (RLIMIT_NOFILE), and needs {need} for one client and "
            f"{PER_CLIENT + PER_CHANNEL} for each further one; raise the limit (ulimit -n)"
        )
    return num_left
