"""The server's decisions without its sockets: sessions, writers, samplers, and who may go on.

`handle(channel_id, frame, now)` is the only way in for messages; it returns what to send. Clock, randomness and
memory are passed in, so that a simulator can drive exactly this code. The loop around it is in `server_loop`.

A writer and the server keep the same queue of reserved rows. The writer fills rows from the front and commits a
count; the server appends the next rows behind the acknowledgement. A commit that the limiter holds back waits
here, unacknowledged, with the rows that did not pass still reserved.

    attached --end of file--> quarantined --process exit, or no lease--> gone: rows freed
        |                                                                 ^
        +---------------------process exit--------------------------------+
"""

from collections import deque
from typing import Any, TypeAlias

import numpy as np

from rl_buffer import frames, messages
from rl_buffer.allocator import Rows
from rl_buffer.errors import InvalidInput
from rl_buffer.frames import Batch, Grant
from rl_buffer.messages import Envelope, ReplyEnvelope
from rl_buffer.parameter_slots import ParameterSlots
from rl_buffer.replay_table import ReplayTableState
from rl_buffer.rollout_table import RolloutTableState
from rl_buffer.server_info import describe_session, describe_table
from rl_buffer.sessions import (
    NO_ROWS,
    PendingCommit,
    ReaderChannel,
    SamplerChannel,
    ServedTable,
    Session,
    WriterChannel,
)
from rl_buffer.stats_tracker import StatsTracker
from rl_buffer.tables import Sample, StatsConfig

MAX_SESSIONS = 1024
MAX_CHANNELS_PER_SESSION = 256
MAX_CREDITS = 64
MAX_NAME_LENGTH = 100  # of a client, repeated in every `info`
MAX_REASON_LENGTH = 1000  # a refusal may quote what a client sent, and `info` repeats the last one to everybody

Outgoing: TypeAlias = list[tuple[bytes, bytes]]  # (channel id, frame)


class ServerCore:
    """All tables, sessions and parameter sets of one server epoch."""

    def __init__(self, epoch: int, tables: dict[str, ReplayTableState | RolloutTableState], stats: StatsConfig) -> None:
        self.epoch = epoch
        self.tables = {name: ServedTable(name, state) for name, state in tables.items()}
        self.stats = StatsTracker(1, stats.window, stats.category, stats.extra_metrics_keys, stats.done_reason_keys)
        self.parameters: dict[str, ParameterSlots] = {}
        self.sessions: dict[bytes, Session] = {}
        self.num_messages = 0
        self.num_refused = 0
        self.last_refusal = ""

    # ---- sessions ------------------------------------------------------------------------------------------

    def attach(self, token: bytes, name: str, pid: int, now_s: float) -> None:
        """Let a client in.

        Raises:
            InvalidInput: too many clients.
        """
        if len(self.sessions) >= MAX_SESSIONS:
            raise InvalidInput(f"{MAX_SESSIONS} clients are attached, which is the limit")
        self.sessions[token] = Session(token, name[:MAX_NAME_LENGTH] or f"pid {pid}", pid, now_s)

    def disconnected(self, token: bytes) -> None:
        """Quarantine: the connection is gone, but the process may still be writing into its rows."""
        if token in self.sessions:
            self.sessions[token].connected = False

    def has_leases(self, token: bytes) -> bool:
        """Whether the client's process may still write into rows or a parameter slot, or read a rollout."""
        session = self.sessions.get(token)
        return session is not None and (
            any(isinstance(channel, WriterChannel | ReaderChannel) for channel in session.channels.values())
            or any(slots.is_held_by(token) for slots in self.parameters.values())
        )

    def exited(self, token: bytes) -> Outgoing:
        """The client is gone for certain, or left without a lease: free its rows, forget its pending commits."""
        session = self.sessions.pop(token, None)
        if session is None:
            return []
        touched = {channel.table.name: channel.table for channel in session.channels.values()}
        for channel in list(session.channels.values()):
            self._drop(channel)
        for slots in self.parameters.values():
            slots.release(token)
        return [message for table in touched.values() for message in self._advance(table)]

    def _drop(self, channel: WriterChannel | SamplerChannel | ReaderChannel) -> None:
        table = channel.table
        del channel.session.channels[channel.channel_id]
        if isinstance(channel, SamplerChannel):
            table.samplers.remove(channel)
            return
        if isinstance(channel, ReaderChannel):
            table.readers.remove(channel)
            table.rollouts.give_back(np.array(sorted(channel.rows), np.int64))
            return
        table.pending = deque(pending for pending in table.pending if pending.writer is not channel)
        channel.num_rows_pending = 0
        self._release_uncommitted(channel)

    def _release_uncommitted(self, writer: WriterChannel) -> None:
        if writer in writer.table.wanting:
            writer.table.wanting.remove(writer)
        writer.rows, unused = writer.rows[: writer.num_rows_pending], writer.rows[writer.num_rows_pending :]
        writer.table.state.release(unused)

    def _close(self, channel: WriterChannel | SamplerChannel | ReaderChannel) -> Outgoing:
        if isinstance(channel, WriterChannel) and channel.num_rows_pending:
            channel.closing = True  # what it committed is published first
            self._release_uncommitted(channel)
        else:
            self._drop(channel)
        return self._advance(channel.table)

    # ---- messages ------------------------------------------------------------------------------------------

    def handle(self, channel_id: bytes, frame: bytes, now_s: float) -> Outgoing:
        """Act on one frame, or refuse it whole; never raises for what a client sent."""
        self.num_messages += 1
        kind = frames.kind_of(frame)
        try:
            session = self.sessions.get(channel_id[: frames.TOKEN_NBYTES])
            if session is None or len(channel_id) != frames.CHANNEL_ID_NBYTES:
                raise InvalidInput("this sender is not attached to this server; connect again")
            if kind == frames.COMMIT:
                return self._commit(session, channel_id, frame)
            if kind == frames.CREDIT:
                return self._credit(session, channel_id, frame)
            if kind == frames.CONTROL:
                return self._control(session, channel_id, frame, now_s)
            raise InvalidInput(f"unknown message kind {kind}")
        except InvalidInput as error:
            return [(channel_id, frames.encode_refusal(self.epoch, self._refused(error)))]

    def _refused(self, error: InvalidInput) -> str:
        self.num_refused += 1
        self.last_refusal = str(error)[:MAX_REASON_LENGTH]
        return self.last_refusal

    def _commit(self, session: Session, channel_id: bytes, frame: bytes) -> Outgoing:
        writer = session.channels.get(channel_id)
        if not isinstance(writer, WriterChannel) or writer.closing:
            raise InvalidInput("commit on a channel that is not an open writer")
        commit = frames.decode_commit(frame)
        self._check_epoch(commit.epoch)
        num_held = len(writer.rows) - writer.num_rows_pending
        if commit.sequence != writer.sequence_received + 1:
            raise InvalidInput(f"commit {commit.sequence} is not the next; expected {writer.sequence_received + 1}")
        if commit.num_rows > num_held:
            raise InvalidInput(f"commit of {commit.num_rows} rows, but the writer holds {num_held}")
        if commit.num_rows > writer.max_commit_rows:
            raise InvalidInput(
                f"commit of {commit.num_rows} rows, but the writer was opened for at most {writer.max_commit_rows}"
            )
        if commit.num_wanted > commit.num_rows:  # so that it never holds more than it asked for at first
            raise InvalidInput(f"commit of {commit.num_rows} rows wants {commit.num_wanted}, more than it gives back")
        if commit.td_errors is not None:
            writer.table.replay.check_td_errors(commit.td_errors)
        self.stats.record(commit.episodes)  # last check: it refuses bad episodes before it changes anything
        writer.sequence_received = commit.sequence
        writer.num_rows_pending += commit.num_rows
        writer.parameter_version = commit.parameter_version
        writer.table.pending.append(PendingCommit(writer, commit))
        return self._advance(writer.table)

    def _credit(self, session: Session, channel_id: bytes, frame: bytes) -> Outgoing:
        sampler = session.channels.get(channel_id)
        credit = frames.decode_credit(frame)
        self._check_epoch(credit.epoch)
        if isinstance(sampler, ReaderChannel):
            return self._read(sampler, credit)
        if not isinstance(sampler, SamplerChannel):
            raise InvalidInput("credit on a channel that is not a sampler")
        if sampler.num_credits + credit.num_credits > MAX_CREDITS:
            raise InvalidInput(f"{sampler.num_credits} + {credit.num_credits} credits exceed the limit {MAX_CREDITS}")
        if len(credit.rows):
            sampler.table.replay.update_priorities(credit.rows, credit.generations, credit.td_errors)
        sampler.num_credits += credit.num_credits
        sampler.table.num_overtaken += credit.num_overtaken
        return self._advance(sampler.table)

    def _read(self, reader: ReaderChannel, credit: frames.Credit) -> Outgoing:
        """Free the fragments that were read, and note how many more are wanted."""
        rows, num_fragments = credit.rows, reader.table.rollouts.config.num_fragments
        if reader.num_credits + credit.num_credits > num_fragments:
            raise InvalidInput(f"{reader.num_credits} + {credit.num_credits} credits exceed {num_fragments} fragments")
        if not reader.rows.issuperset(rows.tolist()):
            raise InvalidInput(f"fragments {rows.tolist()} are not all held by this reader, which has {reader.rows}")
        reader.table.rollouts.finish(rows)
        reader.rows.difference_update(rows.tolist())
        reader.num_credits += credit.num_credits
        return self._advance(reader.table)

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            raise InvalidInput(f"message of epoch {epoch:016x}, but this server is {self.epoch:016x}; connect again")

    def info(self, now_s: float) -> dict[str, Any]:
        """Tables, clients and parameters in plain values; what `client.info()` returns."""
        return {
            "epoch": f"{self.epoch:016x}",
            "num_messages": self.num_messages,
            "num_refused": self.num_refused,
            "last_refusal": self.last_refusal,
            "tables": {name: describe_table(table) for name, table in self.tables.items()},
            "parameters": {name: slots.version for name, slots in self.parameters.items()},
            "clients": [describe_session(session, now_s) for session in self.sessions.values()],
        }

    # ---- progress ------------------------------------------------------------------------------------------

    def _advance(self, table: ServedTable) -> Outgoing:
        """Let everybody go on who can: commits, then reservations, then batches, until nothing moves."""
        outgoing: Outgoing = []
        grant = self._grant_fragments if isinstance(table.state, RolloutTableState) else self._grant_batch
        while self._publish_pending(table, outgoing) or grant(table, outgoing):
            pass
        self._grant_rows(table, outgoing)
        return outgoing

    def _publish_pending(self, table: ServedTable, outgoing: Outgoing) -> bool:
        moved = False
        while table.pending:
            pending = table.pending[0]
            num_left = pending.commit.num_rows - pending.num_published
            num_passing = table.state.num_insertable(num_left)
            if num_passing:
                self._publish(pending, num_passing)
                moved = True
            if num_passing < num_left:
                break
            table.pending.popleft()
            self._acknowledge(pending, outgoing)
        return moved

    def _publish(self, pending: PendingCommit, num_rows: int) -> None:
        writer, td_errors = pending.writer, pending.commit.td_errors
        rows, writer.rows = writer.rows[:num_rows], writer.rows[num_rows:]
        first, pending.num_published = pending.num_published, pending.num_published + num_rows
        if td_errors is not None:
            td_errors = td_errors[first : pending.num_published]
        state = writer.table.state
        if isinstance(state, RolloutTableState):
            state.commit(rows, pending.commit.parameter_version)
        else:
            state.commit(rows, td_errors)
        writer.num_rows_pending -= num_rows
        writer.num_inserts += num_rows

    def _acknowledge(self, pending: PendingCommit, outgoing: Outgoing) -> None:
        writer, commit = pending.writer, pending.commit
        writer.sequence_committed = commit.sequence
        if writer.closing:
            if not writer.num_rows_pending:
                self._drop(writer)
            return
        self._want(writer, commit.num_wanted)
        # With rows behind it if there are any, so that the common case is one message.
        is_first = bool(writer.num_wanted) and writer.table.wanting[0] is writer
        granted = self._take_rows(writer) if is_first else NO_ROWS
        outgoing.append((writer.channel_id, Grant(self.epoch, commit.sequence, granted).encode()))

    def _want(self, writer: WriterChannel, num_rows: int) -> None:
        if num_rows and not writer.num_wanted:
            writer.table.wanting.append(writer)
        writer.num_wanted += num_rows

    def _take_rows(self, writer: WriterChannel) -> Rows:
        """Rows for the writer at the head of the queue, or none while there are too few for all that it wants."""
        state = writer.table.state
        if writer.num_wanted > state.num_reservable:
            return NO_ROWS
        rows = state.reserve(writer.num_wanted)
        writer.rows = np.concatenate((writer.rows, rows))
        writer.num_wanted = 0
        writer.table.wanting.popleft()
        return rows

    def _grant_rows(self, table: ServedTable, outgoing: Outgoing) -> None:
        while table.wanting:
            writer = table.wanting[0]
            rows = self._take_rows(writer)
            if not len(rows):
                return
            outgoing.append((writer.channel_id, Grant(self.epoch, writer.sequence_committed, rows).encode()))

    def _grant_batch(self, table: ServedTable, outgoing: Outgoing) -> bool:
        state = table.replay
        # Nobody overtakes it, even with a smaller batch: one who took every sample at once would starve it.
        sampler = next((sampler for sampler in table.samplers if sampler.num_credits), None)
        if sampler is None or not len(state) or not state.limiter.can_sample(sampler.batch_size):
            return False
        sample = state.draw(sampler.batch_size, sampler.num_spares)
        sampler.num_credits -= 1
        sampler.num_samples += sampler.batch_size
        table.samplers.remove(sampler)
        table.samplers.append(sampler)
        outgoing.append((sampler.channel_id, Batch(self.epoch, sampler.batch_size, sample).encode()))
        return True

    def _grant_fragments(self, table: ServedTable, outgoing: Outgoing) -> bool:
        reader = next((reader for reader in table.readers if reader.num_credits), None)
        if reader is None:
            return False
        parameters = self.parameters.get(table.rollouts.config.parameters)
        newest_version = 0 if parameters is None else parameters.version
        leased = table.rollouts.lease(reader.num_credits, newest_version)
        if not leased:
            return False
        rows = np.array([fragment.row for fragment in leased])
        reader.rows.update(rows.tolist())
        reader.num_credits -= len(rows)
        reader.num_samples += len(rows)
        table.readers.rotate(-1)
        nothing = np.zeros(len(rows))
        sample = Sample(rows, nothing.astype(np.int64), nothing, 0.0, len(table.rollouts))
        outgoing.append((reader.channel_id, Batch(self.epoch, len(rows), sample).encode()))
        return True

    # ---- control requests ----------------------------------------------------------------------------------

    def _control(self, session: Session, channel_id: bytes, frame: bytes, now_s: float) -> Outgoing:
        envelope = messages.decode_control_request(frame)
        outgoing: Outgoing = []
        try:
            self._check_epoch(envelope.epoch)
            reply = self._answer(session, envelope, now_s, outgoing)
        except InvalidInput as error:
            reply = messages.Refused(self._refused(error))
        answer = messages.encode_control(ReplyEnvelope(envelope.request_id, self.epoch, reply))
        return [(channel_id, answer), *outgoing]

    def _answer(self, session: Session, envelope: Envelope, now_s: float, outgoing: Outgoing) -> messages.Reply:
        match envelope.request:
            case messages.OpenWriter(
                channel=number, table=name, max_commit_rows=max_commit_rows, num_wanted=num_wanted
            ):
                table, channel_id = self._table(name), self._new_channel(session, number)
                _check_writer(table, max_commit_rows, num_wanted)
                writer = WriterChannel(channel_id, session, table, max_commit_rows)
                session.channels[channel_id] = writer
                self._want(writer, num_wanted)
                self._grant_rows(table, outgoing)
                return messages.Opened()
            case messages.OpenSampler(channel=number, table=name, batch_size=batch_size):
                table, channel_id = self._table(name), self._new_channel(session, number)
                sampler = SamplerChannel(channel_id, session, table, batch_size)
                limit = frames.MAX_ROWS_PER_MESSAGE * 15 // 16  # leaves room for the spares
                if not 1 <= batch_size <= limit:
                    raise InvalidInput(f"batch_size must be in [1, {limit}], got {batch_size}")
                table.replay.limiter.check_sample_possible(batch_size)
                session.channels[channel_id] = sampler
                table.samplers.append(sampler)
                return messages.Opened()
            case messages.OpenReader(channel=number, table=name):
                table, channel_id = self._table(name), self._new_channel(session, number)
                _ = table.rollouts
                reader = ReaderChannel(channel_id, session, table)
                session.channels[channel_id] = reader
                table.readers.append(reader)
                return messages.Opened()
            case messages.CloseChannel(channel=number):
                channel = session.channels.get(_channel_id(session, number))
                if channel is not None:
                    outgoing.extend(self._close(channel))
                return messages.Opened()
            case messages.ReserveParameters(name=name):
                slots = self._slots(name)
                return messages.Slot(slots.reserve(session.token), slots.version)
            case messages.PublishParameters(name=name, slot=slot):
                return messages.Slot(slot, self._slots(name).publish(session.token, slot))
            case messages.Clear(table=name):
                table = self._table(name)
                table.state.clear()
                outgoing.extend(self._advance(table))
                return messages.Opened()
            case messages.GetSize(table=name):
                return messages.Value(len(self._table(name).state))
            case messages.GetInfo():
                return messages.Value(self.info(now_s))
            case messages.GetStats():
                return messages.Value(self.stats.get_statistics())

    def _table(self, name: str) -> ServedTable:
        if name not in self.tables:
            raise InvalidInput(f"no table is called {name!r}; this server has {sorted(self.tables)}")
        return self.tables[name]

    def _slots(self, name: str) -> ParameterSlots:
        if name not in self.parameters:
            raise InvalidInput(f"no parameters are called {name!r}; this server has {sorted(self.parameters)}")
        return self.parameters[name]

    def _new_channel(self, session: Session, number: int) -> bytes:
        channel_id = _channel_id(session, number)
        if channel_id in session.channels:
            raise InvalidInput(f"channel {number} is open already")
        if len(session.channels) >= MAX_CHANNELS_PER_SESSION:
            raise InvalidInput(f"a client can have {MAX_CHANNELS_PER_SESSION} writers and samplers, which are open")
        return channel_id


def _channel_id(session: Session, number: int) -> bytes:
    if not 0 <= number < 2**32:
        raise InvalidInput(f"channel must be in [0, 2^32), got {number}")
    return session.token + number.to_bytes(4, "little")


def _check_writer(table: ServedTable, max_commit_rows: int, num_wanted: int) -> None:
    """Refuse a writer whose chunks could never be taken."""
    if isinstance(table.state, RolloutTableState):
        if (max_commit_rows, num_wanted) != (1, 1):
            raise InvalidInput(f"table {table.name!r} holds rollouts, which are written one by one")
        return
    headroom = table.state.allocator.headroom
    if not 1 <= max_commit_rows <= num_wanted <= headroom:
        raise InvalidInput(
            f"a writer of table {table.name!r} wants to hold {num_wanted} rows, but its headroom is {headroom}; lower "
            "chunk_size or num_envs, or raise ReplayTable(headroom=)"
        )
    limit = min(table.state.config.capacity, frames.MAX_ROWS_PER_MESSAGE // 2)
    if max_commit_rows > limit or num_wanted > frames.MAX_ROWS_PER_MESSAGE:
        raise InvalidInput(
            f"a writer of table {table.name!r} commits up to {max_commit_rows} rows at once, more than the limit of "
            f"{limit}; lower chunk_size or num_envs"
        )
