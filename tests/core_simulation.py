"""Seeded simulation: clients, memory, network, kills and pauses around the real `ServerCore` and real frames.

    python tests/core_simulation.py --seeds 2000

Every client is a generator that does one thing between two `yield`s: write half a row, copy half a row, look into its
inbox. A seeded scheduler chooses who goes on, what is delivered, who is paused and who dies. So the shared memory is
seen torn wherever it can be torn, and a seed plays the same game each time.

Safety is what `Ledger` looks for after every step of the server and whenever a client writes or reads; it holds
whatever the network does. That everybody goes on (`World.require_progress`) is asked only of a network that loses
nothing, as zmq's: nothing is sent again, so whoever waits for what was lost waits until its deadline.
"""

import argparse
import collections
import random
from collections import Counter, deque
from typing import NamedTuple

import numpy as np
from core_driver import EPOCH, check_tables, floats, ints, make_core, rollout_table, token

from rl_buffer import frames, messages
from rl_buffer.errors import InvalidInput
from rl_buffer.frames import Commit, Credit
from rl_buffer.messages import Envelope
from rl_buffer.parameter_slots import FIRST_SLOT_VERSION, NEWEST_SLOT, NUM_SLOTS
from rl_buffer.rate_limiters import MinSize, SampleToInsertRatio
from rl_buffer.samplers import Prioritized


class Violation(AssertionError):
    """What must never happen did."""


def require(condition, what):
    if not condition:
        raise Violation(what)


class GaveUp(Exception):
    """No answer came, or a refusal: the client leaves and begins anew, as the user of a real one would."""


class Faults(NamedTuple):
    """What happens to messages, each with this probability, and to processes at each step.

    Control requests get lost, but neither late nor repeated: nothing in them tells a copy from the original.
    """

    lost: float = 0.0
    late: float = 0.0  # comes at any time, before or after what was sent before and after it
    repeated: float = 0.0  # and the copy comes at any time
    killed: float = 0.002
    paused: float = 0.004
    detached: float = 0.0005  # the attach socket is closed, and the process goes on


FAULTS = {
    "as zmq": Faults(),
    "lossy": Faults(lost=0.02),
    "disordered": Faults(late=0.02, repeated=0.05),
    "all": Faults(lost=0.01, late=0.02, repeated=0.03),
}
REPLAY_TABLES = [
    {"rate_limiter": MinSize(1), "capacity": 12, "headroom": 12, "sampler": Prioritized(alpha=1.0)},
    {"rate_limiter": SampleToInsertRatio(2.0, 4, 8.0), "capacity": 12, "headroom": 12},
    {"rate_limiter": SampleToInsertRatio(1.0, 2, (-5.0, 2.0)), "capacity": 8, "headroom": 8},
]
ROLLOUT_TABLES = [
    rollout_table(num_fragments=4, fragments_per_update=2),
    rollout_table(num_fragments=5, max_version_lag=1),
    rollout_table(num_fragments=5, max_version_lag=1, when_late="wait", fragments_per_update=2),
    rollout_table(num_fragments=4, max_version_lag=0, when_late="wait", fragments_per_update=2),
]


class Content(NamedTuple):
    """Each half of a row. `stamp`: of transitions the row's generation, of fragments the parameter version."""

    writer: bytes
    number: int
    stamp: int

    def __repr__(self):
        process, channel = self.writer[0] - 1, int.from_bytes(self.writer[frames.TOKEN_NBYTES :], "little")
        return f"content {self.number} of channel {channel} of process {process}, stamp {self.stamp}"


# ---- clients: each step is what happens between two yields -----------------------------------------------------


class Process:
    """A client with one role. Killed, it is never run again; paused, for a while."""

    def __init__(self, world, number, role):
        self.world, self.role = world, role
        self.token = token(number)
        self.is_alive = self.is_attached = True
        self.num_channels = self.num_requests = self.num_contents = 0
        self.num_steps_paused = 0
        self.progress = 0  # rounds of its role that it finished
        self.inboxes = collections.defaultdict(deque)
        world.core.attach(self.token, role.__name__, number, 0.0)
        self.thread = self._run()

    def _run(self):
        while True:
            self.num_channels += 1
            self.channel = self.num_channels
            try:
                yield from self.role(self)
            except GaveUp:
                self.world.ledger.counts["gave up"] += 1
                self.ask_no_more()
            yield

    @property
    def channel_id(self):
        return self.token + self.channel.to_bytes(4, "little")

    def ask_no_more(self):
        """Close the channel, without a look at the answer."""
        self.num_requests += 1
        self.send(messages.encode_control(Envelope(self.num_requests, EPOCH, messages.CloseChannel(self.channel))))

    def send(self, frame, channel=None):
        channel = self.channel if channel is None else channel
        self.world.post(True, self.token + channel.to_bytes(4, "little"), frame)

    def receive(self, kind, channel=None):
        inbox = self.inboxes[self.channel if channel is None else channel]
        for _ in range(self.world.patience):
            if inbox:
                frame = inbox.popleft()
                if frames.kind_of(frame) != kind:
                    raise GaveUp
                return frame
            yield
        raise GaveUp

    def ask(self, request, channel=None):
        self.num_requests += 1
        number = self.num_requests
        self.send(messages.encode_control(Envelope(number, EPOCH, request)), channel)
        while True:
            answer = messages.decode_control_reply((yield from self.receive(frames.CONTROL, channel)))
            if answer.request_id == number:
                if isinstance(answer.reply, messages.Refused):
                    raise GaveUp
                return answer.reply

    def write(self, table, row, stamp):
        """Two halves, and whatever happens between."""
        self.num_contents += 1
        content = Content(self.channel_id, self.num_contents, stamp)
        for half in (0, 1):
            self.world.ledger.require_writable(self.channel_id, row)
            self.world.memory[table][row][half] = content
            yield
        return content

    def copy(self, table, rows):
        """(first half, second half) of each row."""
        memory = self.world.memory[table]
        first = [memory[row][0] for row in rows]
        yield
        second = [memory[row][1] for row in rows]
        yield
        return list(zip(first, second, strict=True))


class WriterSide:
    """What `ReplayWriter` and `RolloutWriter` know: their rows, and the numbers of commits and grants."""

    def __init__(self, process):
        self.process = process
        self.rows = []
        self.sequence = self.num_grants = 0

    def grant(self):
        frame = yield from self.process.receive(frames.GRANT)
        self.num_grants += 1
        try:
            expected = None if self.process.world.ignored == "grant numbers" else self.num_grants
            grant = frames.decode_grant(frame, expected)
        except InvalidInput:
            raise GaveUp from None
        self.rows += grant.rows.tolist()

    def commit(self, contents, td_errors=None, version=0):
        self.sequence += 1
        num_rows = len(contents)
        self.process.world.ledger.will_commit(self.process.channel_id, contents)
        self.process.send(Commit(EPOCH, num_rows, self.sequence, version, num_rows, td_errors, []).encode())
        self.rows = self.rows[num_rows:]
        self.process.progress += 1


def replay_writer(process):
    world = process.world
    chunk = world.random.randint(1, 3)
    yield from process.ask(messages.OpenWriter(process.channel, "replay", chunk, 2 * chunk))
    side = WriterSide(process)
    while True:
        num_rows = world.random.randint(1, chunk)
        while len(side.rows) < num_rows:
            yield from side.grant()
        contents = []
        for row in side.rows[:num_rows]:
            generation = world.replay.generations[row] + 1
            contents.append((yield from process.write("replay", row, int(generation))))
        td_errors = floats(*range(num_rows)) if world.random.random() < 0.5 else None
        side.commit(contents, td_errors)


def sampler(process):
    world = process.world
    batch_size, prefetch = world.random.randint(1, 3), world.random.randint(1, 3)
    yield from process.ask(messages.OpenSampler(process.channel, "replay", batch_size))
    num_outstanding = num_overtaken = 0
    ready, update = deque(), (ints(), ints(), floats())
    while True:
        num_wanted = max(0, prefetch - num_outstanding)
        process.send(Credit(EPOCH, num_wanted, num_overtaken, *update).encode())
        num_outstanding += num_wanted
        if not ready:
            ready += frames.decode_batch((yield from process.receive(frames.BATCH))).samples()
        sample = ready.popleft()
        num_outstanding -= 1
        copies = yield from process.copy("replay", sample.rows)
        is_intact = world.replay.generations[sample.rows] == sample.generations
        num_overtaken = int(np.count_nonzero(~is_intact[:batch_size]))
        for copy, generation, intact in zip(copies, sample.generations, is_intact, strict=True):
            world.ledger.sampled(copy, generation, intact or world.ignored == "generations")
        if world.is_prioritized:
            update = sample.rows, sample.generations, np.full(len(sample.rows), world.random.random())
        process.progress += 1


def actor(process):
    yield from process.ask(messages.OpenWriter(process.channel, "rollout", 1, 1))
    side = WriterSide(process)
    while True:
        while not side.rows:
            yield from side.grant()
        version = yield from read_parameters(process)
        content = yield from process.write("rollout", side.rows[0], version)
        side.commit([content], version=version)


def read_parameters(process):
    """As `ParameterSet.read`."""
    world, board = process.world, process.world.board
    while True:
        slot = int(board[NEWEST_SLOT])
        yield
        version = int(board[FIRST_SLOT_VERSION + slot])
        if not version:
            return 0
        ((first, second),) = yield from process.copy("parameters", [slot])
        if board[FIRST_SLOT_VERSION + slot] == version:
            require(first == second == world.ledger.versions[version], f"parameters of version {version} are torn")
            return version


def learner(process):
    world = process.world
    yield from process.ask(messages.OpenReader(process.channel, "rollout"))
    per_update = world.rollouts.config.fragments_per_update
    held, num_outstanding, newest = [], 0, {}  # newest: generation by row
    while True:
        num_wanted = max(0, per_update - len(held) - num_outstanding)
        if num_wanted:
            process.send(Credit(EPOCH, num_wanted, 0, ints(), ints(), floats()).encode())
            num_outstanding += num_wanted
        while len(held) < per_update:
            sample = frames.decode_batch((yield from process.receive(frames.BATCH))).sample
            leased = dict(zip(sample.rows.tolist(), sample.generations.tolist(), strict=True))
            is_repeated = any(generation <= newest.get(row, 0) for row, generation in leased.items())
            if is_repeated and world.ignored != "generations of fragments":
                continue
            newest |= leased
            held += leased.items()
            num_outstanding -= len(sample.rows)
        taken, held = held[:per_update], held[per_update:]
        copies = yield from process.copy("rollout", [row for row, _ in taken])
        for copy in copies:
            world.ledger.taken(process.channel_id, copy)
        yield from publish(process)
        world.ledger.will_release(copy[0] for copy in copies)
        nothing = floats(*[0.0] * per_update)
        rows, generations = (ints(*numbers) for numbers in zip(*taken, strict=True))
        process.send(Credit(EPOCH, 0, 0, rows, generations, nothing).encode())
        process.progress += 1


def publish(process):
    slot = (yield from process.ask(messages.ReserveParameters("policy"), channel=0)).slot
    process.num_contents += 1
    for half in (0, 1):
        process.world.memory["parameters"][slot][half] = Content(process.channel_id, process.num_contents, 0)
        yield
    yield from process.ask(messages.PublishParameters("policy", slot), channel=0)


ROLES = [replay_writer, replay_writer, sampler, sampler, actor, actor, learner]


# ---- what must hold --------------------------------------------------------------------------------------------


class Ledger:
    """Looks over everybody's shoulder.

    Clients write only rows that they hold. What is published was committed, once and in the order of its writer, and
    stays as it is; it goes only when it is the oldest of a full table. A fragment goes only when it was read, or is
    too late; it is handed out again only if the reader before is gone. What is acknowledged was published.
    """

    def __init__(self, world):
        self.world = world
        self.counts = Counter()
        self.unpublished = collections.defaultdict(deque)  # committed contents by writer, in order
        self.num_published = Counter()  # by writer
        self.commit_ends = collections.defaultdict(lambda: [0])  # by writer and sequence: contents up to there
        self.order = []  # committed transitions' rows, oldest first
        self.num_inserts = self.num_commits = 0  # transitions and fragments seen so far
        self.stored = {"replay": {}, "rollout": {}}  # row -> content
        self.hand_outs = set()
        self.takers = {}  # fragment -> the last reader that took it
        self.released = set()
        self.versions = {}  # published parameters

    # What clients do.

    def require_writable(self, channel_id, row):
        held = self.world.held_by(channel_id)
        require(row in held, f"wrote row {row}, but the server lets it write {held}")

    def will_commit(self, writer, contents):
        self.unpublished[writer] += contents
        self.commit_ends[writer].append(self.commit_ends[writer][-1] + len(contents))

    def sampled(self, copy, generation, accepted):
        self.counts["torn" if copy[0] != copy[1] else "sampled"] += 1
        if accepted:
            require(copy[0] == copy[1], f"a torn row was sampled: {copy}")
            require(copy[0].stamp == generation, f"{copy[0]} was sampled as generation {generation}")
        else:
            self.counts["overtaken"] += 1

    def taken(self, reader, copy):
        content = copy[0]
        require(copy[0] == copy[1], f"a torn fragment was read: {copy}")
        before = self.takers.get(content)
        require(before is None or self.world.channel(before) is None, f"{content} was handed out twice")
        self.takers[content] = reader
        self.counts["taken"] += 1
        self.counts["taken again"] += before is not None

    def will_release(self, contents):
        self.released.update(contents)

    # What the server did.

    def acknowledged(self, writer, sequence):
        num_acknowledged = self.commit_ends[writer][sequence]
        require(num_acknowledged <= self.num_published[writer], "acknowledged what is not published")

    def look(self, sender):
        """After each step of the server, on a message from `sender` if it was one."""
        self._look_at_parameters()
        self._look_at_transitions()
        self._look_at_fragments(sender)

    def _look_at_parameters(self):
        newest = self.world.slots.version
        if newest and newest not in self.versions:
            first, second = self.world.memory["parameters"][self.world.board[NEWEST_SLOT]]
            require(first == second, f"torn parameters were published as version {newest}")
            self.versions[newest] = first

    def _look_at_transitions(self):
        state, stored = self.world.replay, self.stored["replay"]
        rows = state.allocator.committed().tolist()
        num_new = state.limiter.num_inserts - self.num_inserts
        new = rows[len(rows) - num_new :]
        num_evicted = max(0, len(self.order) + num_new - state.config.capacity)
        require(rows == self.order[num_evicted:] + new, "lost another transition than the oldest of a full table")
        for row in self.order[:num_evicted]:
            del stored[row]
        self._publish("replay", new)
        self.order, self.num_inserts = rows, state.limiter.num_inserts
        self.counts["evicted"] += num_evicted

    def _look_at_fragments(self, sender):
        state, stored = self.world.rollouts, self.stored["rollout"]
        rows = {fragment.row for fragment in state._finished} | set(state._reading)
        for row in stored.keys() - rows:
            content = stored.pop(row)
            require(content in self.released or self._is_late(content), f"{content} was lost before it was read")
            self.counts["dropped"] += content not in self.released
        if rows == stored.keys() and state.num_commits > self.num_commits:  # dropped as soon as it was committed
            content = self.unpublished[sender].popleft()
            require(self._is_late(content), f"{content} was lost before anybody could read it")
            self.num_published[sender] += 1
            self.counts["dropped"] += 1
        self.num_commits = state.num_commits
        self._publish("rollout", rows - stored.keys())
        readers = self.world.core.tables["rollout"].readers
        hand_outs = {(reader.channel_id, row, stored[row]) for reader in readers for row in reader.rows}
        for _, _, content in hand_outs - self.hand_outs:
            require(not self._is_late(content), f"{content} is handed out, and too late")
        self.hand_outs = hand_outs

    def _is_late(self, content):
        limit = self.world.rollouts.config.max_version_lag
        return limit is not None and self.world.slots.version - content.stamp > limit

    def _publish(self, table, rows):
        memory, stored = self.world.memory[table], self.stored[table]
        for row in rows:
            content = memory[row][0]
            require(content is not None and self.unpublished[content.writer], f"{content} was never committed")
            require(self.unpublished[content.writer].popleft() == content, f"{content} was published out of order")
            self.num_published[content.writer] += 1
            self.counts[f"{table} published"] += 1
            stored[row] = content
        for row, content in stored.items():
            require(memory[row] == [content, content], f"row {row} holds {memory[row]}, but {content} was published")


# ---- the world ---------------------------------------------------------------------------------------------------


class World:
    """One game, all of which follows from the seed."""

    def __init__(self, seed, faults=None, ignored=""):
        self.random = random.Random(seed)
        self.faults = self.random.choice(list(FAULTS.values())) if faults is None else FAULTS[faults]
        self.ignored = ignored  # by clients: "generations", "grant numbers" or "generations of fragments"
        replay = self.random.choice(REPLAY_TABLES)
        self.is_prioritized = "sampler" in replay
        self.core = make_core(replay=replay | {"seed": seed}, rollout=self.random.choice(ROLLOUT_TABLES))
        self.replay, self.rollouts = (self.core.tables[name].state for name in ("replay", "rollout"))
        self.slots = self.core.parameters["policy"]
        self.board = self.slots._board
        self.memory = {
            "replay": [[None, None] for _ in range(self.replay.config.num_rows)],
            "rollout": [[None, None] for _ in range(self.rollouts.config.num_fragments)],
            "parameters": [[None, None] for _ in range(NUM_SLOTS)],
        }
        self.patience = 10**9 if self.is_reliable else 150
        self.queues = {}  # (to the server?, channel id) -> frames in order
        self.stragglers = []  # (to the server?, channel id, frame) in none
        self.processes = []
        self.ends = []  # (process, whether it exited or only closed its socket) that the server has not seen
        self.ledger = Ledger(self)
        self.num_steps = 0

    @property
    def is_reliable(self):
        return not (self.faults.lost or self.faults.late or self.faults.repeated)

    def channel(self, channel_id):
        session = self.core.sessions.get(channel_id[: frames.TOKEN_NBYTES])
        return session and session.channels.get(channel_id)

    def held_by(self, channel_id):
        channel = self.channel(channel_id)
        return [] if channel is None else channel.rows.tolist()

    # ---- network

    def post(self, to_server, channel_id, frame):
        if self.random.random() < self.faults.lost:
            self.ledger.counts["lost"] += 1
            return
        is_request = to_server and frames.kind_of(frame) == frames.CONTROL
        if self.random.random() < self.faults.late and not is_request:
            self.stragglers.append((to_server, channel_id, frame))
            return
        self.queues.setdefault((to_server, channel_id), deque()).append(frame)
        if self.random.random() < self.faults.repeated and not is_request:
            self.stragglers.append((to_server, channel_id, frame))

    def deliver(self):
        if self.stragglers and self.random.random() < 0.1:
            index = self.random.randrange(len(self.stragglers))
            self._arrive(*self.stragglers.pop(index))
        elif self.queues:
            to_server, channel_id = key = self.random.choice(list(self.queues))
            frame = self.queues[key].popleft()
            if not self.queues[key]:
                del self.queues[key]
            self._arrive(to_server, channel_id, frame)

    def _arrive(self, to_server, channel_id, frame):
        if to_server:
            self.server_did(self.core.handle(channel_id, frame, 0.0), channel_id)
            return
        for process in self.processes:
            if process.is_alive and process.token == channel_id[: frames.TOKEN_NBYTES]:
                process.inboxes[int.from_bytes(channel_id[frames.TOKEN_NBYTES :], "little")].append(frame)

    def server_did(self, outgoing, sender=None):
        self.ledger.look(sender)
        for channel_id, frame in outgoing:
            if frames.kind_of(frame) == frames.GRANT:
                self.ledger.acknowledged(channel_id, frames.decode_grant(frame).acknowledged)
            self.post(False, channel_id, frame)
        if self.num_steps % 10 == 0:
            check_tables(self.core)

    # ---- processes

    def start(self, role):
        self.processes.append(Process(self, self.ledger.counts["started"], role))
        self.ledger.counts["started"] += 1

    def kill(self, process):
        process.is_alive = False
        self.processes.remove(process)
        for key in [key for key in self.queues if key[1][: frames.TOKEN_NBYTES] == process.token]:
            # Of what it sent, the first may be on its way.
            num_sent = self.random.randint(0, len(self.queues[key])) if key[0] else 0
            self.queues[key] = deque(list(self.queues[key])[:num_sent])
            if not num_sent:
                del self.queues[key]
        if process.is_attached:
            self.detach(process)
        self.ends.append((process, True))

    def detach(self, process):
        process.is_attached = False
        self.ends.append((process, False))

    def notice_end(self):
        """As `server_loop`: of one process first the end of the file, then the exit."""
        process, _ = self.random.choice(self.ends)
        index = next(i for i, (other, _) in enumerate(self.ends) if other is process)
        _, has_exited = self.ends.pop(index)
        if not has_exited:
            self.core.disconnected(process.token)
        if has_exited or not self.core.has_leases(process.token):
            self.server_did(self.core.exited(process.token))

    # ---- the game

    def step(self):
        self.num_steps += 1
        if self.random.random() < 0.5:
            process = self.random.choice(self.processes)
            if process.num_steps_paused:
                process.num_steps_paused -= 1
            else:
                next(process.thread)
        else:
            self.deliver()
        if self.ends and self.random.random() < 0.05:
            self.notice_end()

    def disturb(self):
        if self.random.random() < self.faults.killed:
            process = self.random.choice(self.processes)
            self.kill(process)
            self.start(process.role)
        if self.random.random() < self.faults.paused:
            self.random.choice(self.processes).num_steps_paused = self.random.randint(1, 100)
        if self.random.random() < self.faults.detached:
            process = self.random.choice(self.processes)
            if process.is_attached:
                self.detach(process)

    def play(self, num_steps):
        for role in ROLES:
            self.start(role)
        for _ in range(num_steps):
            self.step()
            self.disturb()
        if self.is_reliable:
            self.require_progress()
        self.end()
        self.faults, self.patience = Faults(), 10**9
        for role in ROLES:
            self.start(role)
        self.require_progress()
        self.end()

    def require_progress(self, rounds=3, num_steps=20_000):
        """Everybody finishes some rounds, if nobody is disturbed any more."""
        for process in [process for process in self.processes if not process.is_attached]:
            self.kill(process)
            self.start(process.role)
        goals = {process: process.progress + rounds for process in self.processes}
        for _ in range(num_steps):
            self.step()
            if self.num_steps % 50 == 0 and all(process.progress >= goal for process, goal in goals.items()):
                return
        stuck = [process.role.__name__ for process, goal in goals.items() if process.progress < goal]
        raise Violation(f"{stuck} do not go on: {self.core.info(0.0)['tables']}")

    def end(self):
        """All die. What they held is free; what they sent comes too late."""
        for process in list(self.processes):
            self.kill(process)
        while self.ends:
            self.notice_end()
        while self.queues or self.stragglers:
            self.deliver()
        check_tables(self.core)
        require(not self.core.sessions, "a session outlives its process")
        require(self.replay.allocator.num_reserved == 0, "rows are still reserved")
        require(self.rollouts.num_writing == self.rollouts.num_reading == 0, "fragments are still held")
        for table in self.core.tables.values():
            require(not (table.pending or table.wanting or table.samplers or table.readers), "a queue is not empty")
        require(self.slots._holder is None, "a parameter slot is still held")


def simulate(seed, num_steps=1500, **options):
    """Play one game; returns what happened how often. Raises Violation."""
    world = World(seed, **options)
    try:
        world.play(num_steps)
    except Violation as violation:
        raise Violation(f"seed {seed}, step {world.num_steps}: {violation}") from None
    return world.ledger.counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--faults", choices=FAULTS)
    arguments = parser.parse_args()
    counts, failed = Counter(), 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        try:
            counts += simulate(seed, arguments.steps, faults=arguments.faults)
        except Violation as violation:
            failed += 1
            print(violation)
    print(f"{failed} of {arguments.seeds} seeds failed; {dict(sorted(counts.items()))}")
    return failed > 0


if __name__ == "__main__":
    raise SystemExit(main())
