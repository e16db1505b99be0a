"""The server's decisions on rollouts in any order, against a plain model of who holds which fragment.

The model does not foresee what the server sends. It follows the messages one by one, says of each whether it was
allowed, and says afterwards whether somebody waits who could go on.
"""

import random
from collections import Counter
from types import SimpleNamespace

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
    rollout_table,
    snapshot,
    token,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rl_buffer import messages
from rl_buffer.frames import Commit, Credit, Grant

FREE, WRITING, FINISHED, READING = "free", "writing", "finished", "reading"


class Fragment(SimpleNamespace):
    """A row: its `state`, `generation`, `holder` (of those written or read), `order` of hand-out, and `version`."""


class Model:
    """One fragment after the other, and everybody waits in a list."""

    def __init__(self, config):
        self.config = config
        self.waits = config.when_late == "wait"
        rows = range(config.num_fragments)
        self.fragments = [Fragment(row=row, state=FREE, generation=0, holder=None) for row in rows]
        self.version = self.num_begun = self.num_commits = self.num_dropped = self.num_hand_outs = 0
        self.sequences = {}  # of commits by writer
        self.num_grants = Counter()  # by writer
        self.wanting = []  # writers, first come first served
        self.readers = {}  # credits; the one whose last fragments are longest ago comes first

    def all(self, *states, holder=None):
        return [f for f in self.fragments if f.state in states and holder in (None, f.holder)]

    def held_by(self, channel):
        """The rows that a writer or reader holds."""
        return [f.row for f in self.all(WRITING, READING, holder=channel)]

    def may_begin(self):
        limit = (self.config.max_version_lag + 1) * self.config.fragments_per_update if self.waits else np.inf
        return len(self.all(WRITING, FINISHED, READING)) < min(limit, self.config.num_fragments)

    def due(self):
        """The finished fragment that is handed out next, if one may be."""
        first = min(self.all(FINISHED), key=lambda f: f.order, default=None)
        overtakes = first and self.waits and any(f.order < first.order for f in self.all(WRITING))
        return None if overtakes else first

    def is_late(self, fragment):
        limit = self.config.max_version_lag
        return limit is not None and self.version - fragment.version > limit

    def commit(self, writer, version, wants):
        (fragment,) = self.all(WRITING, holder=writer)
        fragment.state, fragment.version = FINISHED, version
        fragment.generation += 1
        if not self.waits:
            fragment.order = self.num_commits
        self.num_commits += 1
        self.sequences[writer] += 1
        self.wanting += [writer] * wants

    def follow(self, events):
        """Take what the server sent, and see that nobody waits who could go on."""
        for receiver, event in events:
            self.drop_late()
            (self.follow_grant if isinstance(event, Grant) else self.follow_batch)(receiver, event)
        self.drop_late()
        assert not (self.wanting and self.may_begin()), "a writer waits for a fragment that is there"
        assert not (self.due() and any(self.readers.values())), "a reader waits for a fragment that is there"

    def follow_grant(self, writer, grant):
        self.num_grants[writer] += 1
        assert (grant.epoch, grant.number) == (EPOCH, self.num_grants[writer])
        assert grant.acknowledged == self.sequences[writer]
        if len(grant.rows):
            assert self.may_begin()
            assert self.wanting.pop(0) == writer, "not the first in the queue"
            (row,) = grant.rows
            fragment = self.fragments[row]
            assert fragment.state == FREE
            fragment.state, fragment.holder, fragment.order = WRITING, writer, self.num_begun
            self.num_begun += 1

    def follow_batch(self, reader, batch):
        rows, generations = batch.sample.rows.tolist(), batch.sample.generations.tolist()
        assert reader == next(reader for reader, num_credits in self.readers.items() if num_credits)
        assert len(rows) == batch.batch_size <= self.readers[reader]
        for row, generation in zip(rows, generations, strict=True):
            fragment = self.due()
            assert (fragment.row, fragment.generation) == (row, generation)
            assert not self.is_late(fragment)
            fragment.state, fragment.holder = READING, reader
            self.num_hand_outs += 1
            self.drop_late(num_credits=self.readers[reader] - len(rows))
        self.readers[reader] = self.readers.pop(reader) - len(rows)
        assert batch.sample.num_items == len(self.all(FINISHED))

    def drop_late(self, num_credits=None):
        """What nobody wants to read yet may still be there, however late."""
        while (any(self.readers.values()) if num_credits is None else num_credits) and self.due():
            if not self.is_late(self.due()):
                return
            self.free([self.due()])
            self.num_dropped += 1

    def free(self, fragments):
        for fragment in fragments:
            fragment.state = FREE
            fragment.generation += 1

    def leave(self, channel):
        """A writer's fragment is freed; what a reader held is handed out again."""
        for fragment in self.all(WRITING, READING, holder=channel):
            fragment.state = FREE if fragment.state == WRITING else FINISHED
        self.sequences.pop(channel, None)
        self.readers.pop(channel, None)
        self.wanting = [writer for writer in self.wanting if writer != channel]


BAD_COMMITS = [
    {"sequence": 0},
    {"sequence": 2**64 - 1},
    {"epoch": EPOCH ^ 1},
    {"num_rows": 2},
    {"num_wanted": 1},
    {"td_errors": floats()},
]
picks = st.integers(0, 11)


def picked(population, pick):
    return list(population)[pick % len(population)]


def credit(num_credits, rows=(), generations=()):
    return Credit(EPOCH, num_credits, 0, ints(*rows), ints(*generations), floats(*[0.0] * len(rows)))


class RolloutMachine(RuleBasedStateMachine):
    """Several clients, writers and readers in any order, with good and bad messages. `pick` chooses among the live."""

    config = rollout_table(num_fragments=4)

    @initialize()
    def start(self):
        self.core = make_core(rollout=self.config)
        self.state = self.core.tables["rollout"].state
        self.model = Model(self.config)
        self.clients = {}
        self.num_clients = self.num_channels = self.num_written = 0
        self.publisher = None
        self.contents = [None] * self.config.num_fragments  # what writers wrote, by row
        self.finished = [None] * self.config.num_fragments  # what it must be as long as somebody may read it
        self.num_deliveries, self.num_given_back = Counter(), Counter()  # of contents
        for number in range(3):
            self.attach()
            (self.open_reader if number == 2 else self.open_writer)(number)

    def send(self, channel, message):
        return decoded(self.core.handle(channel, message.encode(), 0.0))

    def refused(self, *messages):
        before, num_refused = snapshot(self.core), self.core.num_refused
        for channel, message in messages:
            reason(self.send(channel, message))
        assert snapshot(self.core) == before
        assert self.core.num_refused == num_refused + len(messages)

    def follow(self, events):
        self.model.follow(events)
        for _, event in events:
            if not isinstance(event, Grant):
                for row in event.sample.rows:
                    assert self.contents[row] == self.finished[row], "somebody wrote into a finished fragment"
                    self.num_deliveries[self.contents[row]] += 1

    @precondition(lambda self: len(self.clients) < 5)
    @rule()
    def attach(self):
        self.clients[self.num_clients] = Client(self.core, self.num_clients)
        self.num_clients += 1

    @rule(pick=picks)
    def open_writer(self, pick):
        client = self.clients[picked(self.clients, pick)]
        self.num_channels += 1
        writer = client.id(self.num_channels)
        self.model.sequences[writer] = 0
        self.model.wanting.append(writer)
        self.follow(client.open_rollout_writer(self.num_channels))

    @rule(pick=picks)
    def open_reader(self, pick):
        client = self.clients[picked(self.clients, pick)]
        self.num_channels += 1
        assert client.open_reader(self.num_channels) == []
        self.model.readers[client.id(self.num_channels)] = 0

    @precondition(lambda self: self.model.all(WRITING))
    @rule(pick=picks, lag=st.integers(0, 3), wants=st.sampled_from([1, 1, 1, 0]))
    def commit(self, pick, lag, wants):
        fragment = picked(self.model.all(WRITING), pick)
        writer, row, version = fragment.holder, fragment.row, max(0, self.model.version - lag)
        self.num_written += 1
        self.contents[row] = self.finished[row] = self.num_written
        self.model.commit(writer, version, wants)
        commit = Commit(EPOCH, 1, self.model.sequences[writer], version, wants, None, [])
        events = self.send(writer, commit)
        assert events[0][0] == writer, "the commit was not acknowledged"
        self.follow(events)
        self.refused((writer, commit))

    @precondition(lambda self: self.model.readers)
    @rule(pick=picks, num_credits=st.integers(0, 3), num_released=st.integers(0, 2), shuffler=st.randoms())
    def read(self, pick, num_credits, num_released, shuffler):
        """Release some fragments and ask for others; then the release again, late and in vain."""
        reader = picked(self.model.readers, pick)
        held = self.model.all(READING, holder=reader)
        released = shuffler.sample(held, min(num_released, len(held)))
        num_credits = min(num_credits, self.config.num_fragments - self.model.readers[reader])
        release = credit(num_credits, [f.row for f in released], [f.generation for f in released])
        for fragment in released:
            assert self.contents[fragment.row] == self.finished[fragment.row]
        self.model.free(released)
        self.model.readers[reader] += num_credits
        self.follow(self.send(reader, release))
        if released:
            self.refused((reader, release._replace(num_credits=0)))

    @rule()
    def everybody_goes_on(self):
        """A round of what an undisturbed run is."""
        for pick in range(len(self.model.all(WRITING))):
            self.commit(pick, lag=0, wants=1)
        for pick in range(len(self.model.readers)):
            self.read(pick, num_credits=1, num_released=1, shuffler=random.Random(0))

    @rule(pick=picks, finishes=st.sampled_from([True, True, False]))
    def publish(self, pick, finishes):
        session = picked(self.clients, pick)
        if not finishes:
            reply, _ = self.clients[session].ask(messages.ReserveParameters("policy"))
            assert isinstance(reply, messages.Slot) == (self.publisher in (None, session))
            self.publisher = session if self.publisher is None else self.publisher
            return
        published = self.clients[session].publish()
        if self.publisher in (None, session):
            self.model.version, self.publisher = self.model.version + 1, None
            assert published == self.model.version
        else:
            assert "one publisher at a time" in published

    @precondition(lambda self: self.model.sequences and self.model.readers)
    @rule(pick=picks, changes=st.sampled_from(BAD_COMMITS), lift=st.sampled_from([-1, 0, 0, 1]))
    def bad_messages(self, pick, changes, lift):
        writer, reader = picked(self.model.sequences, pick), picked(self.model.readers, pick)
        commit = Commit(EPOCH, 0, self.model.sequences[writer] + 1, 0, 0, None, [])
        num_held = len(self.model.held_by(writer))
        self.refused(
            *((writer, commit._replace(**bad)) for bad in (changes, {"num_rows": num_held + 1})),
            (writer, credit(0)),
            (reader, commit),
            (reader, credit(self.config.num_fragments - self.model.readers[reader] + 1)),
            *((reader, release) for release in self.bad_releases(reader, pick, lift)),
        )

    def bad_releases(self, reader, pick, lift):
        """Of a fragment that this reader does not hold, or that was another one when it did, or named twice."""
        read = self.model.all(READING)
        yield credit(1, [picked([-1, self.config.num_fragments, 2**62], pick)], [1])
        if read:
            fragment = picked(read, pick)
            yield credit(1, [fragment.row] * 2, [fragment.generation] * 2)
            if fragment.holder != reader or lift:
                yield credit(1, [fragment.row], [fragment.generation + lift])

    def leave(self, channels):
        for channel in channels:
            self.num_given_back.update(self.finished[f.row] for f in self.model.all(READING, holder=channel))
            self.model.leave(channel)

    @precondition(lambda self: self.model.sequences or self.model.readers)
    @rule(pick=picks)
    def close(self, pick):
        channel = picked([*self.model.sequences, *self.model.readers], pick)
        client = next(client for client in self.clients.values() if channel[:16] == token(client.number))
        _, events = client.ask(messages.CloseChannel(int.from_bytes(channel[16:], "little")))
        self.leave([channel])
        self.follow(events)

    @precondition(lambda self: len(self.clients) > 1)
    @rule(pick=picks)
    def exit(self, pick):
        session = picked(self.clients, pick)
        del self.clients[session]
        before = snapshot(self.core)[1]
        self.core.disconnected(token(session))
        assert snapshot(self.core)[1] == before
        events = decoded(self.core.exited(token(session)))
        self.leave([c for c in [*self.model.sequences, *self.model.readers] if c[:16] == token(session)])
        self.publisher = None if self.publisher == session else self.publisher
        self.follow(events)

    @rule(pick=picks)
    def clear(self, pick):
        _, events = self.clients[picked(self.clients, pick)].ask(messages.Clear("rollout"))
        self.model.free(self.model.all(FINISHED))
        self.follow(events)

    @invariant()
    def check(self):
        self.the_server_is_what_the_model_is()
        self.fragments_stay_as_written_and_are_delivered_once_unless_given_back()
        for fragment in self.model.all(WRITING):
            self.contents[fragment.row] = "scribble"  # writers may write at any time

    def the_server_is_what_the_model_is(self):
        model, state, table = self.model, self.state, self.core.tables["rollout"]
        numbers = {WRITING: state.num_writing, FINISHED: len(state), READING: state.num_reading, FREE: state.num_free}
        assert {name: len(model.all(name)) for name in numbers} == numbers
        channels = [c for session in self.core.sessions.values() for c in session.channels.values()]
        assert {c.channel_id: sorted(c.rows) for c in channels} == {
            c: model.held_by(c) for c in [*model.sequences, *model.readers]
        }
        assert state.generations.tolist() == [fragment.generation for fragment in model.fragments]
        counts = (state.num_commits, state.num_dropped, state.num_handed_out)
        assert counts == (model.num_commits, model.num_dropped, model.num_hand_outs)
        assert [writer.channel_id for writer in table.wanting] == model.wanting
        assert [(r.channel_id, r.num_credits) for r in table.readers] == list(model.readers.items())
        check_tables(self.core)

    def fragments_stay_as_written_and_are_delivered_once_unless_given_back(self):
        for fragment in self.model.all(FINISHED, READING):
            content = self.finished[fragment.row]
            assert self.contents[fragment.row] == content, "somebody wrote into a finished fragment"
            is_read = fragment.state == READING
            assert self.num_deliveries[content] == self.num_given_back[content] + is_read
        assert all(self.num_deliveries[content] - number in (0, 1) for content, number in self.num_given_back.items())

    def teardown(self):
        """After everybody exited nothing is held."""
        while self.clients:
            self.exit(0)
        assert self.state.num_free + len(self.state) == self.config.num_fragments
        self.check()


class DroppingMachine(RolloutMachine):
    config = rollout_table(num_fragments=4, max_version_lag=1)


class WaitingMachine(RolloutMachine):
    config = rollout_table(num_fragments=5, max_version_lag=1, when_late="wait", fragments_per_update=2)


MACHINE_SETTINGS = settings(
    max_examples=120, stateful_step_count=40, deadline=None, derandomize=True, report_multiple_bugs=False
)
for _machine in (RolloutMachine, DroppingMachine, WaitingMachine):
    _machine.TestCase.settings = MACHINE_SETTINGS
TestRollouts = RolloutMachine.TestCase
TestRolloutsThatAreDropped = DroppingMachine.TestCase
TestRolloutsWhoseWritersWait = WaitingMachine.TestCase
