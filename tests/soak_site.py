"""A server with clients of scripts/soak.py around it that run all the time, and look at every row that they get."""

import contextlib
import os
import signal
import time

import rl_buffer as rb
from rl_buffer.launch import ProcessGroup
from scripts.soaking import audit, rows
from scripts.soaking.clients import ROLLOUTS, run_client
from scripts.soaking.scoreboard import COMMANDS, Scoreboard

DEADLINE_S = 60.0  # for what should take milliseconds: only a hang reaches it
CAPACITY, CHUNK_SIZE = 300, 8
TABLES = {
    "fresh": rb.ReplayTable(rows.SPEC, CAPACITY, headroom=200, sampler=rb.Prioritized(), gamma=rows.GAMMA, seed=0),
    ROLLOUTS: rb.RolloutTable(rows.ROLLOUT_SPEC, num_steps=4, num_envs=2, num_fragments=8),
}
WRITER = ("writer", {"table": "fresh", "num_envs": 1, "chunk_size": CHUNK_SIZE})
LEARNER = ("learner", {"table": "fresh", "batch_size": 32, "prefetch": 2})
VICTIMS = {
    "attach": WRITER,
    "client": WRITER,
    "writer": WRITER,
    "sampler": LEARNER,
    "rollout_writer": ("rollout_writer", {}),
    "rollout_reader": ("rollout_reader", {}),
    "publisher": ("publisher", {}),
    "parameters": ("follower", {}),
}
EVERYBODY = list(dict(VICTIMS.values()).items())
ONCE = ("attach.", "client.", ".opened", ".mapped", ".closing")  # failpoints that come once in such a client's life
PRELOAD = (
    "pytest",
    "rl_buffer.server_loop",
    "scripts.soaking.clients",
    "rl_buffer.sampler",
    "rl_buffer.rollout_writer",
)
INSERTING = ("writer", "rollout_writer", "publisher")


def eventually(predicate, timeout_s=DEADLINE_S):
    deadline_s = time.monotonic() + timeout_s
    while not (value := predicate()):
        assert time.monotonic() < deadline_s, f"did not come true within {timeout_s} s"
        time.sleep(0.002)
    return value


class Children(ProcessGroup):
    """A group that remembers how its children ended."""

    def __init__(self, preload):
        super().__init__(preload)
        self._exit_codes = {}

    def exit_code_of(self, name):
        """None while it runs."""
        self._exit_codes |= {ended.name: ended.exit_code for ended in self.reap()}
        return self._exit_codes.get(name)


class Site:
    """A server, and a client of each kind that runs all the time: a bystander."""

    def __init__(self, board, server, group, client):
        self.server, self.board, self.client, self._group = server, Scoreboard(board), client, group
        self.audit = audit.TableAudit(self.board, "fresh", CAPACITY, 1)
        self._number = 0
        self.bystanders, pids = {}, set()
        for role, options in EVERYBODY:
            more = {"pause_s": 0.003} | ({"num_envs": 8} if role == "writer" else {})
            self.bystanders[role], pid = self.start(role, options | more)
            pids.add(pid)
        # One whose server is killed while it connects would leave for good.
        eventually(lambda: pids <= {client["pid"] for client in self.client.info()["clients"]})

    def start(self, role, options, failpoint="", command="none"):
        """(number, pid) of another client."""
        number, self._number = self._number, self._number + 1
        self.command(number, command)
        arguments = (role, self.server.address, str(self.board.directory), number, options, failpoint)
        return number, self._group.start(self._name(number), run_client, *arguments)

    def command(self, number, command):
        self.board.slot(number)["command"] = COMMANDS.index(command)

    def exit_code_of(self, number):
        eventually(lambda: self._group.exit_code_of(self._name(number)) is not None)
        return self._group.exit_code_of(self._name(number))

    def _name(self, number):
        return f"{self.server.address} {number}"

    def wait_for_success(self, numbers, since_ns=None):
        """Until each of these clients has done something that went well."""
        since_ns = time.monotonic_ns() if since_ns is None else since_ns
        for number in numbers:
            eventually(lambda number=number: self.board.slot(number)["beat_ns"] > since_ns)

    def look(self, *, all_epochs=True):
        """Writer -> [low, high) in the table at one moment. Whatever is wrong with it is in `board.problems()`."""
        self.audit.note_inserts(time.monotonic_ns(), self.client.info()["tables"]["fresh"]["inserts"])
        slots = self.audit.acknowledged()
        with audit.standing_still(self.server.pid):
            leaves = audit.committed(self.client, "fresh")
        self.audit.compare(leaves, slots, self.client.info()["tables"]["fresh"]["inserts"], all_epochs=all_epochs)
        return audit.ranges(self.board, "fresh", leaves)

    def replace_server(self):
        """SIGKILL, and the next one at the same address."""
        os.kill(self.server.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.server.pid, os.WEXITED | os.WNOWAIT)
        self.board.next_epoch()
        self.audit.server_is_new()
        self.server.start()
        self.client.reconnect(DEADLINE_S)

    def stop(self):
        """Let the bystanders leave."""
        for number in self.bystanders.values():
            self.command(number, "stop")
        for number in self.bystanders.values():
            assert self.exit_code_of(number) == 0


@contextlib.contextmanager
def open_site(board, group, **server_options):
    """A site; what goes wrong with the bystanders is seen at its end."""
    with (
        rb.BufferServer(TABLES, **server_options) as server,
        rb.connect(server.address, DEADLINE_S, name="site") as client,
    ):
        site = Site(board, server, group, client)
        yield site
        site.stop()
