"""The clients of the soak: each runs in a process of its own, checks everything it gets, and obeys commands.

A client goes on until it is told to stop or killed. When the server is gone it waits for the next one at the address.
"""

import faulthandler
import os
import signal
import socket
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zmq

import rl_buffer as rb
from rl_buffer import failpoints
from rl_buffer.address import Address
from scripts.soaking import rows
from scripts.soaking.audit import check_transitions
from scripts.soaking.scoreboard import COMMANDS, KINDS, Scoreboard, Take, beat

CALL_TIMEOUT_S = 5.0
WAIT_S = 0.2  # for what others may not have done yet; then a look whether to stop
RECONNECT_TIMEOUT_S = 30.0
REPLAY_TABLES = ("fresh", "ratio")
ROLLOUTS = "rollouts"
POLICY = "policy"
_POLICY_SIZE = 50_000  # numbers in each of three arrays: copying them takes a while
_COUNTS_PER_FAILPOINT = 1_000  # the argument of "die_at" is index * this + count


def die_at(name: str, count: int) -> int:
    """The argument of the command "die_at"."""
    return failpoints.FAILPOINTS.index(name) * _COUNTS_PER_FAILPOINT + count


class SoakClient(ABC):
    """One client process. `step` does a little work, `leave` ends it in order."""

    kind: str

    def __init__(
        self, address: str, directory: str, number: int, *, num_envs: int = 1, pause_s: float = 0.0, **options: Any
    ) -> None:
        """Connect and `open` with the options; `pause_s` after each step makes a slow client."""
        faulthandler.register(signal.SIGUSR1)  # where does it hang?
        self.address, self.number, self.num_envs, self._pause_s = address, number, num_envs, pause_s
        self.board = Scoreboard(directory)
        self.slot = self.board.slot(number)
        self.slot["kind"], self.slot["num_envs"] = KINDS.index(self.kind), num_envs
        beat(self.slot)
        self.rng = np.random.default_rng(number)
        epoch = self.slot["epoch"] = self.board.epoch
        self.client = rb.connect(address, RECONNECT_TIMEOUT_S, name=f"{self.kind}-{number}")
        self.client.timeout_s = CALL_TIMEOUT_S
        try:
            if epoch != self.board.epoch:
                self.come_back()
            self._open(options)
        except BaseException:
            self.client.close()
            raise

    @abstractmethod
    def open(self, **options: Any) -> None:
        """Open what the client works with."""

    @abstractmethod
    def step(self) -> None:
        """Do a little work; whatever it raises of rl_buffer, the next call goes on."""

    def leave(self) -> None:  # noqa: B027
        """Close what was opened."""

    def server_is_new(self) -> None:  # noqa: B027
        """It is another one than before."""

    def _open(self, options: dict[str, Any]) -> None:
        while True:
            try:
                self.open(**options)
            except rb.ServerLost:
                self.come_back()
            else:
                return

    def run(self) -> None:
        """Until told to stop, with whichever server there is."""
        is_lost = False
        while True:
            try:
                if is_lost:
                    self.come_back()
                    is_lost = False
                self.work()
            except rb.DeadlineExceeded:  # nobody is at the address yet
                self.slot["deadlines"] += 1
            except rb.ServerLost:
                is_lost = True
            else:
                return

    def work(self) -> None:
        """Until told to stop; raises ServerLost."""
        while self._obey():
            try:
                self.step()
                time.sleep(self._pause_s)
            except rb.DeadlineExceeded:
                self.slot["deadlines"] += 1
        self.leave()
        self.client.close()

    def come_back(self) -> None:
        """Be a client of the server that is at the address now, and know which one that is."""
        while True:
            epoch = self.board.epoch
            if self.client.reconnect(RECONNECT_TIMEOUT_S):
                self.slot["reconnects"] += 1
            if epoch == self.board.epoch:  # else it was killed meanwhile, and which one answered is not known
                break
        if self.slot["epoch"] != epoch:
            self.server_is_new()
            self.slot["base"] = self.slot["acknowledged"]
            self.slot["epoch"] = epoch
        beat(self.slot)

    def _obey(self) -> bool:
        """Do what the coordinator says; False: stop."""
        command, argument = COMMANDS[self.slot["command"]], int(self.slot["argument"])
        if command == "none":
            return True
        if command == "stop":
            return False
        self.slot["command"] = 0
        if command == "die_at":
            index, count = divmod(argument, _COUNTS_PER_FAILPOINT)
            failpoints.arm(f"{failpoints.FAILPOINTS[index]}:{count}")
        elif command == "stall":
            time.sleep(argument / 1000)
        elif command == "fork":
            self._fork()
        elif command == "close_and_write":
            self.client.close()
            self.write_on(time.monotonic() + argument / 1000)
            os._exit(0)
        return True

    def write_on(self, until_s: float) -> None:  # noqa: B027
        """The sockets are closed; misuse what is still mapped."""

    def _fork(self) -> None:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                self.step()
            except rb.ForkedClient:
                code = 0
            finally:
                os._exit(code)
        if os.waitpid(pid, 0)[1] != 0:
            self.board.report("failed", f"{self.kind}-{self.number}: a forked child could use the client")


class _WritingClient(SoakClient):
    """Notes how many rows or fragments it may have sent, and how many the server has acknowledged."""

    writer: rb.ReplayWriter | rb.RolloutWriter | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._moments: deque[tuple[int, int]] = deque()  # (places below this were sent, not before this moment in ns)
        super().__init__(*arguments, **options)

    def note_sent(self, num_sent: int) -> None:
        """Before a call that may send so many, all together."""
        self._moments.append((num_sent, time.monotonic_ns()))
        self.slot["sent"] = num_sent

    def note_acknowledged(self) -> None:
        """After a call that may have heard of acknowledgements."""
        num_acknowledged = self.writer.num_acknowledged if self.writer else 0
        if num_acknowledged != self.slot["acknowledged"]:
            while self._moments and self._moments[0][0] <= num_acknowledged:
                self.slot["published_ns"] = self._moments.popleft()[1]
            self.slot["acknowledged"] = num_acknowledged
            beat(self.slot)

    def server_is_new(self) -> None:
        """What the one before acknowledged in its last moments is known by now."""
        self.note_acknowledged()


class Writer(_WritingClient):
    """Adds transitions to a table."""

    def __init__(self, *arguments: Any, table: str, **options: Any) -> None:
        self.kind = table
        super().__init__(*arguments, table=table, **options)

    def open(self, table: str, chunk_size: int) -> None:
        """A writer."""
        self._n_step = self.client.tables[table].n_step
        self.writer = self.client.writer(table, num_envs=self.num_envs, autoreset=None, chunk_size=chunk_size)
        self._num_steps = 0

    def step(self) -> None:
        """Add one step."""
        self.note_sent(rows.num_complete(self._num_steps + 1, self._n_step) * self.num_envs)
        self.writer.add(**rows.step_arguments(self.number, self.num_envs, self._num_steps))
        self._num_steps += 1
        self.note_acknowledged()

    def leave(self) -> None:
        """At an episode's end, so that no window is cut short; everything is acknowledged then."""
        while self._num_steps % rows.EPISODE_LENGTH:
            self.step()
        self.writer.flush()
        self.note_acknowledged()
        self.writer.close()

    def write_on(self, until_s: float) -> None:
        """Write into the rows that it holds."""
        while time.monotonic() < until_s:
            for view in self.writer._rows.values():
                view[self.writer._outbox.reserved] = 77
            time.sleep(0.001)


class Learner(SoakClient):
    """Samples, looks at every row, and sends priorities."""

    kind = "learner"

    def open(self, table: str, batch_size: int, prefetch: int) -> None:
        """A sampler."""
        config = self.client.tables[table]
        self._n_step = config.n_step
        self._prioritized = isinstance(config.sampler, rb.Prioritized)
        self._sampler = self.client.sampler(table, batch_size, prefetch=prefetch)

    def step(self) -> None:
        """One batch."""
        batch = self._sampler.sample(WAIT_S)
        leaves = rows.leaves_of(batch)
        self.slot["sampled"] += len(leaves["rewards"])
        self.slot["verified"] += len(leaves["rewards"]) - check_transitions(self.board, leaves, self._n_step)
        if self._prioritized:
            self._sampler.update_priorities(batch, self.rng.exponential(size=len(batch.rewards)))
        self.slot["overtaken"] = self._sampler.num_overtaken
        beat(self.slot)

    def leave(self) -> None:
        """Give back the credits."""
        self._sampler.close()


class RolloutWriter(_WritingClient):
    """Writes fragments."""

    kind = "rollout_writer"

    def open(self) -> None:
        """A writer."""
        self.writer = self.client.rollout_writer(ROLLOUTS, autoreset=None, number=self.number)
        self._table = self.writer.table
        self.slot["num_envs"] = self._table.num_envs
        self._num_steps = 0
        self._num_fragments = 0

    def step(self) -> None:
        """One fragment, or what is left of it after an error."""
        num_envs = self._table.num_envs
        while self._num_steps < (self._num_fragments + 1) * self._table.num_steps:
            self.writer.add(**rows.rollout_arguments(self.number, num_envs, self._num_steps))
            self._num_steps += 1
        self.note_sent(self._num_fragments + 1)
        self.writer.commit(last_values=np.zeros(num_envs))
        self._num_fragments += 1
        self.note_acknowledged()

    def leave(self) -> None:
        """Everything is acknowledged then."""
        self.writer.close()
        self.note_acknowledged()

    def write_on(self, until_s: float) -> None:
        """Write into the fragment that it holds."""
        while self.writer._row is not None and time.monotonic() < until_s:
            for view in self.writer._rows.values():
                view[self.writer._row] = 77
            time.sleep(0.001)


class RolloutReader(SoakClient):
    """Takes fragments, looks at every step, and logs which ones."""

    kind = "rollout_reader"

    def open(self) -> None:
        """A reader."""
        self.reader = self.client.rollouts(ROLLOUTS)

    def step(self) -> None:
        """Take some, and give them back."""
        self.take(self.reader.take(int(self.rng.integers(1, 4)), WAIT_S))

    def take(self, rollouts: rb.Rollouts) -> None:
        """Look at a rollout and release it."""
        (batch,) = rollouts.get(None, shuffle=False)
        shape = (rollouts.num_steps, rollouts.num_envs)
        intact, fragments = rows.intact_fragments(
            rollouts.writers,
            batch.observations.numpy().reshape(*shape, rows.WIDTH),
            batch.actions.numpy().reshape(shape),
        )
        takes = [
            Take(self.number, writer, fragment, int(self.slot["epoch"]), 0)
            for writer, fragment in zip(rollouts.writers.tolist(), fragments.tolist(), strict=True)
        ]
        for take, is_intact in zip(takes, intact.tolist(), strict=True):
            if not is_intact:
                self.board.report("torn", f"fragment {take.fragment} of writer {take.writer}")
        self.slot["sampled"] += len(takes)
        self.slot["verified"] += int(np.count_nonzero(intact))
        self.board.log_take(*takes)
        self.board.log_take(*(take._replace(is_release=1) for take in takes))
        rollouts.release()
        beat(self.slot)

    def leave(self) -> None:
        """Fragments that were received and not taken go back."""
        self.reader.close()


class Publisher(SoakClient):
    """Publishes sets whose arrays all hold one number."""

    kind = "publisher"

    def open(self) -> None:
        """Nothing more."""

    def step(self) -> None:
        """Publish the next."""
        self.slot["sent"] += 1
        content = np.full(_POLICY_SIZE, self.number * 1_000_000 + self.slot["sent"])
        try:
            self.client.publish_parameters(dict.fromkeys("abc", content), POLICY)
        except rb.RequestRefused:  # the one before us is dead and still holds a slot
            time.sleep(0.01)
        else:
            self.slot["acknowledged"] = self.slot["sent"]
            beat(self.slot)
        time.sleep(0.002)


class Follower(SoakClient):
    """Fetches parameters as soon as there are newer ones."""

    kind = "follower"

    def open(self) -> None:
        """Nothing is known yet."""
        self._version = 0

    def step(self) -> None:
        """Wait for the next."""
        version, arrays = self.client.parameters(POLICY, self._version, timeout_s=WAIT_S, as_numpy=True)
        if arrays is None:
            self.slot["deadlines"] += 1
            return
        numbers = {int(number) for array in arrays.values() for number in (array.min(), array.max())}
        if len(numbers) != 1 or version <= self._version:
            self.board.report("torn", f"parameters {version} after {self._version} hold {sorted(numbers)}")
        self._version = version
        self.slot["sampled"] += 1
        self.slot["verified"] += 1
        beat(self.slot)

    def server_is_new(self) -> None:
        """Versions begin anew."""
        self._version = 0


class Vandal(SoakClient):
    """Sends garbage wherever a process of this user can send something."""

    kind = "vandal"

    def open(self) -> None:
        """Nothing more."""

    def step(self) -> None:
        """Some of each kind."""
        address, garbage = Address(self.address), self._garbage
        for path, kind in ((address.attach, socket.SOCK_SEQPACKET), (address.control, socket.SOCK_STREAM)):
            self._send(path, kind, garbage())
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.connect(address.control_endpoint)
            for _ in range(10):
                stranger.send_multipart([garbage() for _ in range(self.rng.integers(1, 3))], zmq.NOBLOCK)
        channel = self.client._connection.channel()
        for _ in range(10):
            kind = bytes((int(self.rng.integers(0, 8)),))
            epoch = self.client._connection.epoch.to_bytes(8, "little")
            channel.send(kind + self._garbage(7) + epoch + garbage())
        channel.close()
        if self.client.info()["num_refused"]:
            self.slot["sent"] += 1
            beat(self.slot)
        time.sleep(0.05)

    def _garbage(self, nbytes: int | None = None) -> bytes:
        return self.rng.bytes(int(self.rng.integers(0, 3000)) if nbytes is None else nbytes)

    @staticmethod
    def _send(path: Path, kind: int, content: bytes) -> None:
        with socket.socket(socket.AF_UNIX, kind) as sender:
            sender.settimeout(CALL_TIMEOUT_S)
            try:
                sender.connect(os.fspath(path))
                sender.send(content)
            except OSError:  # nobody there, or not interested
                pass


ROLES: dict[str, Callable[..., SoakClient]] = {
    "writer": Writer,
    "learner": Learner,
    "rollout_writer": RolloutWriter,
    "rollout_reader": RolloutReader,
    "publisher": Publisher,
    "follower": Follower,
    "vandal": Vandal,
}


def run_client(
    role: str, address: str, directory: str, number: int, options: dict[str, Any], failpoint: str = ""
) -> None:
    """First function of a client's process."""
    failpoints.arm(failpoint)
    try:
        client = ROLES[role](address, directory, number, **options)
    except (rb.ServerLost, rb.DeadlineExceeded):
        return  # the server was killed meanwhile; the coordinator starts another client
    client.run()
