"""The server's decisions in any order, against a plain model."""

import numpy as np
from core_driver import (
    EPOCH,
    Client,
    channel_id,
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
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule

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
        self.writers = {}  # id -> dict(held=[rows], wanted, sequence, closing, limit)
        self.samplers = []  # [id, batch_size, credits], longest without a batch first
        self.pending = []  # [id, sequence, rows left, wanted]
        self.wanting = []

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

    def take(self):
        """Rows for the first in the queue: (id, number of rows), or None."""
        if not self.wanting or self.writers[self.wanting[0]]["wanted"] > self.num_reservable:
            return None
        writer_id = self.wanting.pop(0)
        number, self.writers[writer_id]["wanted"] = self.writers[writer_id]["wanted"], 0
        return writer_id, number

    def want(self, writer_id, number):
        if number and not self.writers[writer_id]["wanted"]:
            self.wanting.append(writer_id)
        self.writers[writer_id]["wanted"] += number

    def advance(self, outgoing):
        """Follow what the server sent, message by message, and take up the rows that it granted."""
        outgoing = list(outgoing)

        def expect_grant(writer_id, acknowledged_sequence, number):
            receiver, grant = outgoing.pop(0)
            assert (receiver, grant.epoch) == (writer_id, EPOCH)
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
                    if not any(entry[2] for entry in self.pending if entry[0] == writer_id):
                        self.drop(writer_id)
                    continue
                self.want(writer_id, wanted)
                taken = self.take() if writer["wanted"] and self.wanting[0] == writer_id else None
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


class ServerMachine(RuleBasedStateMachine):
    """Several clients, writers and samplers in any order, with good and bad messages."""

    limiter = MinSize(3)
    bounds = (1.0, 3, -np.inf, np.inf)  # ratio, minimum size, min_diff, max_diff
    sampler = Prioritized(alpha=1.0)

    sessions = Bundle("sessions")
    writers = Bundle("writers")
    samplers = Bundle("samplers")

    @initialize(target=sessions)
    def start(self):
        self.core = make_core(
            replay={"capacity": 10, "headroom": 12, "sampler": self.sampler, "rate_limiter": self.limiter}
        )
        self.state = self.core.tables["replay"].state
        self.state.limiter = CheckedLimiter(self.limiter)
        self.model = Model(self.state.config, *self.bounds)
        self.num_channels = 0
        self.contents = [None] * self.state.config.num_rows  # what writers wrote, by row
        self.written = {}  # what each committed row must still hold
        self.num_written = 0
        self.past = []
        self.clients = {0: Client(self.core, 0), 1: Client(self.core, 1)}
        return multiple(0, 1)

    @rule(target=sessions)
    def attach(self):
        number = max(self.clients, default=0) + 1
        if number > 6:
            return multiple()
        self.clients[number] = Client(self.core, number)
        return number

    @rule(target=writers, session=sessions, limit=st.integers(1, 4), more=st.integers(0, 6))
    def open_writer(self, session, limit, more):
        if session not in self.clients:
            return multiple()
        self.num_channels += 1
        writer_id = channel_id(session, self.num_channels)
        reply, events = self.clients[session].ask(messages.OpenWriter(self.num_channels, "replay", limit, limit + more))
        assert reply == messages.Opened()
        self.model.writers[writer_id] = {
            "held": [],
            "wanted": 0,
            "sequence": 0,
            "acknowledged": 0,
            "closing": False,
            "limit": limit,
            "most": limit + more,
        }
        self.model.want(writer_id, limit + more)
        self.model.advance(events)
        return session, self.num_channels

    @rule(target=samplers, session=sessions, batch_size=st.integers(1, 6))
    def open_sampler(self, session, batch_size):
        if session not in self.clients:
            return multiple()
        self.num_channels += 1
        self.clients[session].open_sampler(self.num_channels, batch_size=batch_size)
        self.model.samplers.append([channel_id(session, self.num_channels), batch_size, 0])
        return session, self.num_channels

    @rule(writer=writers, data=st.data(), td_error=st.sampled_from([None, np.nan, 0.0, -3.0]))
    def commit(self, writer, data, td_error):
        state = self.model.writers.get(channel_id(*writer))
        if state is None or state["closing"]:
            return
        num_rows = data.draw(st.integers(0, min(state["limit"], len(state["held"]))))
        num_wanted = data.draw(st.integers(0, num_rows))
        rows = state["held"][:num_rows]
        for row in rows:
            self.num_written += 1
            self.contents[row] = self.written[row] = self.num_written
        state["sequence"] += 1
        td_errors = None if td_error is None else np.full(num_rows, td_error)
        commit = Commit(EPOCH, num_rows, state["sequence"], 0, num_wanted, td_errors, [])
        out = self.core.handle(channel_id(*writer), commit.encode(), 0.0)
        state["held"] = state["held"][num_rows:]
        self.model.pending.append([channel_id(*writer), state["sequence"], rows, num_wanted])
        self.model.advance(decoded(out))

    @rule(writer=writers)
    def scribble(self, writer):
        """A writer may write into the rows that it holds, as often as it likes."""
        state = self.model.writers.get(channel_id(*writer))
        for row in state["held"] if state else ():
            self.contents[row] = "scribble"

    @rule(sampler=samplers, num_credits=st.integers(0, 3), data=st.data())
    def credit(self, sampler, num_credits, data):
        known = next((entry for entry in self.model.samplers if entry[0] == channel_id(*sampler)), None)
        if known is None:
            return
        rows, generations, errors = [], [], []
        if self.past and data.draw(st.booleans()):
            sample = data.draw(st.sampled_from(self.past))
            rows, generations = sample.rows.tolist(), sample.generations.tolist()
            errors = [float(index % 3) for index in range(len(rows))]
        credit = Credit(EPOCH, num_credits, 0, ints(*rows), ints(*generations), floats(*errors))
        if known[2] + num_credits > MAX_CREDITS:
            return
        self.model.stale += sum(self.model.generations[r] != g for r, g in zip(rows, generations, strict=True))
        out = self.core.handle(channel_id(*sampler), credit.encode(), 0.0)
        known[2] += num_credits
        self.model.advance(decoded(out))
        if hasattr(self.model, "last_sample"):
            self.past = [*self.past[-3:], self.model.last_sample]

    @rule(sampler=samplers, row=st.integers(0, 21), lift=st.integers(0, 2))
    def forge_update(self, sampler, row, lift):
        """A generation that was never in a sample: of a free or reserved row, or to come."""
        known = any(entry[0] == channel_id(*sampler) for entry in self.model.samplers)
        generation = self.model.generations[row] + lift
        if not known or (lift == 0 and generation % 2):
            return
        credit = Credit(EPOCH, 0, 0, ints(row), ints(generation), floats(1.0))
        assert decoded(self.core.handle(channel_id(*sampler), credit.encode(), 0.0)) == []
        self.model.stale += 1

    @rule(
        writer=writers,
        changes=st.sampled_from(
            [
                {"sequence": 0},
                {"sequence": -1},
                {"sequence": 2},
                {"epoch": EPOCH ^ 1},
                {"num_rows": 99},
                {"num_wanted": 99},
                {"td_errors": "inf"},
            ]
        ),
    )
    def bad_commit(self, writer, changes):
        state = self.model.writers.get(channel_id(*writer))
        sequence = 1 + (state["sequence"] if state else 0)
        changes = dict(changes)
        if "sequence" in changes:
            changes["sequence"] = max(0, sequence + changes["sequence"] - (changes["sequence"] == 0))
        if "td_errors" in changes:
            if not state or not state["held"]:
                return
            changes |= {"td_errors": floats(np.inf), "num_rows": 1}
        self.refused(writer, Commit(EPOCH, 0, sequence, 0, 0, None, [])._replace(**changes).encode())

    @rule(
        sampler=samplers,
        credit=st.sampled_from(
            [
                Credit(EPOCH ^ 1, 1, 0, ints(), ints(), floats()),
                Credit(EPOCH, MAX_CREDITS + 1, 0, ints(), ints(), floats()),
                Credit(EPOCH, 1, 0, ints(0), ints(1), floats(np.nan)),
                Credit(EPOCH, 1, 0, ints(0, 99), ints(1, 1), floats(0.0, 0.0)),
            ]
        ),
    )
    def bad_credit(self, sampler, credit):
        self.refused(sampler, credit.encode())

    def refused(self, channel, frame):
        before, num_refused = snapshot(self.core), self.core.num_refused
        reason(decoded(self.core.handle(channel_id(*channel), frame, 0.0)))
        assert snapshot(self.core) == before
        assert self.core.num_refused == num_refused + 1

    @rule(channel=st.one_of(writers, samplers))
    def close(self, channel):
        session, number = channel
        if session not in self.clients:
            return
        _, events = self.clients[session].ask(messages.CloseChannel(number))
        writer = self.model.writers.get(channel_id(*channel))
        if writer and any(entry[2] for entry in self.model.pending if entry[0] == channel_id(*channel)):
            writer |= {"closing": True, "held": [], "wanted": 0}
            self.model.wanting = [other for other in self.model.wanting if other != channel_id(*channel)]
        else:
            self.model.drop(channel_id(*channel))
        self.model.advance(events)

    @rule(session=sessions)
    def disconnect(self, session):
        before = snapshot(self.core)[1]
        self.core.disconnected(token(session))
        assert snapshot(self.core)[1] == before

    @precondition(lambda self: len(self.clients) > 1)
    @rule(session=sessions)
    def exit(self, session):
        if self.clients.pop(session, None) is None:
            return
        out = self.core.exited(token(session))
        mine = [c for c in [*self.model.writers, *(s[0] for s in self.model.samplers)] if c[:16] == token(session)]
        for channel in mine:
            self.model.drop(channel)
        self.model.advance(decoded(out))

    @rule(session=sessions)
    def clear(self, session):
        if session not in self.clients:
            return
        _, events = self.clients[session].ask(messages.Clear("replay"))
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


class RatioServerMachine(ServerMachine):
    limiter = SampleToInsertRatio(2.0, 4, 8.0)
    bounds = (2.0, 4, 0.0, 16.0)


class NarrowServerMachine(ServerMachine):
    """The narrowest bounds: the two sides wait for each other all the time."""

    limiter = SampleToInsertRatio(1.0, 2, (-5.0, 2.0))
    bounds = (1.0, 2, -5.0, 2.0)


MACHINE_SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
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
