"""Starts server processes for the tests in 30 ms instead of 2 s: forked from a process that has the imports done.

Everything else is as `rl_buffer.server` does it: a child of the process that asks, in a session of its own, with that
one's environment, limits and working directory. What a command starts (`test_scripts`, `test_readme`, ...) is started
by it as always.

    tests --(who, where, three descriptors)--> parent of servers --fork--> --fork--> server
      ^                                                              (ends)            |
      +------------- adopts the orphan, because it is a subreaper at this moment ------+
"""

import ctypes
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import rl_buffer.server

_PR_SET_CHILD_SUBREAPER = 36
_LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_DATA)
_MAX_REQUEST_NBYTES = 1 << 20
_DEADLINE_S = 60.0


class WarmServers:
    """`launch` stands in for `rl_buffer.server._launch`."""

    def __init__(self):
        self._parent = None
        self._lock = threading.Lock()

    def launch(self):
        with self._lock:  # tests start servers in threads
            if self._parent is None:
                self._start()
            stdin, our_stdin = os.pipe()
            our_stdout, stdout = os.pipe()
            limits = [resource.getrlimit(limit) for limit in _LIMITS]
            request = {"environment": dict(os.environ), "directory": os.getcwd(), "limits": limits, "pid": os.getpid()}
            _be_subreaper(True)
            try:
                descriptors = [stdin, stdout, sys.__stderr__.fileno()]
                socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
                pid = int(self._socket.recv(64))
            finally:
                _be_subreaper(False)
                os.close(stdin)
                os.close(stdout)
        server = subprocess.Popen.__new__(subprocess.Popen)  # of a child that is there already
        server.__dict__.update(
            pid=pid,
            args=["rl_buffer.server"],
            returncode=None,
            stdin=os.fdopen(our_stdin, "wb", 0),
            stdout=os.fdopen(our_stdout, "rb", 0),
            stderr=None,
            _child_created=True,
            _waitpid_lock=threading.Lock(),
            _communication_started=False,
            _input=None,
            _sigint_wait_secs=0.25,
        )
        return server

    def _start(self):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_DEADLINE_S)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_REQUEST_NBYTES)
        with theirs:
            limits = dict.fromkeys(rl_buffer.server._THREAD_LIMITS, "1")
            self._parent = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | limits | {"RL_BUFFER_FAILPOINT": "", "PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,
            )

    def close(self):
        if self._parent is not None:
            self._socket.close()
            self._parent.wait(_DEADLINE_S)


def _be_subreaper(yes):
    assert ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0) == 0


def _serve_forks(requests):
    """Until the tests are done: their end of the socket is closed."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, _MAX_REQUEST_NBYTES, 3)
        if not message:
            return
        between = os.fork()
        if between == 0:
            _fork_server(requests, json.loads(message), descriptors)
        os.waitpid(between, 0)
        for descriptor in descriptors:
            os.close(descriptor)


def _fork_server(requests, request, descriptors):
    if os.fork() != 0:
        os._exit(0)
    deadline_s = time.monotonic() + _DEADLINE_S
    while os.getppid() != request["pid"]:  # until the process between has ended
        assert time.monotonic() < deadline_s
        time.sleep(1e-4)
    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    for limit, values in zip(_LIMITS, request["limits"], strict=True):
        resource.setrlimit(limit, tuple(values))
    requests.send(str(os.getpid()).encode())
    requests.close()

    from rl_buffer import failpoints
    from rl_buffer.server_loop import main

    failpoints.arm(os.environ.get("RL_BUFFER_FAILPOINT", ""))
    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if sys.exc_info()[0] else 0)


if __name__ == "__main__":
    import rl_buffer.row_set
    import rl_buffer.server_loop
    import rl_buffer.sum_tree

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve_forks(socket.socket(fileno=int(sys.argv[1])))
