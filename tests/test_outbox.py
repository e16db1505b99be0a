"""The `Outbox` of a writer and the server's core, without sockets: what goes where when either loses the other."""

import itertools
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
from core_driver import RATIO, SPEC, Client, channel_id, check_tables, decoded, make_core, reason, snapshot, token
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_buffer import frames, messages, server_core
from rl_buffer.errors import DeadlineExceeded, RequestRefused
from rl_buffer.frames import Commit, Credit, Grant
from rl_buffer.outbox import Outbox
from rl_buffer.rollout_table import RolloutTableState
from rl_buffer.stats_tracker import Episode
from rl_buffer.tables import RolloutTable

MAX_COMMIT_ROWS, NUM_WANTED = 3, 6
ID = bytes(range(16))
NOTHING = np.empty(0, np.int64)


class Line:
    """A process's way to a core, with the rows that both have mapped. It can lose what the core answers."""

    def __init__(self, core, rows=None):
        self.core = core
        self.generations = core.tables["replay"].state.generations
        self.rows = np.full(len(self.generations), -1) if rows is None else rows
        self.loses_answers = False
        self._session = -1
        self.attach()

    def attach(self):
        """Attach for the first time, or again."""
        previous, self._session = token(self._session), self._session + 1
        outgoing = self.core.attached_again(previous, 1)
        self.core.attach(token(self._session), "writer", 1, 0.0)
        self._numbers, self._inboxes = itertools.count(1), {}
        self._sort(outgoing)

    def channel(self):
        number = next(self._numbers)
        inbox = self._inboxes[number] = deque()
        segments = {"replay": [SimpleNamespace(array=lambda _, a=a: a) for a in (self.rows, self.generations)]}
        return SimpleNamespace(
            connection=SimpleNamespace(epoch=self.core.epoch, segments=segments),
            number=number,
            line=self,
            send=lambda frame: self.handle(number, frame),
            receive=lambda timeout_s: inbox.popleft() if inbox else None,
        )

    def handle(self, number, frame):
        return self._sort(self.core.handle(channel_id(self._session, number), frame, 0.0))

    def sample(self, sampler):
        """A draw, with which commits of the writer may pass."""
        self._sort(
            self.core.handle(sampler.id(1), Credit(self.core.epoch, 1, 0, NOTHING, NOTHING, NOTHING).encode(), 0.0)
        )

    def _sort(self, outgoing):
        replies = []
        for receiver, frame in outgoing:
            if self.loses_answers or receiver[: frames.TOKEN_NBYTES] != token(self._session):
                continue
            if frames.kind_of(frame) == frames.CONTROL:
                replies.append(messages.decode_control_reply(frame).reply)
            else:
                self._inboxes[int.from_bytes(receiver[frames.TOKEN_NBYTES :], "little")].append(frame)
        return replies

    def table(self):
        """What is in the table, in the order of its commits."""
        return self.rows[self.core.tables["replay"].state.allocator.committed()].tolist()


def call(channel, request):
    envelope = messages.Envelope(1, channel.connection.epoch, request)
    replies = channel.line.handle(channel.number, messages.encode_control(envelope))
    if not replies:
        raise DeadlineExceeded("lost")
    if isinstance(replies[0], messages.Refused):
        raise RequestRefused(replies[0].reason)
    return replies[0]


def new_outbox(line):
    outbox = Outbox(call, "replay", MAX_COMMIT_ROWS, NUM_WANTED)
    outbox.open(line.channel())
    return outbox


def send(outbox, numbers, version=0, td_errors=None, episodes=()):
    """One commit of rows that hold these numbers."""
    assert outbox.send_again(None)
    assert outbox.reserve(len(numbers), None)
    outbox.block[outbox.reserved[: len(numbers)], 0] = numbers
    outbox.send(len(numbers), version, td_errors, [Episode(0, float(reward), 1) for reward in episodes])


def rescued(outbox):
    return [words[:, 0].tolist() for words in outbox.rescued]


def num_episodes(core):
    return core.stats.get_statistics().get("train/num_episodes", 0)


def another_core(**options):
    core = make_core(**options)
    core.epoch += 1
    return core


# ---- another server ------------------------------------------------------------------------------------------


def test_what_is_acknowledged_is_forgotten_and_the_rest_goes_to_the_next_server_in_order():
    line, other = Line(make_core()), Line(another_core())
    outbox = new_outbox(line)
    send(outbox, [1, 2], episodes=[1.0])
    assert outbox.settle(0.0)
    line.loses_answers = True
    send(outbox, [3, 4, 5], version=7, episodes=[2.0])
    send(outbox, [6], version=8, td_errors=np.array([0.5]))
    outbox.rescue()
    assert rescued(outbox) == [[3, 4, 5], [6]]
    assert outbox.open(other.channel()) is True
    sent = []
    handle = other.core.handle
    other.core.handle = lambda *args: sent.append(frames.decode_commit(args[1])) or handle(*args)
    send(outbox, [7, 8, 9], version=1)
    assert other.table() == [3, 4, 5, 6, 7, 8, 9]
    assert [(commit.sequence, commit.parameter_version) for commit in sent] == [(2, 0), (3, 0), (4, 1)]
    assert sent[1].td_errors.tolist() == [0.5]
    assert num_episodes(other.core) == 1
    assert outbox.settle(0.0)
    assert not rescued(outbox)


def test_a_row_that_was_evicted_had_been_committed_and_is_not_sent_again():
    line, other = Line(make_core(replay={"headroom": 16})), Line(another_core())  # 8 rows each
    outbox = new_outbox(line)
    line.loses_answers = True
    send(outbox, [1, 2, 3], td_errors=np.array([0.1, 0.2, 0.3]), episodes=[1.0])
    send(outbox, [4, 5])
    stranger = Client(line.core, number=100)
    stranger.open_writer(max_commit_rows=5, num_wanted=5)
    stranger.commit(num_rows=5)
    assert line.table()[:3] == [3, 4, 5]
    line.rows[np.flatnonzero(line.rows == 1)] = -100  # it is somebody else's now
    outbox.rescue()
    assert rescued(outbox) == [[3], [4, 5]]
    outbox.open(other.channel())
    send(outbox, [6])
    assert other.table() == [3, 4, 5, 6]
    assert num_episodes(other.core) == 1


def test_what_a_server_acknowledged_before_it_was_lost_is_not_sent_again_although_nobody_had_looked():
    line = Line(make_core())
    outbox = new_outbox(line)
    send(outbox, [1, 2])
    outbox.rescue()
    assert rescued(outbox) == []
    assert outbox.acknowledged == 1


def test_what_was_rescued_is_not_read_from_the_lost_memory_again():
    line, other = Line(make_core()), Line(another_core())
    outbox = new_outbox(line)
    line.loses_answers = True
    send(outbox, [1, 2, 3])
    outbox.rescue()
    line.rows[:] = -1
    outbox.rescue()
    assert rescued(outbox) == [[1, 2, 3]]
    outbox.open(other.channel())
    assert len(outbox.reserved) == 0
    other.loses_answers = True  # from now on; it has granted rows
    assert outbox.send_again(None)
    third = Line(another_core())
    outbox.rescue()  # sent, and not acknowledged by the second either
    outbox.open(third.channel())
    send(outbox, [4])
    assert third.table() == [1, 2, 3, 4]


def test_rows_of_a_lost_server_are_not_written_any_more():
    line = Line(make_core())
    outbox = new_outbox(line)
    assert outbox.reserve(NUM_WANTED, None)
    outbox.rescue()
    assert len(outbox.reserved) == 0
    assert not outbox.reserve(1, None)


def test_a_refused_opening_changes_nothing():
    line, other = Line(make_core()), Line(another_core())
    outbox = new_outbox(line)
    line.loses_answers = True
    send(outbox, [1, 2])
    outbox.rescue()
    del other.core.tables["replay"]
    for _ in range(2):
        with pytest.raises(RequestRefused, match="no table is called 'replay'"):
            outbox.open(other.channel())
        assert rescued(outbox) == [[1, 2]]


# ---- the same server, attached to again ----------------------------------------------------------------------


def test_a_commit_that_is_published_in_part_goes_on_where_it_was_however_often_one_attaches():
    line = Line(make_core(replay={**RATIO, "capacity": 32, "headroom": 32}))  # takes 4, and one more for each sample
    outbox = new_outbox(line)
    send(outbox, [1, 2, 3], episodes=[1.0])
    send(outbox, [4, 5, 6], version=9, episodes=[2.0, 3.0])
    reader = Client(line.core, number=100)
    reader.open_sampler()
    for num_published in (4, 5, 6):
        assert line.table() == [1, 2, 3, 4, 5, 6][:num_published]
        assert num_episodes(line.core) == (3 if num_published == 6 else 1)
        outbox.rescue()
        line.attach()
        assert outbox.open(line.channel()) is False
        assert rescued(outbox) == ([] if num_published == 6 else [[5, 6][num_published - 4 :]])
        assert outbox.send_again(None)
        check_tables(line.core)
        reader.credit()
    outbox.send_again(None)
    assert outbox.settle(0.0)
    assert line.table() == [1, 2, 3, 4, 5, 6]
    assert num_episodes(line.core) == 3
    assert len(line.core.sessions) == 2
    assert not line.core.known_writers


OPERATIONS = ("send", "send", "sample", "attach", "lose answers", "lose the opening", "deliver")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(OPERATIONS), max_size=60), st.integers(0, 2**32))
def test_every_row_and_episode_counts_once_whatever_answers_are_lost(operations, seed):
    rng = np.random.default_rng(seed)
    line = Line(make_core(replay={**RATIO, "capacity": 1000, "headroom": 12}))
    outbox, sampler = new_outbox(line), Client(line.core, number=200)
    sampler.open_sampler()
    num_sent = num_sent_episodes = 0

    def attach():
        outbox.rescue()
        line.attach()
        line.loses_answers = False

    def try_to_send(num_rows):
        nonlocal num_sent, num_sent_episodes
        if outbox.send_again(None) and outbox.reserve(num_rows, None):
            episodes = rng.integers(3)
            send(outbox, range(num_sent, num_sent + num_rows), episodes=range(episodes))
            num_sent, num_sent_episodes = num_sent + num_rows, num_sent_episodes + episodes

    for operation in operations:
        if operation == "send":
            try_to_send(int(rng.integers(MAX_COMMIT_ROWS + 1)))
        elif operation == "sample" and not line.core.sessions[token(200)].channels[sampler.id(1)].num_credits:
            line.sample(sampler)
        elif operation == "attach":
            attach()
            outbox.open(line.channel())
        elif operation == "lose answers":
            line.loses_answers = True  # until it attaches again
        elif operation == "lose the opening":
            attach()
            line.loses_answers = True
            with pytest.raises(DeadlineExceeded):
                outbox.open(line.channel())
            line.loses_answers = False
            outbox.open(line.channel())
        elif operation == "deliver":
            outbox.reserve(0, None)
        check_tables(line.core)
        assert line.table() == list(range(len(line.table())))
        assert num_episodes(line.core) <= num_sent_episodes
    attach()
    outbox.open(line.channel())
    for _ in range(num_sent + 1):
        if outbox.send_again(None) and outbox.settle(0.0):
            break
        line.sample(sampler)
    assert line.table() == list(range(num_sent))
    assert num_episodes(line.core) == num_sent_episodes
    assert line.core.num_refused == 0


# ---- the core ------------------------------------------------------------------------------------------------


def test_a_commit_that_is_never_published_whole_counts_no_episode():
    core = make_core(replay=RATIO)
    client, other = Client(core), Client(core, number=1)
    client.open_writer(max_commit_rows=4, num_wanted=4)
    other.open_writer(max_commit_rows=3, num_wanted=3)
    other.commit(num_rows=3, episodes=[Episode(0, 1.0, 1)])
    client.commit(num_rows=4, episodes=[Episode(0, 2.0, 1)])  # one of four is published
    assert num_episodes(core) == 1
    core.exited(token(0))
    assert num_episodes(core) == 1


def test_a_writer_that_closes_before_its_commits_are_published_counts_all_their_episodes():
    core = make_core(replay=RATIO)
    client, sampler = Client(core), Client(core, number=1)
    client.open_writer(max_commit_rows=6, num_wanted=6)
    sampler.open_sampler()
    client.commit(num_rows=6, episodes=[Episode(0, 1.0, 1)])
    client.commit(num_rows=0, episodes=[Episode(0, 2.0, 1)])  # behind one that waits
    client.ask(messages.CloseChannel(1))
    assert num_episodes(core) == 0
    sampler.credit(num_credits=2)
    assert num_episodes(core) == 2
    assert not core.sessions[token(0)].channels
    check_tables(core)


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ((b"short", 0), "writer_id has 5 bytes, expected 16 or none"),
        ((bytes(17), 0), "writer_id has 17 bytes"),
        ((ID, -1), "acknowledged must be in [0, 2^62), got -1"),
        ((ID, 2**62), f"acknowledged must be in [0, 2^62), got {2**62}"),
    ],
)
def test_an_impossible_identity_is_refused_and_changes_nothing(identity, message):
    core = make_core()
    client = Client(core)
    before = snapshot(core)
    reply, events = client.ask(messages.OpenWriter(1, "replay", 2, 4, *identity))
    assert isinstance(reply, messages.Refused)
    assert events == []
    assert message in reply.reason
    assert snapshot(core) == before


@pytest.mark.parametrize("acknowledged", [0, 5, 2**62 - 1])
def test_a_server_that_does_not_know_a_writer_takes_its_word(acknowledged):
    client = Client(make_core())
    reply, events = client.ask(messages.OpenWriter(1, "replay", 2, 4, ID, acknowledged))
    assert reply == messages.Opened(acknowledged, 0)
    ((_, grant),) = events
    assert (grant.acknowledged, len(grant.rows)) == (acknowledged, 4)
    client.sequences[1] = acknowledged - 1
    assert "is not the next" in reason(client.commit())
    ((_, grant),) = client.commit()
    assert grant.acknowledged == acknowledged + 1


def test_an_opening_takes_the_place_of_one_that_its_writer_did_not_hear_of():
    core = make_core()
    client = Client(core)
    for channel in (1, 2, 3):
        reply, _ = client.ask(messages.OpenWriter(channel, "replay", 2, 4, ID, 0))
        assert reply == messages.Opened()
        assert core.tables["replay"].state.allocator.num_reserved == 4
    for channel in (4, 5):  # these cannot be told from others
        client.ask(messages.OpenWriter(channel, "replay", 1, 1))
    assert len(core.sessions[token(0)].channels) == 3
    check_tables(core)


def test_only_the_process_itself_attaches_in_the_place_of_a_session():
    core = make_core()
    client = Client(core)  # process 1000
    client.open_writer()
    before = snapshot(core)
    for previous, pid in ((token(0), 1001), (token(5), 1000), (b"", 1000)):
        assert core.attached_again(previous, pid) == []
        assert snapshot(core) == before
    core.attached_again(token(0), 1000)
    assert not core.sessions
    check_tables(core)


def test_rows_that_a_process_gave_up_by_attaching_again_go_to_those_who_wait():
    core = make_core()
    client, other = Client(core), Client(core, number=1)
    client.open_writer(max_commit_rows=4, num_wanted=8)
    assert other.open_writer(num_wanted=4) == []
    ((receiver, grant),) = decoded(core.attached_again(token(0), 1000))
    assert receiver == other.id(1)
    assert isinstance(grant, Grant)
    assert len(grant.rows) == 4


def test_the_writers_that_may_come_back_are_bounded(monkeypatch):
    monkeypatch.setattr(server_core, "MAX_KNOWN_WRITERS", 3)
    core = make_core(replay={"headroom": 64})
    for number in range(5):
        client = Client(core, number=number)
        client.ask(messages.OpenWriter(1, "replay", 1, 2, bytes([number] * 16), 0))
        client.sequences[1] = 0
        client.commit()
        core.attached_again(token(number), 1000 + number)
    assert [core.resume_point(bytes([number] * 16), 0).sequence for number in range(5)] == [0, 0, 1, 1, 1]


def test_commits_of_the_lost_channel_are_refused_after_its_process_attached_again():
    line = Line(make_core())
    outbox = new_outbox(line)
    send(outbox, [1])
    lost = outbox._channel
    outbox.rescue()
    line.attach()
    outbox.open(line.channel())
    ((_, refusal),) = line.core.handle(
        channel_id(0, lost.number), Commit(line.core.epoch, 1, 2, 0, 1, None, []).encode(), 0.0
    )
    assert "not attached" in frames.decode_refusal(refusal)[1]
    assert line.table() == [1]


def test_the_generation_of_a_fragment_tells_its_writer_whether_it_is_still_there():
    fragments = RolloutTableState(RolloutTable(SPEC, 1, 1, num_fragments=2, max_version_lag=0))
    generations = fragments.generations.tolist

    def commit():
        (row,) = rows = fragments.reserve(1)
        fragments.commit(rows, version=0)
        return row

    fragments.release(fragments.reserve(1))
    assert generations() == [0, 0]
    first, second = commit(), commit()
    assert generations() == [1, 1]
    fragments.lease(1, newest_version=0)
    fragments.give_back(np.array([first]))
    fragments.lease(1, newest_version=0)
    assert generations() == [1, 1]
    fragments.finish(np.array([first]))
    assert generations()[first] == 2
    fragments.lease(1, newest_version=1)  # too late: dropped
    assert generations()[second] == 2
    commit()
    fragments.clear()
    assert sorted(generations()) == [2, 4]
