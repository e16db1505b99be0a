"""The server's decisions in any order, against a plain model."""

import numpy as np
from core_driver import (
    EPOCH,
    Client,
    check_tables,
    decoded,
    floats,
    ints,
    make_core,
    reason,
    snapshot,
    token,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rl_buffer import messages
from rl_buffer.frames import Commit, Credit, Grant
from rl_buffer.rate_limiters import MinSize, RateLimiter, SampleToInsertRatio
from rl_buffer.samplers import Prioritized
from rl_buffer.server_core import MAX_CREDITS


class CheckedLimiter(RateLimiter):
    """Looks at its bounds at every count."""

    def inserted(self, num_items):
        super().inserted(num_items)
        assert self.size <= self._min_size or self.cursor <= self._max_diff

    def sampled(self, num_draws):
        super().sampled(num_draws)
        assert self.size >= self._min_size
        assert self.cursor >= self._min_diff


class Model:
    """The table as lists: items pass one by one, and everybody waits in a list."""

    def __init__(self, config, ratio, min_size, min_diff, max_diff):
        self.config = config
        self.ratio, self.min_size, self.min_diff, self.max_diff = ratio, min_size, min_diff, max_diff
        self.committed, self.generations = [], [0] * config.num_rows
        self.inserts = self.samples = self.stale = 0
        self.writers = {}  # id -> dict(held=[rows], wanted, sequence, num_grants, closing, limit)
        self.samplers = []  # [id, batch_size, credits], longest without a batch first
        self.pending = []  # [id, sequence, rows left, wanted]
        self.wanting = []

    def open_writers(self):
        return [writer_id for writer_id, writer in self.writers.items() if not writer["closing"]]

    @property
    def num_reservable(self):
        waiting = sum(len(rows) for _, _, rows, _ in self.pending)
        return self.config.headroom - waiting - sum(len(writer["held"]) for writer in self.writers.values())

    def insert(self, row):
        self.committed.append(row)
        self.generations[row] += 1
        self.inserts += 1
        if len(self.committed) > self.config.capacity:
            self.evict()

    def evict(self):
        self.generations[self.committed.pop(0)] += 1

    def may_insert(self):
        after = (self.inserts + 1) * self.ratio - self.samples
        return len(self.committed) < self.min_size or after <= self.max_diff

    def next_grant(self):
        """(id, number of rows) of whose turn it is, or None: see `ServedTable.next_grant`."""
        lacking = {w: self.writers[w]["limit"] - len(self.writers[w]["held"]) for w in self.wanting}
        first = [w for w in self.wanting if lacking[w] > 0]
        parts = [w for w in first if self.writers[w]["held"]]
        if len(self.wanting) == 1 and self.writers[self.wanting[0]]["wanted"] <= self.num_reservable:
            return self.wanting[0], self.writers[self.wanting[0]]["wanted"]
        amounts = [(w, min(lacking[w], self.writers[w]["wanted"])) for w in first[:1] + parts]
        if not first:
            amounts = [(w, self.writers[w]["wanted"]) for w in self.wanting[:1]]
        return next(((w, number) for w, number in amounts if number <= self.num_reservable), None)

    def take(self):
        """Rows for whose turn it is: (id, number of rows), or None."""
        if (grant := self.next_grant()) is not None:
            writer_id, number = grant
            self.wanting.remove(writer_id)
            self.writers[writer_id]["wanted"] -= number
            if self.writers[writer_id]["wanted"]:
                self.wanting.append(writer_id)
        return grant

    def want(self, writer_id, number):
        if number and not self.writers[writer_id]["wanted"]:
            self.wanting.append(writer_id)
        self.writers[writer_id]["wanted"] += number

    def advance(self, outgoing):
        """Follow what the server sent, message by message, and take up the rows that it granted."""
        outgoing = list(outgoing)

        def expect_grant(writer_id, acknowledged_sequence, number):
            receiver, grant = outgoing.pop(0)
            self.writers[writer_id]["num_grants"] += 1
            assert (receiver, grant.epoch, grant.number) == (writer_id, EPOCH, self.writers[writer_id]["num_grants"])
            assert (grant.acknowledged, len(grant.rows)) == (acknowledged_sequence, number)
            taken = set(self.committed).union(*(writer["held"] for writer in self.writers.values()))
            taken = taken.union(*(rows for _, _, rows, _ in self.pending))
            assert not taken & set(grant.rows.tolist()), "a granted row belongs to somebody"
            self.writers[writer_id]["held"] += grant.rows.tolist()

        while True:
            while self.pending:
                writer_id, sequence, rows, wanted = self.pending[0]
                while rows and self.may_insert():
                    self.insert(rows.pop(0))
                if rows:
                    break
                self.pending.pop(0)
                writer = self.writers[writer_id]
                writer["acknowledged"] = sequence
                if writer["closing"]:
                    if writer_id not in (entry[0] for entry in self.pending):
                        self.drop(writer_id)
                    continue
                self.want(writer_id, wanted)
                grant = self.next_grant()
                taken = self.take() if grant and grant[0] == writer_id else None
                expect_grant(writer_id, sequence, taken[1] if taken else 0)
            ready = next((sampler for sampler in self.samplers if sampler[2]), None)
            if ready is None or len(self.committed) < self.min_size:
                break
            if self.inserts * self.ratio - self.samples - ready[1] < self.min_diff:
                break
            receiver, batch = outgoing.pop(0)
            assert (receiver, batch.batch_size, batch.epoch) == (ready[0], ready[1], EPOCH)
            assert set(batch.sample.rows.tolist()) <= set(self.committed), "sampled what is not committed"
            assert batch.sample.generations.tolist() == [self.generations[row] for row in batch.sample.rows]
            assert batch.sample.num_items == len(self.committed)
            assert len(batch.sample.rows) == ready[1] + 4 + ready[1] // 16
            self.samples += ready[1]
            ready[2] -= 1
            self.samplers.remove(ready)
            self.samplers.append(ready)
            self.last_sample = batch.sample
        while taken := self.take():
            expect_grant(taken[0], self.writers[taken[0]]["acknowledged"], taken[1])
        assert outgoing == []

    def drop(self, channel):
        self.samplers = [sampler for sampler in self.samplers if sampler[0] != channel]
        self.pending = [entry for entry in self.pending if entry[0] != channel]
        self.wanting = [writer for writer in self.wanting if writer != channel]
        self.writers.pop(channel, None)


BAD_COMMITS = [
    {"sequence": 0},
    {"sequence": 2**64 - 1},
    {"epoch": EPOCH ^ 1},
    {"num_rows": 99},
    {"num_wanted": 99},
    {"num_rows": 1, "td_errors": floats(np.inf)},
]
BAD_CREDITS = [
    Credit(EPOCH ^ 1, 1, 0, ints(), ints(), floats()),
    Credit(EPOCH, MAX_CREDITS + 1, 0, ints(), ints(), floats()),
    Credit(EPOCH, 1, 0, ints(0), ints(1), floats(np.nan)),
    Credit(EPOCH, 1, 0, ints(0, 99), ints(1, 1), floats(0.0, 0.0)),
]
picks = st.integers(0, 11)


def picked(population, pick):
    return list(population)[pick % len(population)]


class ServerMachine(RuleBasedStateMachine):
    """Several clients, writers and samplers in any order, with good and bad messages. `pick` chooses among the live."""

    limiter = MinSize(3)
    bounds = (1.0, 3, -np.inf, np.inf)  # ratio, minimum size, min_diff, max_diff
    sampler = Prioritized(alpha=1.0)

    @initialize()
    def start(self):
        self.core = make_core(
            replay={"capacity": 10, "headroom": 12, "sampler": self.sampler, "rate_limiter": self.limiter}
        )
        self.state = self.core.tables["replay"].state
        self.state.limiter = CheckedLimiter(self.limiter)
        self.model = Model(self.state.config, *self.bounds)
        self.contents = [None] * self.state.config.num_rows  # what writers wrote, by row
        self.written = {}  # what each committed row must still hold
        self.past = []  # samples
        self.clients = {}
        self.num_clients = self.num_channels = self.num_written = 0
        for number in range(3):
            self.attach()
            self.open_sampler(number, 2) if number == 2 else self.open_writer(number, 2, 2)

    def send(self, channel, message):
        return decoded(self.core.handle(channel, message.encode(), 0.0))

    def refused(self, *messages):
        before, num_refused = snapshot(self.core), self.core.num_refused
        for channel, message in messages:
            reason(self.send(channel, message))
        assert snapshot(self.core) == before
        assert self.core.num_refused == num_refused + len(messages)

    @precondition(lambda self: len(self.clients) < 5)
    @rule()
    def attach(self):
        self.clients[self.num_clients] = Client(self.core, self.num_clients)
        self.num_clients += 1

    @rule(pick=picks, limit=st.integers(1, 4), more=st.integers(0, 4))
    def open_writer(self, pick, limit, more):
        client = self.clients[picked(self.clients, pick)]
        self.num_channels += 1
        writer = client.id(self.num_channels)
        reply, events = client.ask(messages.OpenWriter(self.num_channels, "replay", limit, limit + more))
        assert reply == messages.Opened()
        self.model.writers[writer] = {
            "held": [],
            "wanted": 0,
            "sequence": 0,
            "acknowledged": 0,
            "num_grants": 0,
            "closing": False,
            "limit": limit,
            "most": limit + more,
        }
        self.model.want(writer, limit + more)
        self.model.advance(events)

    @rule(pick=picks, batch_size=st.integers(1, 6))
    def open_sampler(self, pick, batch_size):
        client = self.clients[picked(self.clients, pick)]
        self.num_channels += 1
        client.open_sampler(self.num_channels, batch_size=batch_size)
        self.model.samplers.append([client.id(self.num_channels), batch_size, 0])

    @precondition(lambda self: self.model.open_writers())
    @rule(
        pick=picks,
        num_rows=st.integers(0, 4),
        num_wanted=st.sampled_from([4, 4, 1, 0]),
        td_error=st.sampled_from([None, np.nan, 0.0, -3.0]),
    )
    def commit(self, pick, num_rows, num_wanted, td_error):
        writer = picked(self.model.open_writers(), pick)
        state = self.model.writers[writer]
        num_rows = min(num_rows, state["limit"], len(state["held"]))
        num_wanted = min(num_wanted, num_rows)
        rows, state["held"] = state["held"][:num_rows], state["held"][num_rows:]
        for row in rows:
            self.num_written += 1
            self.contents[row] = self.written[row] = self.num_written
        state["sequence"] += 1
        td_errors = None if td_error is None else np.full(num_rows, td_error)
        commit = Commit(EPOCH, num_rows, state["sequence"], 0, num_wanted, td_errors, [])
        self.model.pending.append([writer, state["sequence"], rows, num_wanted])
        self.model.advance(self.send(writer, commit))
        self.refused((writer, commit))

    @precondition(lambda self: self.model.samplers)
    @rule(pick=picks, num_credits=st.integers(0, 3), updates=st.booleans())
    def credit(self, pick, num_credits, updates):
        known = picked(self.model.samplers, pick)
        rows, generations, errors = [], [], []
        if self.past and updates:
            sample = picked(self.past, pick)
            rows, generations = sample.rows.tolist(), sample.generations.tolist()
            errors = [float(index % 3) for index in range(len(rows))]
        credit = Credit(EPOCH, num_credits, 0, ints(*rows), ints(*generations), floats(*errors))
        if known[2] + num_credits > MAX_CREDITS:
            return
        self.model.stale += sum(self.model.generations[r] != g for r, g in zip(rows, generations, strict=True))
        out = self.send(known[0], credit)
        known[2] += num_credits
        self.model.advance(out)
        if hasattr(self.model, "last_sample"):
            self.past = [*self.past[-3:], self.model.last_sample]

    @rule()
    def everybody_goes_on(self):
        """A round of what an undisturbed run is."""
        for pick in range(len(self.model.open_writers())):
            self.commit(pick, num_rows=2, num_wanted=4, td_error=None)
        for _ in self.model.samplers:
            self.credit(0, num_credits=1, updates=False)

    @precondition(lambda self: self.model.samplers)
    @rule(pick=picks, row=st.integers(0, 21), lift=st.integers(0, 2))
    def forge_update(self, pick, row, lift):
        """A generation that was never in a sample: of a free or reserved row, or to come."""
        generation = self.model.generations[row] + lift
        if lift == 0 and generation % 2:
            return
        credit = Credit(EPOCH, 0, 0, ints(row), ints(generation), floats(1.0))
        assert self.send(picked(self.model.samplers, pick)[0], credit) == []
        self.model.stale += 1

    @precondition(lambda self: self.model.open_writers() and self.model.samplers)
    @rule(pick=picks, changes=st.sampled_from(BAD_COMMITS), credit=st.sampled_from(BAD_CREDITS))
    def bad_messages(self, pick, changes, credit):
        writer, sampler = picked(self.model.open_writers(), pick), picked(self.model.samplers, pick)[0]
        state = self.model.writers[writer]
        commit = Commit(EPOCH, 0, state["sequence"] + 1, 0, 0, None, [])
        too_many = {"num_rows": len(state["held"]) + 1}
        self.refused(
            *((writer, commit._replace(**bad)) for bad in (changes, too_many)),
            *((sampler, message) for message in (credit, commit)),
            (writer, credit._replace(epoch=EPOCH)),
        )

    @precondition(lambda self: self.model.writers or self.model.samplers)
    @rule(pick=picks)
    def close(self, pick):
        channel = picked([*self.model.writers, *(sampler[0] for sampler in self.model.samplers)], pick)
        client = next(client for client in self.clients.values() if channel[:16] == token(client.number))
        _, events = client.ask(messages.CloseChannel(int.from_bytes(channel[16:], "little")))
        writer = self.model.writers.get(channel)
        if channel in (entry[0] for entry in self.model.pending):
            writer |= {"closing": True, "held": [], "wanted": 0}
            self.model.wanting = [other for other in self.model.wanting if other != channel]
        else:
            self.model.drop(channel)
        self.model.advance(events)

    @precondition(lambda self: len(self.clients) > 1)
    @rule(pick=picks)
    def exit(self, pick):
        session = picked(self.clients, pick)
        del self.clients[session]
        before = snapshot(self.core)[1]
        self.core.disconnected(token(session))
        assert snapshot(self.core)[1] == before
        out = self.core.exited(token(session))
        mine = [c for c in [*self.model.writers, *(s[0] for s in self.model.samplers)] if c[:16] == token(session)]
        for channel in mine:
            self.model.drop(channel)
        self.model.advance(decoded(out))

    @rule(pick=picks)
    def clear(self, pick):
        _, events = self.clients[picked(self.clients, pick)].ask(messages.Clear("replay"))
        while self.model.committed:
            self.model.evict()
        self.model.advance(events)

    @invariant()
    def the_server_is_what_the_model_is(self):
        model, state, table = self.model, self.state, self.core.tables["replay"]
        assert state.allocator.committed().tolist() == model.committed
        assert state.generations.tolist() == model.generations
        assert (state.limiter.num_inserts, state.limiter.num_samples) == (model.inserts, model.samples)
        assert state.num_stale_updates == model.stale
        assert state.allocator.num_reservable == model.num_reservable
        assert [p.writer.channel_id for p in table.pending] == [entry[0] for entry in model.pending]
        assert [writer.channel_id for writer in table.wanting] == model.wanting
        assert [[s.channel_id, s.batch_size, s.num_credits] for s in table.samplers] == model.samplers
        check_tables(self.core)
        for row in model.committed:
            assert self.contents[row] == self.written[row], "somebody wrote into a committed row"
        for writer in model.writers.values():
            assert len(writer["held"]) + writer["wanted"] <= writer["most"]
            for row in writer["held"]:
                self.contents[row] = "scribble"  # a writer may write at any time

    def teardown(self):
        """After everybody exited nothing is reserved."""
        while self.clients:
            self.exit(0)
        assert self.state.allocator.num_reserved == 0
        self.the_server_is_what_the_model_is()


class RatioServerMachine(ServerMachine):
    limiter = SampleToInsertRatio(2.0, 4, 8.0)
    bounds = (2.0, 4, 0.0, 16.0)


class NarrowServerMachine(ServerMachine):
    """The narrowest bounds: the two sides wait for each other all the time."""

    limiter = SampleToInsertRatio(1.0, 2, (-5.0, 2.0))
    bounds = (1.0, 2, -5.0, 2.0)


MACHINE_SETTINGS = settings(
    max_examples=100, stateful_step_count=40, deadline=None, derandomize=True, report_multiple_bugs=False
)
for _machine in (ServerMachine, RatioServerMachine, NarrowServerMachine):
    _machine.TestCase.settings = MACHINE_SETTINGS
TestServer = ServerMachine.TestCase
TestServerWithRatio = RatioServerMachine.TestCase
TestServerWithNarrowRatio = NarrowServerMachine.TestCase


@given(seed=st.integers(0, 2**32 - 1), ratio=st.sampled_from([0.5, 1.0, 3.0]), slack=st.sampled_from([1.0, 2.5]))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_over_any_schedule_the_limiter_keeps_its_bounds_and_somebody_can_go_on(seed, ratio, slack):
    rng = np.random.default_rng(seed)
    limiter = SampleToInsertRatio(ratio, 5, 4.0 * slack * max(1.0, ratio))
    core = make_core(replay={"capacity": 16, "headroom": 16, "rate_limiter": limiter})
    state = core.tables["replay"].state
    state.limiter = CheckedLimiter(limiter)
    clients = [Client(core, number) for number in range(4)]
    for client in clients:
        client.open_writer(channel=1, max_commit_rows=2, num_wanted=4)
        client.open_sampler(channel=2, batch_size=2)
    held = [4] * 4
    for _ in range(200):
        number = int(rng.integers(4))
        client = clients[number]
        if rng.random() < 0.5 and held[number] >= 2:
            held[number] -= 2
            events = client.commit(num_rows=2)
        elif core.sessions[token(number)].channels[client.id(2)].num_credits < 4:
            events = client.credit(channel=2)
        else:
            continue
        for receiver, event in events:
            if isinstance(event, Grant):
                held[receiver[0] - 1] += len(event.rows)
        table = core.tables["replay"]
        waits_to_sample = any(sampler.num_credits for sampler in table.samplers)
        assert not (table.pending and waits_to_sample), "writers and learners wait for each other"
    assert state.limiter.num_inserts > 0
    check_tables(core)
