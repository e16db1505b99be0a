"""Items that leave with their last use, through the server in any order, against a plain model.

The model does not foresee what the server sends. It follows the messages one by one and says of each whether it was
allowed; afterwards it says whether somebody waits who could go on.
"""

from collections import Counter
from types import MappingProxyType

import numpy as np
from core_driver import EPOCH, Client, check_tables, decoded, floats, ints, make_core, reason, snapshot, token
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rl_buffer import messages
from rl_buffer.frames import Commit, Credit, Grant
from rl_buffer.rate_limiters import MinSize, Queue, SampleToInsertRatio, Stack
from rl_buffer.samplers import Fifo, Lifo, Prioritized, Uniform

picks = st.integers(0, 11)


def picked(population, pick):
    return list(population)[pick % len(population)]


class Item:
    """`uses` finished; `reader` while it is read."""

    def __init__(self, number, row):
        self.number, self.row, self.uses, self.reader, self.generation = number, row, 0, None, 0


class ItemMachine(RuleBasedStateMachine):
    """Two writers, two learners and whoever comes, with good and bad messages. `pick` chooses among the live."""

    table = MappingProxyType({"sampler": Fifo(), "rate_limiter": Queue(6), "max_times_sampled": 1, "capacity": 6})
    bounds = (1.0, 1, 0.0, 6.0)  # ratio, minimum size, min_diff, max_diff

    @initialize()
    def start(self):
        self.core = make_core(replay=dict(self.table) | {"headroom": 8})
        self.state = self.core.tables["replay"].state
        self.capacity, self.times = self.table["capacity"], self.table["max_times_sampled"]
        self.items = []  # in the table or read, by number
        self.num_inserts = self.num_samples = self.num_cleared = 0
        self.used, self.gone = Counter(), set()  # uses that were finished, by number; numbers that left early
        self.writers = {}  # id -> [rows held, sequence, numbers of items committed and not published]
        self.samplers = {}  # id -> [batch size, credits], longest without a batch first
        self.pending = []  # (writer, items that its commit has left)
        self.contents = {}  # row -> number of the item that was written there
        self.clients, self.num_clients, self.num_channels, self.num_written = {}, 0, 0, 0
        for number in range(4):
            self.attach()
            self.open_writer(number) if number < 2 else self.open_sampler(number, 2)

    # ---- the rules

    @property
    def waiting(self):
        return [item for item in self.items if item.reader is None]

    @property
    def size(self):
        return sum(item.reader is None or item.uses + 1 < self.times for item in self.items)

    @property
    def cursor(self):
        if isinstance(self.table["rate_limiter"], Queue | Stack):
            return self.size
        return self.num_inserts * self.bounds[0] - self.num_samples

    def may_insert(self):
        return self.size + 1 <= self.bounds[1] or self.cursor + self.bounds[0] <= self.bounds[3]

    def may_sample(self, n):
        return self.size >= self.bounds[1] and self.cursor - n >= self.bounds[2] and len(self.waiting) >= n

    def publish(self, writer):
        """The oldest commit's next item."""
        self.num_inserts += 1
        while len(self.waiting) >= self.capacity:  # more than that where a dead reader gave items back
            assert not isinstance(self.table["rate_limiter"], Queue | Stack), "a queue lost an item"
            self.leave(self.waiting[0])
        number, row = self.writers[writer][2].pop(0)
        self.items.append(Item(number, row))

    def leave(self, item):
        self.items.remove(item)
        self.gone.add(item.number)

    # ---- what the server says

    def follow(self, events):
        """Take what the server sent, after the items that its limiter lets pass before."""
        for receiver, event in events:
            if isinstance(event, Grant):
                self.advance_inserts()
                self.writers[receiver][0] += event.rows.tolist()
            else:
                self.advance_inserts()
                self.follow_batch(receiver, event)
        self.advance_inserts()
        first = next((s for s, (_, num_credits) in self.samplers.items() if num_credits), None)
        assert first is None or not self.may_sample(self.samplers[first][0]), "a sampler waits for items that are there"

    def advance_inserts(self):
        """Items of waiting commits pass one by one, first come first served."""
        while self.pending:
            writer, num_left = self.pending[0]
            while num_left and self.may_insert():
                self.publish(writer)
                num_left -= 1
            if num_left:
                self.pending[0] = (writer, num_left)
                return
            self.pending.pop(0)

    def follow_batch(self, sampler, batch):
        batch_size, num_credits = self.samplers[sampler]
        assert sampler == next(s for s, (_, credits) in self.samplers.items() if credits), "it overtook another"
        assert batch.batch_size == batch_size == len(batch.sample.rows)
        assert self.may_sample(batch_size)
        by_row = {item.row: item for item in self.waiting}
        chosen = [by_row[row] for row in batch.sample.rows.tolist()]
        assert len({item.number for item in chosen}) == batch_size, "an item is in the batch twice"
        in_order = sorted(self.waiting, key=lambda item: item.number)
        if self.table["sampler"] == Fifo():
            assert chosen == in_order[:batch_size]
        if self.table["sampler"] == Lifo():
            assert chosen == in_order[::-1][:batch_size]
        for item, generation in zip(chosen, batch.sample.generations.tolist(), strict=True):
            item.reader, item.generation = sampler, generation
            assert self.contents[item.row] == item.number, "the row holds something else"
        self.num_samples += batch_size
        self.samplers[sampler] = [batch_size, num_credits - 1]
        self.samplers[sampler] = self.samplers.pop(sampler)

    # ---- what clients do

    def send(self, channel, message):
        return decoded(self.core.handle(channel, message.encode(), 0.0))

    def refused(self, channel, message):
        before = snapshot(self.core)
        reason(self.send(channel, message))
        assert snapshot(self.core) == before

    @precondition(lambda self: len(self.clients) < 6)
    @rule()
    def attach(self):
        self.clients[self.num_clients] = Client(self.core, self.num_clients)
        self.num_clients += 1

    @rule(pick=picks)
    def open_writer(self, pick):
        client = self.clients[picked(self.clients, pick)]
        self.num_channels += 1
        self.writers[client.id(self.num_channels)] = [[], 0, []]
        self.follow(client.open_writer(self.num_channels, max_commit_rows=2, num_wanted=4))

    @rule(pick=picks, batch_size=st.integers(1, 3))
    def open_sampler(self, pick, batch_size):
        client = self.clients[picked(self.clients, pick)]
        self.num_channels += 1
        self.samplers[client.id(self.num_channels)] = [batch_size, 0]
        assert client.open_sampler(self.num_channels, batch_size=batch_size) == []

    @precondition(lambda self: self.writers)
    @rule(pick=picks, num_rows=st.integers(0, 2))
    def commit(self, pick, num_rows):
        writer = picked(self.writers, pick)
        held, sequence, numbers = self.writers[writer]
        num_rows = min(num_rows, len(held))
        for row in held[:num_rows]:
            self.num_written += 1
            self.contents[row] = self.num_written
            numbers.append((self.num_written, row))
        self.writers[writer] = [held[num_rows:], sequence + 1, numbers]
        self.pending.append((writer, num_rows))
        self.follow(self.send(writer, Commit(EPOCH, num_rows, sequence + 1, 0, num_rows, None, [])))

    @precondition(lambda self: self.samplers)
    @rule(pick=picks, num_credits=st.integers(0, 2), num_released=st.integers(0, 3), updates=st.booleans())
    def credit(self, pick, num_credits, num_released, updates):
        sampler = picked(self.samplers, pick)
        held = [item for item in self.items if item.reader == sampler][:num_released]
        td_errors = [np.nan] * len(held)
        rows, generations = [item.row for item in held], [item.generation for item in held]
        if updates and isinstance(self.table["sampler"], Prioritized) and self.waiting:
            rows, generations = [*rows, self.waiting[0].row], [*generations, self.waiting[0].generation or 1]
            td_errors.append(2.0)
        release = Credit(EPOCH, num_credits, 0, ints(*rows), ints(*generations), floats(*td_errors))
        for item in held:
            self.used[item.number] += 1
            item.uses, item.reader = item.uses + 1, None
            if item.uses == self.times:
                self.items.remove(item)
        self.samplers[sampler][1] += num_credits
        self.follow(self.send(sampler, release))
        if held:
            self.refused(sampler, release._replace(num_credits=0))  # late, and in vain

    @rule()
    def everybody_goes_on(self):
        for pick in range(len(self.writers)):
            self.commit(pick, num_rows=2)
        for pick in range(len(self.samplers)):
            self.credit(pick, num_credits=1, num_released=3, updates=False)

    @precondition(lambda self: self.samplers)
    @rule(pick=picks, lift=st.sampled_from([-2, 0, 2]))
    def bad_releases(self, pick, lift):
        """Of what another holds, of another generation, twice, or nowhere."""
        sampler = picked(self.samplers, pick)
        read = [item for item in self.items if item.reader]
        bad = [([picked([-1, 99, 2**62], pick)], [1])]
        if read:
            item = picked(read, pick)
            bad.append(([item.row] * 2, [item.generation] * 2))
            if item.reader != sampler or lift:
                bad.append(([item.row], [item.generation + lift]))
        for rows, generations in bad:
            self.refused(sampler, Credit(EPOCH, 1, 0, ints(*rows), ints(*generations), floats(*[np.nan] * len(rows))))

    def drop(self, channel):
        for item in self.items:
            if item.reader == channel:
                item.reader = None  # it waits where it was
                self.num_samples -= 1
        self.samplers.pop(channel, None)
        self.pending = [entry for entry in self.pending if entry[0] != channel]
        self.writers.pop(channel, None)

    @precondition(lambda self: len(self.clients) > 1)
    @rule(pick=picks)
    def exit(self, pick):
        session = picked(self.clients, pick)
        del self.clients[session]
        mine = [c for c in [*self.writers, *self.samplers] if c[:16] == token(session)]
        before = snapshot(self.core)[1]
        assert self.core.has_leases(token(session)) == bool(mine)
        self.core.disconnected(token(session))
        assert snapshot(self.core)[1] == before
        for channel in mine:
            self.drop(channel)
        self.follow(decoded(self.core.exited(token(session))))

    @precondition(lambda self: self.samplers)
    @rule(pick=picks)
    def close_sampler(self, pick):
        sampler = picked(self.samplers, pick)
        client = next(client for client in self.clients.values() if sampler[:16] == token(client.number))
        _, events = client.ask(messages.CloseChannel(int.from_bytes(sampler[16:], "little")))
        self.drop(sampler)
        self.follow(events)

    @rule(pick=picks)
    def clear(self, pick):
        _, events = self.clients[picked(self.clients, pick)].ask(messages.Clear("replay"))
        for item in self.waiting:
            self.leave(item)
        self.follow(events)

    @invariant()
    def the_server_is_what_the_model_is(self):
        state, table = self.state, self.core.tables["replay"]
        assert state._waiting.rows().tolist() == [item.row for item in self.waiting]
        reading = {item.row for item in self.items if item.reader}
        assert set(state._reading) == reading
        assert (state.limiter.num_inserts, state.limiter.num_samples) == (self.num_inserts, self.num_samples)
        assert (state.limiter.size, state.limiter.cursor) == (self.size, self.cursor)
        assert [(s.channel_id, s.batch_size, s.num_credits) for s in table.samplers] == [
            (s, *rest) for s, rest in self.samplers.items()
        ]
        check_tables(self.core)
        for item in self.items:
            assert self.contents[item.row] == item.number, "somebody wrote into an item"
            assert self.used[item.number] < self.times
        left = {number for number, times in self.used.items() if times == self.times} | self.gone
        assert len(left) + len(self.items) == self.num_inserts, "an item left before its last use"
        for held, _, _ in self.writers.values():
            for row in held:
                self.contents[row] = "scribble"  # writers may write at any time

    def teardown(self):
        while self.clients:
            self.exit(0)
        assert self.state.num_reserved == self.state.num_reading == 0
        self.the_server_is_what_the_model_is()


class StackMachine(ItemMachine):
    table = MappingProxyType({"sampler": Lifo(), "rate_limiter": Stack(5), "max_times_sampled": 1, "capacity": 6})
    bounds = (1.0, 1, 0.0, 5.0)


class UniformMachine(ItemMachine):
    """Items are evicted, too."""

    table = MappingProxyType({"sampler": Uniform(), "rate_limiter": MinSize(2), "max_times_sampled": 2, "capacity": 5})
    bounds = (1.0, 2, -np.inf, np.inf)


class PrioritizedMachine(ItemMachine):
    table = MappingProxyType(
        {
            "sampler": Prioritized(alpha=1.0),
            "rate_limiter": SampleToInsertRatio(2.0, 3, (-4.0, 12.0)),
            "max_times_sampled": 3,
            "capacity": 6,
        }
    )
    bounds = (2.0, 3, -4.0, 12.0)


MACHINE_SETTINGS = settings(
    max_examples=25, stateful_step_count=40, deadline=None, derandomize=True, report_multiple_bugs=False
)
for _machine in (ItemMachine, StackMachine, UniformMachine, PrioritizedMachine):
    _machine.TestCase.settings = MACHINE_SETTINGS
TestQueue = ItemMachine.TestCase
TestStack = StackMachine.TestCase
TestUniform = UniformMachine.TestCase
TestPrioritized = PrioritizedMachine.TestCase
