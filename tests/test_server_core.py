"""The server's decisions, driven with the frames that clients send; no sockets, no processes."""

import dataclasses
import struct

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule

from rl_buffer import frames, messages
from rl_buffer.errors import InvalidInput
from rl_buffer.frames import Batch, Commit, Credit, Grant
from rl_buffer.messages import Envelope
from rl_buffer.parameter_slots import BOARD_LENGTH, ParameterSlots
from rl_buffer.rate_limiters import MinSize, RateLimiter, SampleToInsertRatio
from rl_buffer.replay_table import ReplayTableState
from rl_buffer.samplers import Prioritized, Uniform
from rl_buffer.server_core import MAX_CHANNELS_PER_SESSION, MAX_CREDITS, MAX_REASON_LENGTH, MAX_SESSIONS, ServerCore
from rl_buffer.spec import Field, TransitionSpec
from rl_buffer.stats_tracker import Episode
from rl_buffer.tables import ReplayTable, StatsConfig

EPOCH = 0x1234_5678_9ABC_DEF0
SPEC = TransitionSpec(obs=Field((1,)), action=Field((1,)))


def token(number):
    return bytes([number + 1]) * frames.TOKEN_NBYTES


def channel_id(session, number):
    return token(session) + number.to_bytes(4, "little")


def ints(*values):
    return np.array(values, np.int64)


def floats(*values):
    return np.array(values, np.float64)


def make_core(**tables):
    tables = tables or {"replay": {}}
    states = {}
    for name, arguments in tables.items():
        config = ReplayTable(SPEC, **{"capacity": 8, "headroom": 8, "seed": 0} | arguments)
        states[name] = ReplayTableState(config, np.zeros(config.num_rows, np.int64))
    return ServerCore(EPOCH, states, StatsConfig())


class Client:
    """One attached process: encodes requests, decodes what comes back."""

    def __init__(self, core, number=0):
        self.core, self.number = core, number
        self.sequences, self.rows = {}, {}
        core.attach(token(number), f"client-{number}", 1000 + number, 0.0)

    def id(self, channel):
        return channel_id(self.number, channel)

    def ask(self, request, epoch=EPOCH):
        out = self.core.handle(self.id(0), messages.encode_control(Envelope(7, epoch, request)), 0.0)
        (receiver, frame), *others = out
        assert receiver == self.id(0)
        assert frames.kind_of(frame) == frames.CONTROL
        reply = messages.decode_control_reply(frame)
        assert (reply.request_id, reply.epoch) == (7, EPOCH)
        return reply.reply, decoded(others)

    def open_writer(self, channel=1, table="replay", max_commit_rows=2, num_wanted=4):
        reply, events = self.ask(messages.OpenWriter(channel, table, max_commit_rows, num_wanted))
        assert reply == messages.Opened(), reply
        self.sequences[channel] = 0
        self.rows[channel] = []
        for receiver, grant in events:
            if receiver == self.id(channel):
                self.rows[channel] += grant.rows.tolist()
        return events

    def open_sampler(self, channel=1, table="replay", batch_size=1):
        reply, events = self.ask(messages.OpenSampler(channel, table, batch_size))
        assert reply == messages.Opened(), reply
        return events

    def commit(self, channel=1, num_rows=1, num_wanted=None, **changes):
        self.sequences[channel] += 1
        wanted = num_rows if num_wanted is None else num_wanted
        commit = Commit(EPOCH, num_rows, self.sequences[channel], 0, wanted, None, [])
        return decoded(self.core.handle(self.id(channel), commit._replace(**changes).encode(), 0.0))

    def credit(self, channel=1, num_credits=1, rows=(), generations=(), td_errors=(), **changes):
        credit = Credit(EPOCH, num_credits, 0, ints(*rows), ints(*generations), floats(*td_errors))
        return decoded(self.core.handle(self.id(channel), credit._replace(**changes).encode(), 0.0))


def decoded(outgoing):
    decoders = {
        frames.GRANT: frames.decode_grant,
        frames.BATCH: frames.decode_batch,
        frames.REFUSAL: lambda frame: frames.decode_refusal(frame)[1],
        frames.CONTROL: messages.decode_control_reply,
    }
    return [(receiver, decoders[frames.kind_of(frame)](frame)) for receiver, frame in outgoing]


def reason(events):
    """The text of the only message, which is a refusal."""
    ((_, text),) = events
    assert isinstance(text, str), f"not refused: {text}"
    return text


def acknowledged(events):
    return [(receiver, grant.acknowledged) for receiver, grant in events if isinstance(grant, Grant)]


def batches(events):
    return [(receiver, batch.batch_size) for receiver, batch in events if isinstance(batch, Batch)]


def plain(value):
    """A comparable copy of a part of the server's state."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if dataclasses.is_dataclass(value) or isinstance(value, msgspec.Struct):
        names = [f.name for f in (dataclasses if dataclasses.is_dataclass(value) else msgspec.structs).fields(value)]
        return {name: plain(getattr(value, name)) for name in names if name not in ("session", "table", "writer")}
    return value


def snapshot(core):
    """Everything that a refused message must leave as it was."""
    info = {k: v for k, v in core.info(0.0).items() if k not in ("num_messages", "num_refused", "last_refusal")}
    tables = {}
    for name, table in core.tables.items():
        state = table.state
        sampler = state._sampler
        rows = np.arange(state.config.num_rows)
        tables[name] = {
            "committed": state.allocator.committed().tolist(),
            "free": state.allocator._free.peek(len(state.allocator._free)).tolist(),
            "generations": state.generations.tolist(),
            "masses": sampler.masses_of(rows).tolist()
            if hasattr(sampler, "masses_of")
            else sampler._live.members.tolist(),
            "random": state._rng.bit_generator.state,
            "limiter": dict(vars(state.limiter)),
            "pending": [(p.writer.channel_id, p.commit.sequence, p.num_published) for p in table.pending],
            "wanting": [writer.channel_id for writer in table.wanting],
            "samplers": [sampler.channel_id for sampler in table.samplers],
            "overtaken": table.num_overtaken,
        }
    sessions = {
        session.token: (session.connected, {key: plain(channel) for key, channel in session.channels.items()})
        for session in core.sessions.values()
    }
    boards = {name: slots._board.tolist() for name, slots in core.parameters.items()}
    return info, tables, sessions, boards, core.stats.get_raw_values(), core.stats.get_statistics()


def check_tables(core):
    """What holds at every moment, whatever clients sent."""
    for table in core.tables.values():
        state, allocator = table.state, table.state.allocator
        held = [
            channel.rows.tolist()
            for session in core.sessions.values()
            for channel in session.channels.values()
            if channel.table is table and hasattr(channel, "rows")
        ]
        committed = allocator.committed().tolist()
        free = allocator._free.peek(len(allocator._free)).tolist()
        everything = sorted(sum(held, committed + free))
        assert everything == list(range(state.config.num_rows)), "a row is lost or owned twice"
        assert sum(map(len, held)) == allocator.num_reserved <= allocator.headroom
        assert len(committed) <= allocator.capacity
        assert np.flatnonzero(state.generations % 2).tolist() == sorted(committed)
        assert state._sampler.num_items == len(committed) == state.limiter.size
        assert all(writer.num_wanted for writer in table.wanting)
    msgspec.msgpack.encode(core.info(0.0))


# ---- single decisions --------------------------------------------------------------------------------------


def test_a_writer_is_granted_rows_when_it_opens_and_as_many_as_it_wants_when_it_commits():
    client = Client(make_core())
    ((receiver, grant),) = client.open_writer(max_commit_rows=2, num_wanted=4)
    assert (receiver, grant.acknowledged, len(grant.rows)) == (client.id(1), 0, 4)
    ((receiver, grant),) = client.commit(num_rows=2, num_wanted=1)
    assert (receiver, grant.acknowledged, len(grant.rows)) == (client.id(1), 1, 1)


def test_rows_are_committed_in_the_order_in_which_they_were_granted():
    core = make_core()
    client = Client(core)
    client.open_writer()
    rows = client.rows[1]
    client.commit(num_rows=2)
    client.commit(num_rows=1)
    assert core.tables["replay"].state.allocator.committed().tolist() == rows[:3]


REFUSED_COMMITS = {
    "duplicate": ({"sequence": 1}, "commit 1 is not the next; expected 2"),
    "skipped": ({"sequence": 3}, "commit 3 is not the next; expected 2"),
    "sequence 0": ({"sequence": 0}, "commit 0 is not the next"),
    "other epoch": ({"epoch": EPOCH + 1}, "epoch 123456789abcdef1, but this server is 123456789abcdef0"),
    "more rows than held": ({"num_rows": 5, "num_wanted": 0}, "commit of 5 rows, but the writer holds 4"),
    "more rows than it opened for": ({"num_rows": 3, "num_wanted": 0}, "opened for at most 2"),
    "wants more than it gives": ({"num_rows": 1, "num_wanted": 2}, "wants 2, more than it gives back"),
    "infinite TD error": ({"td_errors": floats(np.inf)}, "must be finite or NaN"),
    "TD error beyond any mass": ({"td_errors": floats(-1e308)}, "TD error -1e\\+308 at position 0"),
    "bad episode": ({"episodes": [Episode(0, np.nan, 1)]}, r"episodes\[0\].reward is nan"),
    "unknown metric": ({"episodes": [Episode(0, 0.0, 1, {"x": 1.0})]}, "the tracker was made with"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED_COMMITS.values(), ids=REFUSED_COMMITS)
def test_a_bad_commit_is_refused_and_changes_nothing(changes, message):
    core = make_core(replay={"sampler": Prioritized(alpha=1.0)})
    client = Client(core)
    client.open_writer()
    client.commit(td_errors=floats(1.0))
    before = snapshot(core)
    with pytest.raises(InvalidInput, match=message):
        raise InvalidInput(reason(client.commit(**changes)))
    assert snapshot(core) == before
    assert core.num_refused == 1
    client.sequences[1] = 1
    assert acknowledged(client.commit()) == [(client.id(1), 2)]  # the good one still passes


REFUSED_CREDITS = {
    "too many": ({"num_credits": MAX_CREDITS + 1}, "credits exceed the limit 64"),
    "other epoch": ({"epoch": 0}, "connect again"),
    "NaN": ({"rows": [0], "generations": [1], "td_errors": [np.nan]}, "TD errors must be finite, got nan"),
    "infinite": ({"rows": [0, 0], "generations": [1, 1], "td_errors": [5.0, -np.inf]}, "finite, got -inf"),
    "too large": ({"rows": [0], "generations": [1], "td_errors": [1e301]}, "TD error 1e\\+301"),
    "row above": ({"rows": [0, 16], "generations": [1, 1], "td_errors": [5.0, 5.0]}, r"in \[0, 16\), got 0..16"),
    "row below": ({"rows": [-1, 0], "generations": [1, 1], "td_errors": [5.0, 5.0]}, r"got -1..0"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED_CREDITS.values(), ids=REFUSED_CREDITS)
def test_a_bad_credit_is_refused_and_changes_nothing(changes, message):
    core = make_core(replay={"sampler": Prioritized(alpha=1.0)})
    client = Client(core)
    client.open_writer(channel=1)
    client.commit(td_errors=floats(1.0))
    client.open_sampler(channel=2)
    before = snapshot(core)
    with pytest.raises(InvalidInput, match=message):
        raise InvalidInput(reason(client.credit(channel=2, **changes)))
    assert snapshot(core) == before


def test_priorities_of_a_uniform_table_are_refused_whole():
    core = make_core(replay={"sampler": Uniform()})
    client = Client(core)
    client.open_writer(channel=1)
    client.commit()
    client.open_sampler(channel=2)
    before = snapshot(core)
    assert "no priorities" in reason(client.credit(2, 1, rows=[0], generations=[1], td_errors=[1.0]))
    assert snapshot(core) == before


@pytest.mark.parametrize(
    "sender", [b"", b"\0", token(5), token(0), channel_id(5, 1), channel_id(0, 1) + b"x", token(0)[:-1] + b"y1234"]
)
def test_a_sender_that_is_not_attached_is_refused(sender):
    core = make_core()
    client = Client(core)
    client.open_writer()
    before = snapshot(core)
    for frame in (
        Commit(EPOCH, 1, 1, 0, 1, None, []).encode(),
        messages.encode_control(Envelope(1, EPOCH, messages.Clear("replay"))),
    ):
        ((receiver, answer),) = core.handle(sender, frame, 0.0)
        assert receiver == sender
        epoch, text = frames.decode_refusal(answer)
        assert epoch == EPOCH
        assert "not attached" in text
    assert snapshot(core) == before


def test_messages_on_a_channel_of_another_kind_are_refused():
    client = Client(make_core())
    client.open_writer(channel=1)
    client.open_sampler(channel=2)
    client.sequences[2] = client.sequences[3] = 0
    assert "not a sampler" in reason(client.credit(channel=1))
    assert "not an open writer" in reason(client.commit(channel=2))
    assert "not an open writer" in reason(client.commit(channel=3))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (messages.OpenWriter(1, "nowhere", 1, 1), r"no table is called 'nowhere'; this server has \['replay'\]"),
        (messages.OpenWriter(1, "replay", 4, 9), "wants to hold 9 rows, but its headroom is 8"),
        (messages.OpenWriter(1, "replay", 0, 4), "wants to hold 4"),
        (messages.OpenWriter(1, "replay", 4, 2), "wants to hold 2"),
        (messages.OpenWriter(-1, "replay", 1, 1), "channel must be in"),
        (messages.OpenWriter(2**32, "replay", 1, 1), "channel must be in"),
        (messages.OpenSampler(1, "replay", 0), r"batch_size must be in \[1, 245760\], got 0"),
        (messages.OpenSampler(1, "replay", -1), "got -1"),
        (messages.OpenSampler(1, "replay", -2), "got -2"),
        (messages.OpenSampler(1, "replay", 245_761), "got 245761"),
        (messages.OpenSampler(1, "replay", 2**63), "got 9223372036854775808"),
        (messages.GetSize("nowhere"), "no table"),
        (messages.Clear("nowhere"), "no table"),
        (messages.CloseChannel(-1), "channel must be in"),
        (messages.ReserveParameters("policy"), "no parameters are called 'policy'"),
        (messages.PublishParameters("policy", 0), "no parameters are called 'policy'"),
    ],
    ids=str,
)
def test_a_bad_request_is_refused_and_changes_nothing(request_, message):
    core = make_core()
    client = Client(core)
    before = snapshot(core)
    reply, events = client.ask(request_)
    assert isinstance(reply, messages.Refused)
    with pytest.raises(InvalidInput, match=message):
        raise InvalidInput(reply.reason)
    assert events == []
    assert snapshot(core) == before
    assert (core.num_refused, core.last_refusal) == (1, reply.reason)


def test_a_request_of_another_epoch_is_refused():
    core = make_core()
    reply, _ = Client(core).ask(messages.Clear("replay"), epoch=EPOCH - 1)
    assert "connect again" in reply.reason


def test_a_writer_whose_commits_could_not_fit_the_table_is_refused():
    client = Client(make_core(replay={"capacity": 4, "headroom": 16}))
    reply, _ = client.ask(messages.OpenWriter(1, "replay", 5, 10))
    assert "commits up to 5 rows at once, more than the limit of 4" in reply.reason
    client.open_writer(max_commit_rows=4, num_wanted=10)


def test_a_grant_never_names_more_rows_than_a_client_can_decode():
    most = frames.MAX_ROWS_PER_MESSAGE
    client = Client(make_core(replay={"capacity": 2 * most, "headroom": 2 * most}))
    reply, _ = client.ask(messages.OpenWriter(1, "replay", 1, most + 1))
    assert "limit" in reply.reason
    client.open_writer(max_commit_rows=most // 2, num_wanted=most)
    assert len(client.rows[1]) == most


def test_a_batch_that_the_limiter_could_never_pass_is_refused_when_the_sampler_opens():
    client = Client(make_core(replay={"rate_limiter": SampleToInsertRatio(1.0, 4, 4.0)}))
    reply, _ = client.ask(messages.OpenSampler(1, "replay", 8))
    assert "a batch of 8 draws could wait for ever" in reply.reason


def test_a_channel_number_in_use_is_refused_and_free_again_after_closing():
    client = Client(make_core())
    client.open_writer(channel=1)
    reply, _ = client.ask(messages.OpenSampler(1, "replay", 1))
    assert reply.reason == "channel 1 is open already"
    assert client.ask(messages.CloseChannel(1))[0] == messages.Opened()
    client.open_sampler(channel=1)


def test_the_numbers_of_clients_and_channels_are_limited():
    core = make_core()
    clients = [Client(core, 0)]
    for number in range(MAX_CHANNELS_PER_SESSION):
        clients[0].open_sampler(channel=number)
    reply, _ = clients[0].ask(messages.OpenSampler(MAX_CHANNELS_PER_SESSION, "replay", 1))
    assert "256 writers and samplers" in reply.reason
    for number in range(1, MAX_SESSIONS):
        core.attach(number.to_bytes(frames.TOKEN_NBYTES, "big"), "", number, 0.0)
    with pytest.raises(InvalidInput, match="1024 clients are attached"):
        core.attach(b"t" * frames.TOKEN_NBYTES, "", 1, 0.0)


def test_a_refusal_does_not_repeat_all_that_a_client_sent():
    core = make_core()
    reply, _ = Client(core).ask(messages.GetSize("x" * 1_000_000))
    assert len(reply.reason) == len(core.info(0.0)["last_refusal"]) == MAX_REASON_LENGTH


def test_an_overtaken_count_of_any_size_leaves_info_encodable():
    core = make_core()
    client = Client(core)
    client.open_sampler()
    for _ in range(3):
        client.credit(num_credits=0, num_overtaken=2**32 - 1)
    reply, _ = client.ask(messages.GetInfo())
    assert reply.value["tables"]["replay"]["overtaken_rows"] == 3 * (2**32 - 1)


def test_episodes_are_counted_once_and_numbered_anew():
    core = make_core()
    client = Client(core)
    client.open_writer()
    client.commit(num_rows=0, episodes=[Episode(9, 2.0, 3), Episode(10, 4.0, 1)])
    reply, _ = client.ask(messages.GetStats())
    assert reply.value["train/num_episodes"] == 2.0
    assert reply.value["train/rewards_mean"] == 3.0


# ---- limiter, rows, fairness -------------------------------------------------------------------------------


RATIO = {"rate_limiter": SampleToInsertRatio(1.0, 2, (0.0, 4.0))}


def test_commits_that_the_limiter_holds_back_are_acknowledged_in_order_once_it_lets_them():
    core = make_core(replay=RATIO)
    first, second, learner = (Client(core, number) for number in range(3))
    first.open_writer()
    second.open_writer()
    learner.open_sampler(batch_size=3)
    assert acknowledged(first.commit(num_rows=2)) == [(first.id(1), 1)]  # cursor 2
    assert acknowledged(second.commit(num_rows=2)) == [(second.id(1), 1)]  # cursor 4
    assert first.commit(num_rows=2) == []
    assert second.commit(num_rows=1) == []
    assert core.info(0.0)["tables"]["replay"]["waits"][0].startswith("client-0: inserting waits: cursor 4.0 + 2 * 1.0")
    assert len(core.tables["replay"].state) == 4
    events = learner.credit(num_credits=1)  # cursor 1, 3 more fit
    assert batches(events) == [(learner.id(1), 3)]
    assert acknowledged(events) == [(first.id(1), 2), (second.id(1), 2)]


def test_a_commit_that_passes_in_part_is_acknowledged_only_as_a_whole():
    core = make_core(replay=RATIO)
    client = Client(core)
    client.open_writer(channel=1, max_commit_rows=4)
    client.open_sampler(channel=2, batch_size=1)
    client.commit(num_rows=3)  # cursor 3
    assert client.commit(num_rows=4, num_wanted=0) == []  # one of them
    assert len(core.tables["replay"].state) == 4
    assert acknowledged(client.credit(channel=2, num_credits=2)) == []
    assert len(core.tables["replay"].state) == 6
    assert acknowledged(client.credit(channel=2, num_credits=1)) == [(client.id(1), 2)]


def test_the_rows_of_a_waiting_commit_cannot_be_committed_again():
    core = make_core(replay=RATIO)
    client = Client(core)
    client.open_writer(max_commit_rows=4)
    client.commit(num_rows=4, num_wanted=4)
    client.commit(num_rows=3, num_wanted=0)
    assert reason(client.commit(num_rows=2)) == "commit of 2 rows, but the writer holds 1"


def test_writers_wait_for_rows_and_are_served_first_come_first_served():
    core = make_core()
    a, b, c = (Client(core, number) for number in range(3))
    assert len(a.open_writer(num_wanted=4)) == 1
    assert len(b.open_writer(num_wanted=4)) == 1  # headroom 8 is out
    assert c.open_writer(num_wanted=3) == []
    assert core.info(0.0)["tables"]["replay"]["waits"] == ["client-2: waits for rows, 8 of 8 are reserved by writers"]
    ((receiver, grant),) = a.commit(num_rows=2)
    assert (receiver, len(grant.rows)) == (a.id(1), 0), "only acknowledged: c was first"
    events = b.commit(num_rows=2)
    assert [(r, grant.acknowledged, len(grant.rows)) for r, grant in events] == [(b.id(1), 1, 0), (c.id(1), 0, 3)]
    events = c.commit(num_rows=2, num_wanted=0)
    assert [(r, grant.acknowledged, len(grant.rows)) for r, grant in events] == [(c.id(1), 1, 0), (a.id(1), 1, 2)]


def test_a_writer_that_stops_with_rows_does_not_block_the_others():
    core = make_core()
    stopped, busy = Client(core, 0), Client(core, 1)
    stopped.open_writer(num_wanted=4)
    busy.open_writer(num_wanted=4)
    kept = core.sessions[token(0)].channels[stopped.id(1)].rows.tolist()
    for _ in range(50):  # three laps of the ring
        ((_, grant),) = busy.commit(num_rows=2)
        assert not set(grant.rows.tolist()) & set(kept)
    assert len(core.tables["replay"].state) == 8
    assert core.sessions[token(0)].channels[stopped.id(1)].rows.tolist() == kept


def test_a_full_table_keeps_its_capacity_while_every_writer_holds_rows():
    core = make_core()
    clients = [Client(core, number) for number in range(2)]
    for client in clients:
        client.open_writer(num_wanted=4)
    for turn in range(20):
        clients[turn % 2].commit(num_rows=2)
        assert len(core.tables["replay"].state) == min(8, 2 * (turn + 1))


def test_samplers_with_credits_take_turns():
    core = make_core(replay={"rate_limiter": SampleToInsertRatio(1.0, 1, (0.0, 8.0))})
    actor, *learners = (Client(core, number) for number in range(4))
    actor.open_writer()
    for learner in learners:
        learner.open_sampler()
        learner.credit(num_credits=30)
    served = [receiver for _ in range(9) for receiver, _ in batches(actor.commit())]
    assert served == [learner.id(1) for learner in learners] * 3


def test_a_large_batch_is_not_starved_by_a_sampler_of_small_ones():
    core = make_core(replay={"rate_limiter": SampleToInsertRatio(1.0, 1, (0.0, 8.0))})
    actor, small, large = (Client(core, number) for number in range(3))
    actor.open_writer()
    for learner, batch_size in ((small, 1), (large, 4)):
        learner.open_sampler(batch_size=batch_size)
        learner.credit(num_credits=30)
    served = [batch for _ in range(10) for batch in batches(actor.commit())]
    assert served == [(small.id(1), 1), (large.id(1), 4)] * 2


def test_a_credit_waits_until_the_minimum_size_is_there():
    core = make_core(replay={"rate_limiter": MinSize(3)})
    client = Client(core)
    client.open_writer(channel=1)
    client.open_sampler(channel=2, batch_size=2)
    assert client.credit(channel=2, num_credits=2) == []
    assert core.info(0.0)["tables"]["replay"]["waits"] == ["client-0: sampling waits: 0 of 3 items"]
    assert batches(client.commit(num_rows=2)) == []
    assert batches(client.commit(num_rows=1)) == [(client.id(2), 2)] * 2
    assert core.info(0.0)["tables"]["replay"]["waits"] == []


def test_a_sampler_without_credits_gets_nothing():
    client = Client(make_core())
    client.open_writer(channel=1)
    client.open_sampler(channel=2)
    client.commit()
    assert batches(client.credit(channel=2, num_credits=0)) == []
    assert len(batches(client.credit(channel=2, num_credits=MAX_CREDITS))) == MAX_CREDITS


def test_the_limit_of_credits_counts_those_that_still_wait():
    client = Client(make_core())
    client.open_sampler()
    assert client.credit(num_credits=MAX_CREDITS - 1) == []
    assert reason(client.credit(num_credits=2)) == "63 + 2 credits exceed the limit 64"
    assert client.credit(num_credits=1) == []


# ---- ends --------------------------------------------------------------------------------------------------


def test_an_exited_client_frees_its_rows_and_publishes_nothing():
    core = make_core(replay=RATIO)
    dead, alive = Client(core, 0), Client(core, 1)
    dead.open_writer(max_commit_rows=4, num_wanted=8)
    dead.commit(num_rows=4, num_wanted=0)
    dead.commit(num_rows=3, num_wanted=0)  # held back by the limiter
    assert alive.open_writer(num_wanted=6) == []  # waits for rows: 4 of 8 are left
    core.disconnected(token(0))
    assert core.tables["replay"].state.allocator.num_reserved == 4, "quarantined: it may still be writing"
    ((receiver, frame),) = core.exited(token(0))
    assert (receiver, len(frames.decode_grant(frame).rows)) == (alive.id(1), 6)
    assert len(core.tables["replay"].state) == 4
    assert core.tables["replay"].state.allocator.num_reserved == 6
    assert core.exited(token(0)) == []
    check_tables(core)


def test_what_an_exited_client_committed_in_part_stays_and_the_rest_is_freed():
    core = make_core(replay=RATIO)
    dead = Client(core)
    dead.open_writer(max_commit_rows=4)
    dead.commit(num_rows=3)
    dead.commit(num_rows=3)  # one passes
    core.exited(token(0))
    assert (len(core.tables["replay"].state), core.tables["replay"].state.allocator.num_reserved) == (4, 0)
    check_tables(core)


def test_an_exit_lets_commits_behind_it_pass():
    core = make_core(replay=RATIO)
    dead, alive = Client(core, 0), Client(core, 1)
    dead.open_sampler(channel=2, batch_size=3)
    dead.credit(channel=2, num_credits=1)
    alive.open_writer(channel=1)
    alive.open_sampler(channel=2, batch_size=1)
    alive.credit(channel=2, num_credits=1)
    assert batches(alive.commit(num_rows=2)) == []  # the dead one's batch of 3 is first, cursor 2
    events = decoded(core.exited(token(0)))
    assert batches(events) == [(alive.id(2), 1)]


def test_closing_a_writer_publishes_its_pending_commits_first():
    core = make_core(replay=RATIO)
    client = Client(core)
    client.open_writer(channel=1, max_commit_rows=4, num_wanted=8)
    client.open_sampler(channel=2, batch_size=2)
    client.commit(num_rows=4, num_wanted=0)
    client.commit(num_rows=2, num_wanted=0)
    assert client.ask(messages.CloseChannel(1)) == (messages.Opened(), [])
    state = core.tables["replay"].state
    assert (len(state), state.allocator.num_reserved) == (4, 2), "unwritten rows are given back at once"
    assert "not an open writer" in reason(client.commit(num_rows=1, sequence=3))
    assert acknowledged(client.credit(channel=2)) == []  # nobody is there to be told
    assert (len(state), state.allocator.num_reserved) == (6, 0)
    assert client.id(1) not in core.sessions[token(0)].channels
    check_tables(core)


def test_a_closing_writer_does_not_keep_others_waiting_for_rows():
    core = make_core(replay=RATIO)
    closing, other = Client(core, 0), Client(core, 1)
    closing.open_writer(max_commit_rows=4, num_wanted=8)
    closing.commit(num_rows=4, num_wanted=0)
    closing.commit(num_rows=2, num_wanted=0)
    assert other.open_writer(num_wanted=6) == []
    _, events = closing.ask(messages.CloseChannel(1))
    assert [(receiver, len(grant.rows)) for receiver, grant in events] == [(other.id(1), 6)]


def test_closing_something_that_is_not_open_changes_nothing():
    core = make_core()
    client = Client(core)
    before = snapshot(core)
    assert client.ask(messages.CloseChannel(99)) == (messages.Opened(), [])
    assert snapshot(core) == before


def test_a_client_has_a_lease_while_it_has_a_writer_or_a_parameter_slot():
    core = make_core(replay=RATIO)
    core.parameters["policy"] = ParameterSlots(np.zeros(BOARD_LENGTH, np.int64))
    client, other = Client(core, 0), Client(core, 1)
    client.open_sampler(channel=2, batch_size=1)
    assert not core.has_leases(token(0))
    client.open_writer(channel=1, max_commit_rows=4, num_wanted=8)
    client.commit(num_rows=4, num_wanted=0)
    client.commit(num_rows=1, num_wanted=0)
    client.ask(messages.CloseChannel(1))
    assert core.has_leases(token(0)), "a closed writer's commit is still to be published"
    client.credit(channel=2)
    assert not core.has_leases(token(0))
    slot, _ = client.ask(messages.ReserveParameters("policy"))
    assert (core.has_leases(token(0)), core.has_leases(token(1))) == (True, False)
    client.ask(messages.PublishParameters("policy", slot.slot))
    assert not core.has_leases(token(0))
    core.exited(token(0))
    assert not core.has_leases(token(0))
    assert not core.has_leases(token(other.number))


def test_clear_empties_the_table_and_keeps_reservations():
    core = make_core()
    client = Client(core)
    client.open_writer()
    client.commit(num_rows=2)
    assert client.ask(messages.GetSize("replay"))[0].value == 2
    client.ask(messages.Clear("replay"))
    assert client.ask(messages.GetSize("replay"))[0].value == 0
    assert core.tables["replay"].state.allocator.num_reserved == 4
    check_tables(core)


def test_tables_do_not_see_each_other():
    core = make_core(a={}, b={})
    client = Client(core)
    client.open_writer(channel=1, table="a")
    client.open_sampler(channel=2, table="b")
    client.credit(channel=2)
    assert batches(client.commit(channel=1)) == []
    assert (len(core.tables["a"].state), len(core.tables["b"].state)) == (1, 0)


def test_one_client_publishes_parameters_at_a_time_and_its_death_lets_the_next():
    core = make_core()
    core.parameters["policy"] = ParameterSlots(np.zeros(BOARD_LENGTH, np.int64))
    first, second = Client(core, 0), Client(core, 1)
    reserve = messages.ReserveParameters("policy")
    slot, _ = first.ask(reserve)
    assert first.ask(reserve)[0] == slot
    assert "one publisher at a time" in second.ask(reserve)[0].reason
    assert "not reserved" in second.ask(messages.PublishParameters("policy", slot.slot))[0].reason
    core.exited(token(0))
    assert isinstance(second.ask(reserve)[0], messages.Slot)
    assert second.ask(messages.PublishParameters("policy", slot.slot))[0].version == 1


# ---- any order, against a model ----------------------------------------------------------------------------


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


# ---- anything at all ---------------------------------------------------------------------------------------


def busy_core():
    """Writers with rows, a commit that waits, a sampler with a batch, parameters being published."""
    core = make_core(replay=RATIO | {"sampler": Prioritized(alpha=1.0)}, other={"sampler": Uniform()})
    client = Client(core)
    client.open_writer(channel=1, max_commit_rows=4, num_wanted=6)
    client.open_sampler(channel=2, batch_size=1)
    client.commit(num_rows=4, num_wanted=2, td_errors=floats(1.0, 2.0, 3.0, 4.0))
    client.commit(num_rows=2, num_wanted=0)
    client.open_writer(channel=3, table="other")
    client.commit(channel=3)
    core.parameters["policy"] = ParameterSlots(np.zeros(BOARD_LENGTH, np.int64))
    client.ask(messages.ReserveParameters("policy"))
    return core


VALID = [
    (1, Commit(EPOCH, 1, 3, 7, 1, floats(2.0), [Episode(0, 1.0, 5)]).encode()),
    (1, Commit(EPOCH, 1, 3, 7, 1, None, []).encode()),
    (3, Commit(EPOCH, 2, 2, 7, 2, floats(2.0, np.nan), []).encode()),
    (2, Credit(EPOCH, 1, 0, ints(0, 1), ints(1, 1), floats(2.0, -3.0)).encode()),
    (2, Credit(EPOCH, 1, 5, ints(), ints(), floats()).encode()),
    *(
        (0, messages.encode_control(Envelope(1, EPOCH, request)))
        for request in (
            messages.OpenWriter(9, "other", 2, 4),
            messages.OpenSampler(9, "replay", 2),
            messages.CloseChannel(1),
            messages.CloseChannel(2),
            messages.PublishParameters("policy", 0),
            messages.ReserveParameters("policy"),
            messages.Clear("replay"),
            messages.GetSize("other"),
            messages.GetInfo(),
            messages.GetStats(),
        )
    ),
]


def feed(core, sender, frame):
    """Handle it; whatever it is, the server lives, and what it refuses changes nothing."""
    before, num_refused = snapshot(core), core.num_refused
    outgoing = core.handle(sender, frame, 0.0)
    assert core.num_refused <= num_refused + 1
    for _, answer in outgoing:
        assert isinstance(answer, bytes)
    decoded(outgoing)
    if core.num_refused > num_refused:
        assert len(outgoing) == 1
        assert snapshot(core) == before
    check_tables(core)
    return core.num_refused > num_refused


@pytest.mark.parametrize(("channel", "frame"), VALID)
def test_the_frames_that_the_fuzz_tests_start_from_are_taken(channel, frame):
    assert not feed(busy_core(), channel_id(0, channel), frame)


@given(channel=st.integers(0, 3), frame=st.binary(max_size=120), kind=st.integers(0, 7))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_random_bytes_are_refused(channel, frame, kind):
    core = busy_core()
    feed(core, channel_id(0, channel), frame)
    feed(core, channel_id(0, channel), bytes((kind,)) + frame)


@given(sender=st.binary(max_size=24), valid=st.sampled_from(VALID))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_any_other_sender_is_refused(sender, valid):
    assert feed(busy_core(), sender, valid[1])


@pytest.mark.parametrize(("channel", "frame"), VALID)
def test_a_truncated_frame_is_refused_or_a_shorter_valid_one(channel, frame):
    core = busy_core()
    for length in range(len(frame)):
        if not feed(core, channel_id(0, channel), frame[:length]):
            # Of a commit's tail nothing may be left: that is a commit without episodes.
            assert frame[0] == frames.COMMIT
            core = busy_core()


@given(st.sampled_from(VALID), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), min_size=1, max_size=3))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_flipped_bits_never_break_the_tables(valid, flips):
    channel, frame = valid
    damaged = bytearray(frame)
    for position, bit in flips:
        damaged[position % len(damaged)] ^= 1 << bit
    core = busy_core()
    feed(core, channel_id(0, channel), bytes(damaged))
    feed(core, channel_id(0, channel), bytes(damaged))  # again: a commit that passed is now a duplicate


@given(
    st.sampled_from([frames.COMMIT, frames.CREDIT]),
    st.lists(st.sampled_from([0, 1, 2, 3, 2**16, 2**18, 2**18 + 1, 2**31, 2**32 - 1]), min_size=9, max_size=9),
    st.sampled_from([EPOCH, 0, 2**64 - 1]),
    st.integers(0, 64),
)
@example(frames.CREDIT, [0, 0, 2**32 - 1, 0, 0, 0, 0, 0, 0], EPOCH, 0)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_huge_counts_are_refused(kind, words, epoch, num_more):
    frame = struct.pack("<B3xIQ7I", kind, words[0], epoch, *words[1:8]) + bytes(num_more)
    core = busy_core()
    for channel in (1, 2, 3):
        feed(core, channel_id(0, channel), frame)


NESTED = {
    "arrays": b"\x91" * 100_000,
    "maps": b"\x81\xa1x" * 100_000,
    "a list of 2^32 items": b"\xdd\xff\xff\xff\xff",
    "a map of 2^32 items": b"\xdf\xff\xff\xff\xff",
    "a string of 2^32 bytes": b"\xdb\xff\xff\xff\xff",
    "an extension": b"\xc7\xff\x01",
    "a string that is not UTF-8": b"\xa2\xff\xfe",
}


@pytest.mark.parametrize("payload", NESTED.values(), ids=NESTED)
def test_msgpack_that_is_deep_or_promises_too_much_is_refused(payload):
    core = busy_core()
    episodes = Commit(EPOCH, 0, 2, 0, 0, None, []).encode()
    head = b"\x93\x01" + msgspec.msgpack.encode(EPOCH)
    for channel, frame in (
        (3, episodes + payload),
        (3, episodes + b"\x91\x95\x00\xcb" + bytes(8) + b"\x01" + payload),
        (0, bytes((frames.CONTROL,)) + payload),
        (0, bytes((frames.CONTROL,)) + head + payload),
        (0, bytes((frames.CONTROL,)) + head + b"\x82\xa4type\xa7GetSize\xa5table" + payload),
    ):
        assert feed(core, channel_id(0, channel), frame)
