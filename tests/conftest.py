"""Servers and child processes for the tests of the process half; whatever a test started is ended after it."""

import contextlib
import signal
import time

import pytest
from warm_server import WarmServers
from xdist.scheduler import LoadScopeScheduling

import rl_buffer as rb
import rl_buffer.server
from rl_buffer.launch import ProcessGroup

DEADLINE_S = 60.0  # for what should take milliseconds: only a hang reaches it
# There is one forkserver, with the imports that who launches it asks for: all that children of any test need.
PRELOAD = [
    "pytest",
    "hypothesis",
    "rl_buffer.sampler",
    "actors.crew",
    "child_processes",
    "child_misuse",
    "episode_envs",
]


# Tests of the same file share a worker of xdist, and so the server of their module. Those of these files take long and
# share nothing; they come last, one by one, to whichever worker is free.
SINGLE = {f"tests/test_{name}.py" for name in ("checkpoint", "ledger", "readme", "scripts", "soak")}


class _Scheduling(LoadScopeScheduling):
    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0]
        return nodeid if file in SINGLE else file


def pytest_xdist_make_scheduler(config, log):
    return _Scheduling(config, log)


def pytest_configure(config):
    # A background job of a shell ignores Ctrl-C, and so would every script that a test starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _warm_processes():
    """Servers that the tests' own process starts take 30 ms instead of 2 s, and so do children."""
    ProcessGroup(PRELOAD).launch()
    warm, launch = WarmServers(), rl_buffer.server._launch
    rl_buffer.server._launch = warm.launch
    yield
    rl_buffer.server._launch = launch
    warm.close()


@pytest.fixture
def serve():
    """Start a server of these tables (a name each, or one that is then called "replay")."""
    with contextlib.ExitStack() as stack:

        def start(tables, **options):
            tables = tables if isinstance(tables, dict) else {"replay": tables}
            return stack.enter_context(rb.BufferServer(tables, **options))

        yield start


@pytest.fixture
def connect():
    """`rl_buffer.connect`, closed at the end."""
    with contextlib.ExitStack() as stack:

        def start(server, **options):
            options = {"timeout_s": DEADLINE_S} | options
            return stack.enter_context(rb.connect(getattr(server, "address", server), **options))

        yield start


@pytest.fixture
def children():
    """Child processes by name; a function of `child_processes` is what they should run."""
    group = ProcessGroup(PRELOAD)
    with group:
        yield group


@pytest.fixture
def pipe():
    """Make a two-way pipe: one end for the test, the other as an argument of a child."""
    import multiprocess

    with contextlib.ExitStack() as stack:

        def make():
            ends = multiprocess.Pipe()
            for end in ends:
                stack.enter_context(end)
            return ends

        yield make


@pytest.fixture
def eventually():
    """Look again and again until a predicate holds; a fixture, so that test modules need not import conftest."""

    def wait(predicate, timeout_s=DEADLINE_S):
        deadline_s = time.monotonic() + timeout_s
        while not (value := predicate()):
            assert time.monotonic() < deadline_s, f"did not come true within {timeout_s} s"
        return value

    return wait


@pytest.fixture
def receive():
    """The next message of a child, or its traceback."""

    def wait(end, group=None, timeout_s=DEADLINE_S):
        if not end.poll(timeout_s):
            ended = group.reap() if group is not None else []
            pytest.fail(f"the child said nothing within {timeout_s} s; {[str(e) for e in ended]}")
        return end.recv()

    return wait


@pytest.fixture
def client(server, connect):
    """A client of the module's `server`, whose tables are emptied first."""
    client = connect(server)
    for name in client.tables:
        client.clear(name)
    return client
