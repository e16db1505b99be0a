"""One server and its crew under faults: starts, harms and replaces them, watches that nobody hangs, and audits."""

import contextlib
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import rl_buffer as rb
from rl_buffer.launch import ProcessGroup
from scripts.soaking import audit, rows
from scripts.soaking.clients import REPLAY_TABLES, ROLLOUTS, die_at, run_client
from scripts.soaking.faults import Fault
from scripts.soaking.rest import compare_at_rest, drain_fragments
from scripts.soaking.scoreboard import COMMANDS, KINDS, Scoreboard

TABLES = {
    "fresh": rb.ReplayTable(rows.SPEC, capacity=2_000, headroom=1_200, sampler=rb.Prioritized(), gamma=rows.GAMMA),
    "ratio": rb.ReplayTable(
        rows.SPEC,
        capacity=1_500,
        headroom=1_000,
        n_step=3,
        gamma=rows.GAMMA,
        rate_limiter=rb.SampleToInsertRatio(4.0, min_size_to_sample=500, error_buffer=4_000.0),
    ),
    ROLLOUTS: rb.RolloutTable(rows.ROLLOUT_SPEC, num_steps=8, num_envs=2, num_fragments=12),
}
# Place in the crew -> (role, options).
CREW: dict[str, tuple[str, dict[str, Any]]] = {
    "writer-0": ("writer", {"table": "fresh", "num_envs": 1, "chunk_size": 1}),
    "writer-1": ("writer", {"table": "fresh", "num_envs": 3, "chunk_size": 30}),
    "writer-2": ("writer", {"table": "ratio", "num_envs": 1, "chunk_size": 16}),
    "writer-3": ("writer", {"table": "ratio", "num_envs": 4, "chunk_size": 64}),
    "learner-0": ("learner", {"table": "fresh", "batch_size": 64, "prefetch": 4}),
    "learner-1": ("learner", {"table": "fresh", "batch_size": 256, "prefetch": 16, "pause_s": 0.2}),  # slow
    "learner-2": ("learner", {"table": "ratio", "batch_size": 128, "prefetch": 0}),
    "rollouts-in-0": ("rollout_writer", {}),
    "rollouts-in-1": ("rollout_writer", {}),
    "rollouts-out-0": ("rollout_reader", {}),
    "rollouts-out-1": ("rollout_reader", {}),
    "publisher": ("publisher", {}),
    "follower": ("follower", {}),
    "vandal": ("vandal", {}),
}
_INSERTING = ("writer", "rollout_writer", "publisher")  # these stop first, while the others take what they sent
_FREE_WITHIN_S = 5.0  # after a client's end; the tests ask for one second, on a machine that does less else
_TICK_S = 0.05
_AUDIT_EVERY_S = 1.0
_PARAMETER_DESCRIPTORS = 4  # of the set that is published: two segments, whose mappings have descriptors of their own
_MAX_MEMORY_GROWTH_NBYTES = 64 << 20


@dataclass
class Place:
    """A client's place in the crew, and who has it now."""

    name: str
    role: str
    options: dict[str, Any]
    number: int = -1  # slot on the scoreboard, and the process's name
    pid: int = -1
    quiet_until_s: float = 0.0  # stopped, or told to do nothing
    stopped: bool = False


@dataclass
class Totals:
    """What a run came to."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: "Totals") -> None:
        """Sum up."""
        self.counts += other.counts
        self.faults += other.faults
        self.problems += other.problems


class Coordinator:
    """One run: `run` does everything and returns the totals; Ctrl-C only makes it shorter."""

    was_interrupted = False

    def __init__(
        self, faults: list[Fault], *, duration_s: float, hang_s: float, warm: bool, say: Callable[[str], None]
    ) -> None:
        """Prepare.

        Args:
            faults: in order.
            duration_s: until everybody is told to stop.
            hang_s: a client without success for so long hangs, unless it or the server was stopped meanwhile.
            warm: the tables are in a directory, from which the next server goes on.
            say: prints a line.
        """
        self._faults = list(faults)
        self._duration_s, self._hang_s = duration_s, hang_s
        self._warm = warm
        self._say = say
        self._totals = Totals()
        self._places = {name: Place(name, role, options) for name, (role, options) in CREW.items()}
        self._next_number = 0
        self._dead: dict[int, float] = {}  # numbers of clients that did not end in order, and when
        self._gone: dict[int, float] = {}  # their process ids, until the server has forgotten them
        self._server_started_s = 0.0
        self._ending = False

    def run(self) -> Totals:
        """Start everything, let it run, end it, and look at what is left."""
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
            (directory / "board").mkdir()
            self._directory, self._board = directory, Scoreboard(directory / "board")
            self._audits = {
                name: audit.TableAudit(self._board, name, TABLES[name].capacity, TABLES[name].n_step)
                for name in REPLAY_TABLES
            }
            self._crew = stack.enter_context(
                ProcessGroup(preload=["scripts.soaking.clients", "rl_buffer.sampler", "rl_buffer.rollout_writer"])
            )
            self._server = self._new_server()
            stack.callback(lambda: self._server.stop())
            self._server.start()
            self._server_started_s = time.monotonic()
            self._say(f"server at {self._server.address}")
            self._client = stack.enter_context(rb.connect(self._server.address, 30.0, name="coordinator"))
            self._descriptors, self._memory_nbytes = self._usage()
            for place in self._places.values():
                self._start(place)
            try:
                self._let_it_run()
            except KeyboardInterrupt:
                self.was_interrupted = True
                if self._server.pid is not None:  # perhaps it was just made to stand still
                    _signal(self._server.pid, signal.SIGCONT)
            self._end()
            self._final_audit()
            self._totals.problems = self._board.problems()
        return self._totals

    # ---- running -------------------------------------------------------------------------------------------

    def _let_it_run(self) -> None:
        self._wait_for_everybody()
        started_s = time.monotonic()
        next_audit_s = started_s + _AUDIT_EVERY_S
        # On a busy machine all faults happen too, only later.
        while (now_s := time.monotonic()) < started_s + self._duration_s or self._faults:
            if self._faults and now_s - started_s >= self._faults[0].at_s:
                self._inject(self._faults.pop(0))
            if now_s >= next_audit_s:
                with contextlib.suppress(rb.ServerLost, rb.DeadlineExceeded):
                    self._audit()
                next_audit_s = time.monotonic() + _AUDIT_EVERY_S
            self._tend()
            time.sleep(_TICK_S)

    def _wait_for_everybody(self) -> None:
        """Starting takes a busy machine long, and is not what this is about."""
        started_ns, deadline_s = time.monotonic_ns(), time.monotonic() + self._hang_s
        while any(self._board.slot(place.number)["beat_ns"] < started_ns for place in self._places.values()):
            if time.monotonic() > deadline_s:
                break  # the watchdog will say who it is
            time.sleep(_TICK_S)

    def _tend(self) -> None:
        """Wake who is to go on, replace who has ended, restart the server, and look for who hangs."""
        now_s = time.monotonic()
        if not self._server.is_alive():
            self._restart_server()
        for place in self._places.values():
            if place.stopped and now_s >= place.quiet_until_s:
                _signal(place.pid, signal.SIGCONT)
                place.stopped = False
        self._reap()
        for place in self._places.values():
            beat_s = int(self._board.slot(place.number)["beat_ns"]) / 1e9
            if place.pid > 0 and now_s - max(beat_s, place.quiet_until_s, self._server_started_s) > self._hang_s:
                self._board.report(
                    "hung", f"{place.name} (number {place.number}) for {self._hang_s:.0f} s; {self._waits()}"
                )
                _signal(place.pid, signal.SIGUSR1)  # it writes its stack to standard error
                time.sleep(0.5)
                _signal(place.pid, signal.SIGKILL)

    def _reap(self) -> None:
        by_number = {str(place.number): place for place in self._places.values()}
        for ended in self._crew.reap():
            place = by_number[ended.name]
            place.pid, place.stopped = -1, False
            in_order = COMMANDS[self._board.slot(place.number)["command"]] == "stop" and ended.exit_code == 0
            if not in_order:
                self._dead[place.number] = self._gone[ended.pid] = time.monotonic()
            if ended.exit_code > 0:
                self._board.report("failed", f"{place.name}: {ended}".replace("\n", " | "))
            if not self._ending:
                self._start(place)

    def _start(self, place: Place, failpoint: str = "") -> None:
        place.number = self._take_number()
        place.quiet_until_s = time.monotonic()
        place.pid = self._crew.start(
            str(place.number),
            run_client,
            place.role,
            self._server.address,
            str(self._board.directory),
            place.number,
            place.options,
            failpoint,
        )

    def _waits(self) -> str:
        with contextlib.suppress(rb.RLBufferError):
            tables = self._client.info()["tables"]
            return "; ".join(f"{name}: {table['waits']}" for name, table in tables.items())
        return "the server does not answer"

    # ---- faults --------------------------------------------------------------------------------------------

    def _inject(self, fault: Fault) -> None:
        self._totals.faults[fault.kind] += 1
        if fault.kind in ("kill_server", "second_server", "checkpoint"):
            {"kill_server": self._kill_server, "second_server": self._second_server, "checkpoint": self._checkpoint}[
                fault.kind
            ](fault)
            return
        place = self._places[fault.victim]
        if place.pid < 0:
            return
        if fault.kind == "kill":
            _signal(place.pid, signal.SIGKILL)
        elif fault.kind == "stop":
            _signal(place.pid, signal.SIGSTOP)
            place.stopped, place.quiet_until_s = True, time.monotonic() + fault.seconds
        elif fault.kind == "die_at" and fault.at_birth:
            _signal(place.pid, signal.SIGKILL)
            self._wait_for_end(place)
            self._start(place, fault.failpoint)
        elif fault.kind == "die_at":
            name, _, count = fault.failpoint.partition(":")
            self._command(place, "die_at", die_at(name, int(count)))
        else:
            command = {"close": "close_and_write"}.get(fault.kind, fault.kind)
            place.quiet_until_s = time.monotonic() + fault.seconds
            self._command(place, command, int(fault.seconds * 1000))

    def _command(self, place: Place, command: str, argument: int = 0) -> None:
        slot = self._board.slot(place.number)
        slot["argument"] = argument
        slot["command"] = COMMANDS.index(command)

    def _wait_for_end(self, place: Place) -> None:
        """Of a client that was killed; whoever else has ended meanwhile is replaced."""
        number, ending, self._ending = place.number, self._ending, True
        while str(number) in self._crew.pids:
            self._reap()
            time.sleep(0.001)
        self._ending = ending
        for other in self._places.values():
            if other.pid < 0 and other is not place and not ending:
                self._start(other)

    def _kill_server(self, fault: Fault) -> None:
        if self._server.is_alive() and self._server.pid is not None:
            os.kill(self._server.pid, signal.SIGKILL)
        self._restart_server(fault.failpoint)

    def _restart_server(self, failpoint: str = "") -> None:
        self._server.stop()
        self._totals.counts["servers killed"] += 1
        self._board.next_epoch()
        for table_audit in self._audits.values():
            if not self._warm:
                table_audit.server_is_new()
        while not self._server.is_alive():
            with _failpoint(failpoint), contextlib.suppress(rb.ServerLost):  # killed while it starts
                self._server.start()
            failpoint = ""
        with contextlib.suppress(rb.ServerLost, rb.DeadlineExceeded):
            self._client.reconnect(10.0)
        self._gone.clear()
        self._server_started_s = time.monotonic()

    def _second_server(self, _: Fault) -> None:
        second = rb.BufferServer(TABLES, self._server.address)
        try:
            second.start()
        except rb.AddressInUse:
            return
        except rb.ServerLost:  # the first was just killed
            return
        second.stop()
        if self._server.is_alive():
            self._board.report("failed", "a second server took the address of the first")

    def _checkpoint(self, _: Fault) -> None:
        """Save under load, restore elsewhere, and compare what is there with what was acknowledged before."""
        slots, path = np.array(self._board.slots), self._directory / "checkpoint"
        try:
            self._client.checkpoint(path, timeout_s=60.0)
        except (rb.ServerLost, rb.DeadlineExceeded):
            return
        with rb.BufferServer(TABLES, restore=path) as restored, rb.connect(restored.address) as client:
            info = client.info()["tables"]
            for name, table_audit in self._audits.items():
                leaves = audit.committed(client, name)
                table_audit.compare(leaves, slots, info[name]["inserts"], all_epochs=self._warm)
            self._totals.counts["checkpoints restored"] += 1

    # ---- audits --------------------------------------------------------------------------------------------

    def _audit(self) -> None:
        """Look at all replay tables at one moment, and whether the dead are forgotten."""
        asked_s = time.monotonic()
        info = self._client.info()
        for name, table_audit in self._audits.items():
            table_audit.note_inserts(int(asked_s * 1e9), info["tables"][name]["inserts"])
        slots = np.array(self._board.slots)
        assert self._server.pid is not None
        with audit.standing_still(self._server.pid) as is_alive:
            if not is_alive:
                return
            leaves = {name: audit.committed(self._client, name) for name in self._audits}
        info = self._client.info()
        for name, table_audit in self._audits.items():
            table_audit.compare(leaves[name], slots, info["tables"][name]["inserts"], all_epochs=self._warm)
        self._totals.counts["audits"] += 1
        self._totals.counts["rows audited"] += sum(len(table["rewards"]) for table in leaves.values())
        there = {session["pid"] for session in info["clients"]}
        for pid, ended_s in list(self._gone.items()):
            if pid not in there:
                del self._gone[pid]
            elif asked_s - ended_s > _FREE_WITHIN_S:
                self._board.report("leaked", f"pid {pid} ended {asked_s - ended_s:.1f} s ago and is still attached")
                del self._gone[pid]

    def progress(self) -> str:
        """One line."""
        counts = self._counts()
        return ", ".join(f"{counts[name]:,} {name}" for name in ("acknowledged", "verified", "reconnects", "clients"))

    def _counts(self) -> Counter[str]:
        slots = self._board.slots[: self._next_number]
        counts: Counter[str] = Counter(clients=self._next_number)
        for name in ("sent", "acknowledged", "sampled", "verified", "overtaken", "deadlines", "reconnects"):
            counts[name] = int(slots[name][slots["kind"] != KINDS.index("vandal")].sum())
        return counts

    # ---- the end -------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """Wake everybody, and stop them in order, writers first."""
        self._ending = True
        for place in self._places.values():
            if place.stopped:
                _signal(place.pid, signal.SIGCONT)
                place.stopped = False
        if not self._server.is_alive():
            self._restart_server()
        for inserting in (True, False):
            ending = [place for place in self._places.values() if (place.role in _INSERTING) == inserting]
            for place in ending:
                self._command(place, "stop")
            deadline_s = time.monotonic() + self._hang_s
            while any(place.pid > 0 for place in ending):
                if not self._server.is_alive():  # at a failpoint
                    self._restart_server()
                self._reap()
                time.sleep(_TICK_S)
                for place in ending:
                    if place.pid > 0 and time.monotonic() > deadline_s:
                        self._board.report(
                            "hung", f"{place.name} did not stop within {self._hang_s} s; {self._waits()}"
                        )
                        _signal(place.pid, signal.SIGUSR1)
                        time.sleep(0.5)
                        _signal(place.pid, signal.SIGKILL)

    def _final_audit(self) -> None:
        """Nothing is held by anybody any more, and all counts are exact."""
        self._client.reconnect(30.0)
        drain_fragments(self._client, self._server.address, self._board, self._take_number())
        self._audit()
        info = compare_at_rest(self._client, self._board, self._dead, all_epochs=self._warm)
        self._totals.counts["stale"] += sum(table.get("stale_updates", 0) for table in info["tables"].values())
        self._totals.counts["episodes"] += int(self._client.stats().get("train/num_episodes", 0))
        self._compare_usage()
        self._totals.counts += self._counts()

    def _compare_usage(self) -> None:
        """Descriptors and memory of the server, and of the first one, with one client attached then and now."""
        deadline_s, most = time.monotonic() + _FREE_WITHIN_S, self._descriptors + _PARAMETER_DESCRIPTORS
        while (usage := self._usage())[0] > most and time.monotonic() < deadline_s:
            time.sleep(_TICK_S)  # zmq closes sockets in a thread of its own
        descriptors, memory_nbytes = usage
        self._say(
            f"server: {self._descriptors} descriptors and {self._memory_nbytes / 2**20:.0f} MiB at its start, "
            f"{descriptors} and {memory_nbytes / 2**20:.0f} MiB at its end"
        )
        if descriptors > most:
            self._board.report("leaked", f"{descriptors - self._descriptors} descriptors of the server")
        if memory_nbytes > self._memory_nbytes + _MAX_MEMORY_GROWTH_NBYTES:
            self._board.report("leaked", f"{(memory_nbytes - self._memory_nbytes) / 2**20:.0f} MiB of the server")

    def _take_number(self) -> int:
        self._next_number += 1
        return self._next_number - 1

    def _new_server(self) -> rb.BufferServer:
        address = f"ipc://{self._directory}/server"
        options = {"directory": self._directory / "tables"} if self._warm else {}
        return rb.BufferServer(TABLES, address, stats_window=1_000, **options)

    def _usage(self) -> tuple[int, int]:
        """(descriptors, resident bytes) of the server."""
        self._client.info()  # its channel is open then
        process = Path(f"/proc/{self._server.pid}")
        resident = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return len(os.listdir(process / "fd")), resident


def _signal(pid: int, number: signal.Signals) -> None:
    """Of a client that may have ended and is not reaped here: the forkserver is its parent."""
    assert pid > 0, "0 and below mean groups of processes"
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


@contextlib.contextmanager
def _failpoint(failpoint: str) -> Iterator[None]:
    """A server that is started inside the block dies there."""
    if failpoint:
        os.environ["RL_BUFFER_FAILPOINT"] = failpoint
    try:
        yield
    finally:
        os.environ.pop("RL_BUFFER_FAILPOINT", None)
