"""Drives a `ServerCore` with real frames, no sockets, and compares everything that it knows."""

import dataclasses
from collections import deque

import msgspec
import numpy as np

from rl_buffer import frames, messages
from rl_buffer.allocator import RowQueue
from rl_buffer.consumed_table import ConsumedTableState
from rl_buffer.frames import Batch, Commit, Credit, Grant
from rl_buffer.messages import Envelope
from rl_buffer.parameter_slots import BOARD_LENGTH, ParameterSlots
from rl_buffer.rate_limiters import SampleToInsertRatio
from rl_buffer.rollout_table import RolloutTableState
from rl_buffer.server_core import ServerCore
from rl_buffer.sessions import WriterChannel
from rl_buffer.spec import Field, TransitionSpec
from rl_buffer.table_states import new_state
from rl_buffer.tables import ReplayTable, RolloutTable, StatsConfig

EPOCH = 0x1234_5678_9ABC_DEF0
SPEC = TransitionSpec(obs=Field((1,)), action=Field((1,)))


RATIO = {"rate_limiter": SampleToInsertRatio(1.0, 2, (0.0, 4.0))}


def token(number):
    return bytes([number + 1]) * frames.TOKEN_NBYTES


def channel_id(session, number):
    return token(session) + number.to_bytes(4, "little")


def ints(*values):
    return np.array(values, np.int64)


def floats(*values):
    return np.array(values, np.float64)


def rollout_table(**options):
    return RolloutTable(SPEC, **{"num_steps": 2, "num_envs": 1, "num_fragments": 4} | options)


def make_core(**tables):
    """A core of these tables: `rollout_table`s, or the arguments of a replay table, which is what there is by default.

    Parameters "policy" exist, and have no version yet.
    """
    tables = tables or {"replay": {}}
    states = {}
    for name, table in tables.items():
        if isinstance(table, RolloutTable):
            states[name] = RolloutTableState(table)
        else:
            config = ReplayTable(SPEC, **{"capacity": 8, "headroom": 8, "seed": 0} | table)
            states[name] = new_state(config, np.zeros(config.num_rows, np.int64))
    core = ServerCore(EPOCH, states, StatsConfig())
    core.parameters["policy"] = ParameterSlots(np.zeros(BOARD_LENGTH, np.int64))
    return core


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
        return decoded(self.commit_frames(num_rows, channel, num_wanted, **changes))

    def commit_frames(self, num_rows, channel=1, num_wanted=None, **changes):
        self.sequences[channel] += 1
        wanted = num_rows if num_wanted is None else num_wanted
        commit = Commit(EPOCH, num_rows, self.sequences[channel], 0, wanted, None, [])
        return self.core.handle(self.id(channel), commit._replace(**changes).encode(), 0.0)

    def open_reader(self, channel=1, table="rollout"):
        reply, events = self.ask(messages.OpenReader(channel, table))
        assert reply == messages.Opened(), reply
        return events

    def open_rollout_writer(self, channel=1):
        return self.open_writer(channel, "rollout", max_commit_rows=1, num_wanted=1)

    def publish(self):
        """The version that "policy" has then, or why the server does not take it."""
        reply, _ = self.ask(messages.ReserveParameters("policy"))
        if isinstance(reply, messages.Slot):
            reply, _ = self.ask(messages.PublishParameters("policy", reply.slot))
        return reply.version if isinstance(reply, messages.Slot) else reply.reason

    def credit(self, channel=1, num_credits=1, rows=(), generations=(), td_errors=(), **changes):
        credit = Credit(EPOCH, num_credits, 0, ints(*rows), ints(*generations), floats(*td_errors))
        return decoded(self.core.handle(self.id(channel), credit._replace(**changes).encode(), 0.0))

    def credit_frames(self, num_credits, channel=2):
        credit = Credit(EPOCH, num_credits, 0, ints(), ints(), floats())
        return self.core.handle(self.id(channel), credit.encode(), 0.0)


def decoded(outgoing):
    """(receiver, what it is told), of a message with several batches one after the other."""
    decoders = {
        frames.GRANT: lambda frame: [frames.decode_grant(frame)],
        frames.BATCH: lambda frame: single_batches(frames.decode_batch(frame)),
        frames.REFUSAL: lambda frame: [frames.decode_refusal(frame)[1]],
        frames.CONTROL: lambda frame: [messages.decode_control_reply(frame)],
    }
    return [(receiver, event) for receiver, frame in outgoing for event in decoders[frames.kind_of(frame)](frame)]


def single_batches(batch):
    return [batch._replace(sample=sample, num_batches=1) for sample in batch.samples()]


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
    if isinstance(value, dict | deque):
        return list(value.items() if isinstance(value, dict) else value)
    if isinstance(value, RowQueue):
        return value.peek(value.length).tolist()
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
        if isinstance(state, ConsumedTableState):
            own = items_snapshot(state)
        else:
            own = rollouts_snapshot(state) if isinstance(state, RolloutTableState) else replay_snapshot(state)
        tables[name] = own | {
            "pending": [(p.writer.channel_id, p.commit.sequence, p.num_published) for p in table.pending],
            "wanting": [writer.channel_id for writer in table.wanting],
            "samplers": [sampler.channel_id for sampler in table.samplers],
            "readers": [reader.channel_id for reader in table.readers],
            "overtaken": table.num_overtaken,
        }
    sessions = {
        session.token: (session.connected, {key: plain(channel) for key, channel in session.channels.items()})
        for session in core.sessions.values()
    }
    parameters = {name: (slots._board.tolist(), slots._holder) for name, slots in core.parameters.items()}
    stats = core.stats.get_raw_values(), core.stats.get_statistics()
    return info, tables, sessions, parameters, dict(core.known_writers), core.checkpoint, stats


def replay_snapshot(state):
    sampler, rows = state._sampler, np.arange(state.config.num_rows)
    return {
        "committed": state.allocator.committed().tolist(),
        "free": state.allocator.free().tolist(),
        "generations": state.generations.tolist(),
        "masses": sampler.masses_of(rows).tolist() if hasattr(sampler, "masses_of") else sampler._live.members.tolist(),
        "random": state._rng.bit_generator.state,
        "limiter": dict(vars(state.limiter)),
    }


def items_snapshot(state):
    sampler, rows = state._sampler, np.arange(state.config.num_rows)
    return {
        "waiting": [(row, int(state._numbers[row]), int(state.uses[row])) for row in state._waiting.rows().tolist()],
        "reading": sorted(state._reading.items()),
        "free": plain(state._free),
        "reserved": state.num_reserved,
        "generations": state.generations.tolist(),
        "masses": sampler.masses_of(rows).tolist() if hasattr(sampler, "masses_of") else None,
        "random": state._rng.bit_generator.state,
        "limiter": dict(vars(state.limiter)),
    }


def rollouts_snapshot(state):
    return {name: plain(value) for name, value in vars(state).items() if name != "config"}


def check_tables(core):
    """What holds at every moment, whatever clients sent."""
    for table in core.tables.values():
        channels = [
            channel
            for session in core.sessions.values()
            for channel in session.channels.values()
            if channel.table is table
        ]
        held = [row for c in channels if isinstance(c, WriterChannel) for row in c.rows.tolist()]
        read = [row for c in channels if not isinstance(c, WriterChannel) for row in c.rows]
        if isinstance(table.state, ConsumedTableState):
            check_items(table.state, held, read)
        elif isinstance(table.state, RolloutTableState):
            check_rollouts(table.state, held, read)
        else:
            check_replay(table.state, held)
        assert all(writer.num_wanted for writer in table.wanting)
        assert table.next_grant() is None, "a writer waits for rows that are there"
    msgspec.msgpack.encode(core.info(0.0))


def check_replay(state, held):
    allocator = state.allocator
    committed, free = allocator.committed().tolist(), allocator.free().tolist()
    assert sorted(held + committed + free) == list(range(state.config.num_rows)), "a row is lost or owned twice"
    assert len(held) == allocator.num_reserved <= allocator.headroom
    assert len(committed) <= allocator.capacity
    assert np.flatnonzero(state.generations % 2).tolist() == sorted(committed)
    assert state._sampler.num_items == len(committed) == state.limiter.size


def check_items(state, held, read):
    waiting, free = state._waiting.rows().tolist(), plain(state._free)
    everything = sorted(held + waiting + free + read + list(state._held))
    assert everything == list(range(state.config.num_rows)), "a row is lost or owned twice"
    assert len(held) == state.num_reserved <= state.config.headroom
    assert sorted(read) == sorted(state._reading)
    assert np.flatnonzero(state.generations % 2).tolist() == sorted(waiting + read)
    is_last = state.uses[np.array(read, np.int64)] + 1 == state.config.max_times_sampled
    assert state.limiter.size == len(waiting) + len(read) - int(np.count_nonzero(is_last))
    assert state._sampler is None or state._sampler.num_items == len(waiting)


def check_rollouts(state, held, read):
    free, finished = plain(state._free), [fragment.row for fragment in state._finished]
    everything = sorted(free + state._held + held + finished + read)
    assert everything == list(range(state.config.num_fragments)), "a fragment is lost or in two places"
    assert sorted(held) == sorted(state._writing)
    assert sorted(read) == sorted(state._reading)
    assert np.flatnonzero(state.generations % 2).tolist() == sorted(finished + read)
