"""A server over a ledger in ordinary memory, killed at any store; and what it should have written down by then."""

import numpy as np
from core_driver import ints, token

from rl_buffer import frames, mapped_ledger, messages
from rl_buffer.frames import Commit, Credit
from rl_buffer.mapped_ledger import MappedLedger, ledger_fields
from rl_buffer.messages import Envelope
from rl_buffer.parameter_slots import BOARD_LENGTH, ParameterSlots
from rl_buffer.recovery import Survivor, resume, resumed_table
from rl_buffer.samplers import Prioritized, PrioritizedSampler
from rl_buffer.server_core import ServerCore
from rl_buffer.spec import Field, TransitionSpec
from rl_buffer.stats_tracker import Episode
from rl_buffer.sum_tree import SumTree
from rl_buffer.tables import ReplayTable, RolloutTable, StatsConfig

EPOCH = 77
SPEC = TransitionSpec(obs=Field((1,)), action=Field((1,)))
STATS = StatsConfig(window=3, extra_metrics_keys=("speed",), done_reason_keys=("fell",))
NUM_WRITERS = 3
LEARNER = NUM_WRITERS  # number of its session
CAPACITY = 5
EPSILON = 0.5


class Killed(BaseException):
    """The process is gone."""


class Fuse:
    """Counts stores, and kills instead of one of them."""

    def __init__(self):
        self.num_stores = 0
        self.last = None

    def burn(self):
        if self.num_stores == self.last:
            raise Killed
        self.num_stores += 1


class Mapped(np.ndarray):
    """Memory that outlives the process; every element is a store of its own."""

    def __new__(cls, field, fuse):
        array = np.zeros(field.shape, field.dtype).view(cls)
        array.fuse = fuse
        return array

    def __array_finalize__(self, source):
        self.fuse = getattr(source, "fuse", None)

    def __setitem__(self, index, value):
        places = np.arange(self.size).reshape(self.shape)[index]
        values = np.broadcast_to(np.asarray(value, self.dtype), places.shape)
        for place, number in zip(places.ravel().tolist(), values.ravel().tolist(), strict=True):
            self.fuse.burn()
            super().__setitem__(np.unravel_index(place, self.shape), number)


def patch_stores(monkeypatch, fuse):
    """Count the stores of the sum tree's compiled code as well, and keep the ledger small."""
    new, set_leaves = SumTree.__init__, SumTree.set

    def start(tree, num_leaves, leaves=None):
        new(tree, num_leaves, None if leaves is None else leaves.view(np.ndarray))

    def set_one_by_one(tree, leaves, masses):
        before = tree.leaves.copy()
        for leaf, mass in zip(leaves.tolist(), masses.tolist(), strict=True):
            fuse.burn()
            tree.leaves[leaf] = mass
        tree.leaves[:] = before
        set_leaves(tree, np.asarray(leaves), np.asarray(masses))

    def update_one_by_one(sampler, rows, generations, td_errors, current):
        fresh = (np.asarray(current)[rows] == generations) & (generations % 2 == 1)
        sampler.update(rows[fresh], td_errors[fresh])
        return int(np.count_nonzero(~fresh))

    monkeypatch.setattr(SumTree, "__init__", start)
    monkeypatch.setattr(PrioritizedSampler, "update_fresh", update_one_by_one)
    monkeypatch.setattr(SumTree, "set", set_one_by_one)
    monkeypatch.setattr(mapped_ledger, "_words", lambda array: array.reshape(-1))
    monkeypatch.setattr(mapped_ledger, "MAX_CLIENTS", 8)
    monkeypatch.setattr(mapped_ledger, "MAX_WRITERS", 99)
    monkeypatch.setattr(mapped_ledger, "MAX_CLIENT_NAMES", NUM_WRITERS)


class LoggingLedger(MappedLedger):
    """Tells the log what is about to happen, in terms of what is in the rows."""

    def begin(self, table, rows, *, writer, **what):
        writer_id = next((key for key, number in self._writer_numbers.items() if number == writer), None)
        client = what["client"] and what["client"].name
        self.log.append(("publish", table, self.items(table, rows), writer_id, what | {"client": client}))
        super().begin(table, rows, writer=writer, **what)

    def cleared(self, table):
        finished = [fragment.row for fragment in self.core.tables["rollout"].state._finished]
        self.log.append(("clear", table, self.items("rollout", np.array(finished, np.int64))))
        super().cleared(table)

    def emptied(self, table, rows, num_dropped):
        self.log.append(("empty", self.items(table, rows)))
        super().emptied(table, rows, num_dropped)

    def sampled(self, table, num_samples):
        self.log.append(("sample", table, num_samples))
        super().sampled(table, num_samples)

    def items(self, table, rows):
        return [self.contents[table][row] for row in rows.tolist()]


class World:
    """What outlives a server: the mapped memory, and the clients with what they know."""

    def __init__(self, fuse, limiter, sampler, rollouts):
        self.tables = {
            "replay": ReplayTable(SPEC, CAPACITY, sampler, limiter, headroom=9, seed=3),
            "rollout": RolloutTable(SPEC, num_steps=1, num_envs=1, num_fragments=6, **rollouts),
        }
        self.arrays = {name: Mapped(field, fuse) for name, field in ledger_fields(self.tables, STATS).items()}
        self.generations = {name: Mapped(Field((t.num_rows,), "int64"), fuse) for name, t in self.tables.items()}
        self.contents = {name: [None] * table.num_rows for name, table in self.tables.items()}
        self.log = []
        self.tokens = {}  # of the sessions of processes that live, by who it is
        self.writers = {}  # by channel id
        self.fragments = []  # rows that the learner reads
        self.num_sessions = self.num_items = 0

    def start(self):
        """The next server on this memory."""
        ledger = LoggingLedger(self.arrays, self.tables, STATS)
        ledger.log, ledger.contents = self.log, self.contents
        survivors, gone = [], []
        for client, (client_token, _) in ledger.clients().items():
            if client_token in self.tokens.values():
                survivors.append(Survivor(client, client_token, 1, None))
            else:
                gone.append(client)
        ledger.disown(gone)
        states = {name: resumed_table(ledger, name, self.generations[name]) for name in self.tables}
        core = ServerCore(EPOCH, states, STATS, ledger)
        core.parameters["policy"] = ParameterSlots(np.zeros(BOARD_LENGTH, np.int64))
        ledger.core = core
        resume(core, ledger, survivors, 0.0)
        return core


class Writer:
    """What a writer knows: the rows that it holds, and the commits that it sent."""

    def __init__(self, table, writer_id):
        self.table, self.writer_id = table, writer_id
        self.rows = []
        self.sequence = self.acknowledged = 0
        self.sent = {}  # row -> item, in commits that are not acknowledged


class Play:
    """A random but repeatable run of clients against a server."""

    def __init__(self, world, core, seed):
        self.world, self.core = world, core
        self.rng = np.random.default_rng(seed)
        for number in range(NUM_WRITERS + 1):
            self.attach(number)

    def step(self):
        """One thing that some client does."""
        number = int(self.rng.integers(NUM_WRITERS))
        actions = {
            self.write: 0.36,
            self.write_fragment: 0.18,
            self.learn: 0.12,
            self.read: 0.12,
            self.clear: 0.04,
            self.close: 0.02,
            self.die: 0.02,
            self.learner_dies: 0.03,
            self.publish_parameters: 0.11,
        }
        self.rng.choice(list(actions), p=list(actions.values()))(number)

    # ---- what clients do -------------------------------------------------------------------------------------

    def attach(self, number):
        self.world.num_sessions += 1
        fresh = token(self.world.num_sessions)
        self.core.attach(fresh, f"actor-{number}", 1, 0.0)
        if before := self.world.tokens.pop(number, None):  # a process that outlived the last server
            self.deliver(self.core.attached_again(before, 1))
        self.world.tokens[number] = fresh
        if number == LEARNER:
            self.samples, self.world.fragments = [], []
            self.ask(LEARNER, messages.OpenSampler(1, "replay", 2))
            self.ask(LEARNER, messages.OpenReader(2, "rollout"))
            return
        for channel, (table, *sizes) in {1: ("replay", 2, 3), 2: ("rollout", 1, 1)}.items():
            writer_id = bytes([self.world.num_sessions, channel]) * 8
            self.world.writers[self.id(number, channel)] = Writer(table, writer_id)
            self.ask(number, messages.OpenWriter(channel, table, *sizes, writer_id))

    def write(self, number, channel=1):
        writer = self.world.writers[self.id(number, channel)]
        num_rows = min(int(self.rng.integers(3)), len(writer.rows)) if channel == 1 else 1
        rows, writer.rows = writer.rows[:num_rows], writer.rows[num_rows:]
        for row in rows:
            self.world.num_items += 1
            self.world.contents[writer.table][row] = writer.sent[row] = self.world.num_items
        writer.sequence += 1
        td_errors = None
        if channel == 1 and self.rng.random() < 0.6:
            td_errors = self.rng.choice([np.nan, 1.0, 2.0, 4.0], num_rows)
        episodes = [
            Episode(0, float(self.rng.integers(100)), 7, {"speed": 0.5} if self.rng.random() < 0.5 else {})
            for _ in range(int(self.rng.integers(8)) - 3)
        ]
        version = max(0, self.core.parameters["policy"].version - int(self.rng.integers(4)))
        commit = Commit(EPOCH, num_rows, writer.sequence, version, num_rows, td_errors, episodes)
        self.send(number, channel, commit.encode())

    def write_fragment(self, number):
        if self.world.writers[self.id(number, 2)].rows:
            self.write(number, 2)

    def learn(self, _):
        state, nothing = self.core.tables["replay"].state, ints()
        rows, generations, td_errors = nothing, nothing, nothing.astype(float)
        if self.samples and isinstance(state.config.sampler, Prioritized):
            sample = self.samples[int(self.rng.integers(len(self.samples)))]
            rows, generations, td_errors = sample.rows, sample.generations, self.rng.random(len(sample.rows))
            fresh = np.asarray(state.generations)[rows] == generations
            items = [self.world.contents["replay"][row] for row in rows[fresh].tolist()]
            self.world.log.append(("update", list(zip(items, (td_errors[fresh] + EPSILON).tolist(), strict=True))))
        num_credits = min(2, 4 - self.channel(LEARNER, 1).num_credits)
        self.send(LEARNER, 1, Credit(EPOCH, num_credits, 0, rows, generations, td_errors).encode())

    def read(self, _):
        num_read = int(self.rng.integers(len(self.world.fragments) + 1))
        rows, self.world.fragments = ints(*self.world.fragments[:num_read]), self.world.fragments[num_read:]
        num_credits = min(2, 4 - self.channel(LEARNER, 2).num_credits)
        generations = np.asarray(self.core.tables["rollout"].state.generations)[rows]
        self.send(LEARNER, 2, Credit(EPOCH, num_credits, 0, rows, generations, rows.astype(float)).encode())

    def clear(self, number):
        self.ask(number, messages.Clear(["replay", "rollout"][int(self.rng.integers(2))]))

    def close(self, number):
        for channel in (1, 2):
            self.world.writers.pop(self.id(number, channel))
            self.ask(number, messages.CloseChannel(channel))
        self.die(number)

    def die(self, number):
        gone = self.world.tokens.pop(number)
        self.deliver(self.core.exited(gone))
        self.attach(number)

    def learner_dies(self, _):
        self.die(LEARNER)

    def publish_parameters(self, _):
        slots = self.core.parameters["policy"]
        slots.publish("learner", slots.reserve("learner"))

    # ---- messages ----------------------------------------------------------------------------------------------

    def id(self, number, channel):
        return self.world.tokens[number] + channel.to_bytes(4, "little")

    def channel(self, number, channel):
        return self.core.sessions[self.world.tokens[number]].channels[self.id(number, channel)]

    def ask(self, number, request):
        self.send(number, 0, messages.encode_control(Envelope(1, EPOCH, request)))

    def send(self, number, channel, frame):
        self.deliver(self.core.handle(self.id(number, channel), frame, 0.0))

    def deliver(self, outgoing):
        for receiver, frame in outgoing:
            kind = frames.kind_of(frame)
            if kind == frames.GRANT:
                grant, writer = frames.decode_grant(frame), self.world.writers.get(receiver)
                if writer is None:  # it was closed with commits on their way
                    continue
                writer.rows += grant.rows.tolist()
                if grant.acknowledged > writer.acknowledged:
                    writer.acknowledged = grant.acknowledged
                    self.acknowledged(writer)
            elif kind == frames.BATCH:
                batch = frames.decode_batch(frame)
                if receiver == self.id(LEARNER, 1):
                    self.samples = [*self.samples, *batch.samples()][-3:]
                else:
                    self.world.fragments += batch.sample.rows.tolist()
            else:
                assert kind == frames.CONTROL, frames.decode_refusal(frame)
                reply = messages.decode_control_reply(frame).reply
                assert not isinstance(reply, messages.Refused), reply

    def acknowledged(self, writer):
        """Rows of acknowledged commits are the server's for good."""
        published = {item for event in self.world.log if event[0] == "publish" for item in event[2]}
        writer.sent = {row: item for row, item in writer.sent.items() if item not in published}


class Model:
    """The tables as lists, after some events of the log."""

    def __init__(self, events):
        self.committed, self.masses, self.fragments = [], {}, {}
        self.published, self.rewards, self.progress = set(), [], {}
        self.client_rewards = {}
        self.num_inserts = self.num_samples = self.num_commits = self.num_handed_out = 0
        for event, *what in events:
            getattr(self, event)(*what)

    def publish(self, table, items, writer_id, what):
        self.published.update(items)
        self.progress[writer_id] = what["progress"]
        rewards = [episode.reward for episode in what["episodes"]]
        self.rewards += rewards
        if rewards:
            self.client_rewards.setdefault(what["client"], []).extend(rewards)
        if table == "rollout":
            self.num_commits += len(items)
            self.fragments |= dict.fromkeys(items, (what["number"], what["version"]))
            return
        self.num_inserts += len(items)
        for evicted in self.committed[: max(0, len(self.committed) + len(items) - CAPACITY)]:
            del self.masses[evicted]
        self.committed = [*self.committed, *items][-CAPACITY:]
        td_errors = [np.nan] * len(items) if what["td_errors"] is None else what["td_errors"].tolist()
        largest = max(self.masses.values(), default=1.0)
        for item, td_error in zip(items, td_errors, strict=True):
            self.masses[item] = largest if np.isnan(td_error) else td_error + EPSILON

    def update(self, masses):
        self.masses |= dict(masses)

    def sample(self, table, num_samples):
        if table == "replay":
            self.num_samples = num_samples

    def clear(self, table, finished):
        if table == "replay":
            self.committed, self.masses = [], {}
        else:
            self.empty(finished)

    def empty(self, items):
        for item in items:
            del self.fragments[item]
