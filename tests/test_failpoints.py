"""SIGKILL at every step of the protocol, once soon and once later: nobody else is harmed, and nothing is left behind.

The clients are those of scripts/soak.py, which look at every row that they get.
"""

import ast
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from soak_site import (
    CAPACITY,
    CHUNK_SIZE,
    DEADLINE_S,
    EVERYBODY,
    INSERTING,
    ONCE,
    PRELOAD,
    TABLES,
    VICTIMS,
    Children,
    eventually,
    open_site,
)

import rl_buffer as rb
from rl_buffer import failpoints, messages
from rl_buffer.failpoints import FAILPOINTS
from rl_buffer.tables import StatsConfig
from scripts.soaking import audit
from scripts.soaking.clients import ROLES
from scripts.soaking.rest import compare_at_rest, drain_fragments
from scripts.soaking.scoreboard import COMMANDS, Scoreboard

pytestmark = pytest.mark.timeout(120)

AT_ONCE_S = 15.0  # on a busy machine; the calls' own deadlines are longer
FREE_WITHIN_S = 1.0
BEFORE_THE_COMMIT = ("writer.reserving", "writer.reserved", "writer.half_written", "writer.written")
AT_THE_START = ("locked", "allocated", "recovering", "resumed", "completing", "bound")
IN_A_DIRECTORY = ("recovering", "resumed", "completing", "noted", "armed", "half_carried_out", "carried_out")


@pytest.fixture(scope="module")
def group():
    with Children(PRELOAD) as group:
        yield group


@pytest.fixture(scope="module")
def site(tmp_path_factory, group):
    with open_site(tmp_path_factory.mktemp("board"), group) as site:
        yield site


# ---- the failpoints themselves -----------------------------------------------------------------------------------


def test_every_failpoint_is_somewhere_and_every_place_has_one():
    there = set()
    for path in Path(failpoints.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "reached":
                there |= {inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant) and inner.value}
    assert there - {None} == set(FAILPOINTS)
    assert len(set(FAILPOINTS)) == len(FAILPOINTS)


@pytest.mark.parametrize(
    ("variable", "printed", "returncode"),
    [
        ("writer.written", "", -signal.SIGKILL),
        ("writer.written:3", "0 1 ", -signal.SIGKILL),
        ("writer.reserved", "0 1 2 3 ", 0),
        ("", "0 1 2 3 ", 0),
    ],
)
def test_a_process_dies_at_the_failpoint_that_it_was_started_with_and_at_that_time(variable, printed, returncode):
    program = (
        "from rl_buffer.failpoints import reached\n"
        "for i in range(4): reached('writer.written'); print(i, end=' ', flush=True)"
    )
    environment = os.environ | {"RL_BUFFER_FAILPOINT": variable}
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert (ended.stdout, ended.returncode) == (printed, returncode), ended.stderr


@pytest.mark.parametrize(
    "failpoint",
    [
        "writer.writen",
        "writer.written:",
        "writer.written:0",
        "writer.written:x",
        "writer.written:-1",
        "writer.written:1:SIGSEGV",
        "writer.written:1:SIGSTOP:",
        ":3",
    ],
)
def test_a_failpoint_that_does_not_exist_is_refused(failpoint):
    with pytest.raises(rb.InvalidInput, match=f"no failpoint '{failpoint}'; expected NAME:COUNT:SIGNAL"):
        failpoints.arm(failpoint)


# ---- clients -----------------------------------------------------------------------------------------------------


def passages(names):
    """Each failpoint twice where it comes more than once."""
    return [f"{name}{time}" for name in names for time in ("", ":7") if not time or not any(p in name for p in ONCE)]


@pytest.mark.parametrize("failpoint", passages(name for name in FAILPOINTS if name.partition(".")[0] in VICTIMS))
def test_a_client_that_is_killed_anywhere_harms_nobody_and_leaves_nothing(site, failpoint):
    name = failpoint.partition(":")[0]
    role, options = VICTIMS[name.partition(".")[0]]
    number, pid = site.start(role, options, failpoint, command="stop" if name == "writer.closing" else "none")
    assert site.exit_code_of(number) == -signal.SIGKILL
    ended_ns = time.monotonic_ns()

    def is_forgotten():
        info = site.client.info()
        held = sum(session["reserved_rows"] for session in info["clients"])
        assert held == sum(table["reserved_rows"] for table in info["tables"].values())
        return pid not in [session["pid"] for session in info["clients"]]

    eventually(is_forgotten, FREE_WITHIN_S)
    held, slot = site.look(), site.board.slot(number)
    if role == "writer":
        # Of the chunk that was being written nothing is there, unless its commit was sent. It may be more than
        # CHUNK_SIZE: where rows came late it has the steps that were added meanwhile.
        high = held.get(number, (0, 0))[1]
        assert high <= slot["sent"] - (CHUNK_SIZE if name in BEFORE_THE_COMMIT else 0)
        assert failpoint not in BEFORE_THE_COMMIT or high == 0
    site.wait_for_success(site.bystanders.values(), since_ns=ended_ns)
    assert site.board.problems() == []


# ---- the server --------------------------------------------------------------------------------------------------


def serve(config, failpoint, pipe):
    """Serve until killed. The process was forked from one that has everything imported, and so is there in 0.1 s."""
    from rl_buffer.server_loop import ServerLoop

    failpoints.arm(failpoint)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), ServerLoop(config) as loop:
        pipe.send("ready")
        loop.run(())


class Caller(threading.Thread):
    """A client of the soak: works until a call raises, and when told to, goes on with the next server."""

    def __init__(self, role, *arguments, **options):
        super().__init__(daemon=True, name=role)
        self._make = lambda: ROLES[role](*arguments, **options)
        self.client, self.error = None, None
        self.has_lost_it, self.goes_on = threading.Event(), threading.Event()

    def run(self):
        try:
            self.client = self._make()
            self.client.work()
        except rb.RLBufferError as error:
            self.error = error
            self.has_lost_it.set()
            self.goes_on.wait(DEADLINE_S)
            self.client = self.client or self._make()
            self.client.run()


class Address:
    """One address, the servers that come and go there, and their clients as threads of this process."""

    def __init__(self, directory, group, pipe, *, warm):
        (directory / "board").mkdir()
        self.board, self.warm, self._group, self._pipe = Scoreboard(directory / "board"), warm, group, pipe
        self.address = f"ipc://{directory}/server"
        tables = str(directory / "tables") if warm else None
        self._config = messages.ServerConfig(self.address, TABLES, StatsConfig(), 0, directory=tables)
        self.callers = [
            Caller(role, self.address, str(self.board.directory), number, pause_s=0.002, **options)
            for number, (role, options) in enumerate(EVERYBODY)
        ]

    def start_server(self, failpoint=""):
        """Whether it is there; at a failpoint it may have died."""
        self.board.next_epoch()
        here, there = self._pipe()
        self._name = f"{self.address} {self.board.epoch}"
        self.pid = self._group.start(self._name, serve, self._config, failpoint, there)
        eventually(lambda: here.poll() or self.has_ended())
        return not self.has_ended()

    def has_ended(self):
        exit_code = self._group.exit_code_of(self._name)
        assert exit_code in (None, -signal.SIGKILL)
        return exit_code is not None

    def kill_server(self):
        os.kill(self.pid, signal.SIGKILL)
        eventually(self.has_ended)

    def visit(self):
        """Come and go, which callers do not do, until the server has ended."""
        while not self.has_ended():
            with contextlib.suppress(rb.ServerLost, rb.DeadlineExceeded), rb.connect(self.address, 0.1):
                pass

    def has_everybody_succeeded_since(self, moment_ns):
        """Nobody is only about to connect: killed then, its server would leave rows to this process, which lives on."""
        return all(
            caller.client is not None and self.board.slot(number)["beat_ns"] > moment_ns
            for number, caller in enumerate(self.callers)
        )

    def stop_callers(self):
        """Those who insert first, while the others take what they sent."""
        for inserting in (True, False):
            leaving = [n for n, caller in enumerate(self.callers) if (caller.name in INSERTING) == inserting]
            for number in leaving:
                self.board.slot(number)["command"] = COMMANDS.index("stop")
            for number in leaving:
                self.callers[number].join(DEADLINE_S)
                assert not self.callers[number].is_alive()

    def look(self):
        """Report what is not there although it was acknowledged, and what is left of anybody."""
        with rb.connect(self.address, DEADLINE_S) as client:
            drain_fragments(client, self.address, self.board, len(self.callers))
            table_audit, leaves = audit.TableAudit(self.board, "fresh", CAPACITY, 1), audit.committed(client, "fresh")
            num_inserts = client.info()["tables"]["fresh"]["inserts"]
            table_audit.compare(leaves, table_audit.acknowledged(), num_inserts, all_epochs=self.warm)
            compare_at_rest(client, self.board, {}, all_epochs=self.warm)


def server_cases():
    """(in a directory?, failpoint): sooner in a directory and later in memory, where that has it."""
    for name in FAILPOINTS:
        step = name.partition(".")[2]
        if not name.startswith("server."):
            continue
        yield True, name
        if step in AT_THE_START:
            yield from [] if step in IN_A_DIRECTORY else [(False, name)]
        else:
            yield step in IN_A_DIRECTORY, f"{name}:4"


@pytest.mark.parametrize(
    ("warm", "failpoint"), list(server_cases()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_server_that_is_killed_anywhere_is_lost_to_all_and_the_next_one_goes_on(
    tmp_path, group, pipe, warm, failpoint
):
    address = Address(tmp_path, group, pipe, warm=warm)
    starts = failpoint.partition(".")[2] in AT_THE_START
    if failpoint == "server.completing":  # of a directory that is new
        assert not address.start_server(failpoint)
    assert address.start_server("" if starts else failpoint)
    for caller in address.callers:
        caller.start()
    if starts:
        eventually(lambda: address.has_everybody_succeeded_since(time.monotonic_ns() - 10**9))
        address.kill_server()
    else:
        address.visit()
    # Who was not in yet goes on looking for a server; everybody else hears of its end at once.
    for caller in address.callers:
        assert caller.client is None or caller.has_lost_it.wait(AT_ONCE_S)
        assert caller.error is None or type(caller.error) is rb.ServerLost
    if starts and failpoint != "server.completing":
        assert not address.start_server(failpoint)
    assert address.start_server()
    started_ns = time.monotonic_ns()
    for caller in address.callers:
        caller.goes_on.set()
    eventually(lambda: address.has_everybody_succeeded_since(started_ns))
    address.stop_callers()
    address.look()
    address.kill_server()
    assert address.board.problems() == []
