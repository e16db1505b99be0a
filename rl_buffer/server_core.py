"""The server's decisions without its sockets: sessions, writers, samplers, and who may go on.

`handle(channel_id, frame, now)` is the only way in for messages; it returns what to send. Clock, randomness and
memory are passed in, so that a simulator can drive exactly this code. The loop around it is in `server_loop`.

A writer and the server keep the same queue of reserved rows. The writer fills rows from the front and commits a
count; the server appends the next rows behind the acknowledgement. A commit that the limiter holds back waits
here, unacknowledged, with the rows that did not pass still reserved.

    attached --end of file--> quarantined --process exit, or no lease--> gone: rows freed
        |                         |                                       ^
        +------process exit, or it attached again: see `attached_again`---+

A process that attaches again goes on where it was: its writers say who they are, and hear what of their commits is
published (`resume_point`).
"""

import sys
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rl_buffer import frames, messages
from rl_buffer.allocator import Rows
from rl_buffer.checkpoint import Cut, ParameterMemory, take_cut
from rl_buffer.checkpoint_request import CheckpointRequest
from rl_buffer.consumed_table import ConsumedTableState
from rl_buffer.descriptors import PER_CHANNEL, PER_CLIENT, PER_PARAMETER_SET
from rl_buffer.diagnostics import RateWindow
from rl_buffer.errors import InvalidInput
from rl_buffer.failpoints import reached
from rl_buffer.grants import Grants, Outgoing
from rl_buffer.ledger import Ledger
from rl_buffer.messages import Envelope, ReplyEnvelope
from rl_buffer.parameter_slots import ParameterSlots
from rl_buffer.peers import UNKNOWN_PROCESS, Process
from rl_buffer.rate_limiters import LimiterConfig, check_sample_possible
from rl_buffer.rollout_table import RolloutTableState
from rl_buffer.server_info import counters, describe_session, describe_table
from rl_buffer.server_stats import MAX_NAME_LENGTH, ServerStats
from rl_buffer.sessions import (
    PendingCommit,
    ReaderChannel,
    SamplerChannel,
    ServedTable,
    Session,
    WriterChannel,
    WriterProgress,
)
from rl_buffer.table_states import TableState
from rl_buffer.tables import StatsConfig
from rl_buffer.wait_facts import describe_waits

MAX_SESSIONS = 1024
MAX_CHANNELS_PER_SESSION = 256
MAX_CREDITS = 64
MAX_KNOWN_WRITERS = 1 << 16  # that may come back; the one that is longest gone is forgotten first
WRITER_ID_NBYTES = 16
MAX_REASON_LENGTH = 1000  # a refusal may quote what a client sent, and `info` repeats the last one to everybody


class ServerCore:
    """All tables, sessions and parameter sets of one server epoch."""

    def __init__(
        self,
        epoch: int,
        tables: Mapping[str, TableState],
        stats: StatsConfig,
        ledger: Ledger | None = None,
    ) -> None:
        """Start with nobody attached; `ledger` is told of all that a later server must know."""
        self.epoch = epoch
        self._ledger = ledger or Ledger()
        self.tables = {name: ServedTable(name, state) for name, state in tables.items()}
        self.stats = ServerStats(stats.window, stats.category, stats.extra_metrics_keys, stats.done_reason_keys)
        self.parameters: dict[str, ParameterSlots] = {}
        self.sessions: dict[bytes, Session] = {}
        self._grants = Grants(epoch, self._ledger, self.stats, self.parameters, self._drop)
        self.max_descriptors = sys.maxsize  # that the server's process may open for clients
        self.is_stopped: Callable[[int], bool] = lambda pid: False  # whether that process is stopped by a signal
        self.known_writers: dict[bytes, WriterProgress] = {}  # by writer_id: without a channel, and may open another
        self.checkpoint: CheckpointRequest | None = None  # that a client waits for; for the loop to carry out
        self._rates = RateWindow()
        self.num_messages = 0
        self.num_refused = 0
        self.num_undelivered = 0  # messages to clients that did not read
        self.last_refusal = ""

    # ---- sessions ------------------------------------------------------------------------------------------

    def attach(
        self,
        token: bytes,
        name: str,
        pid: int,
        now_s: float,
        process: Process = UNKNOWN_PROCESS,
        *,
        is_guest: bool = False,
    ) -> None:
        """Let a client in.

        Raises:
            InvalidInput: too many clients.
        """
        if len(self.sessions) >= MAX_SESSIONS:
            raise InvalidInput(
                f"{MAX_SESSIONS} clients are attached, which is the limit; use one for all threads and environments of "
                "a process, and close those that are done"
            )
        self.require_descriptors(PER_CLIENT + PER_CHANNEL)
        client = self._ledger.attached(token, process)
        shown_name = name[:MAX_NAME_LENGTH] or f"pid {pid}"
        self.sessions[token] = Session(token, shown_name, pid, now_s, client=client, is_guest=is_guest)

    def disconnected(self, token: bytes) -> None:
        """Quarantine: the connection is gone, but the process may still be writing into its rows."""
        if token in self.sessions:
            self.sessions[token].connected = False

    def has_leases(self, token: bytes) -> bool:
        """Whether the client's process may still write into rows or a parameter slot, or read what it has leased."""
        session = self.sessions.get(token)
        return session is not None and (
            any(isinstance(c, WriterChannel) or c.table.leasing is not None for c in session.channels.values())
            or any(slots.is_held_by(token) for slots in self.parameters.values())
        )

    def attached_again(self, token: bytes, pid: int, now_s: float = 0.0) -> Outgoing:
        """Process `pid`, whose session was `token`, attaches anew, and writes no more into what that session held.

        A session of another process, or of an earlier epoch that left nothing, is none of its.
        """
        session = self.sessions.get(token)
        if session is None or session.pid not in (pid, 0):  # 0: it cannot be seen from here
            return []
        for channel in session.channels.values():
            if isinstance(channel, WriterChannel):
                self._remember(channel)
        return self.exited(token, now_s)

    def resume_point(self, writer_id: bytes, acknowledged: int) -> WriterProgress:
        """How much is published of what a writer sent that knows it of the commits up to `acknowledged`."""
        return max(self.known_writers.get(writer_id, WriterProgress(0, 0)), WriterProgress(acknowledged, 0))

    def _remember(self, writer: WriterChannel) -> None:
        if writer.writer_id:
            self.know_writers({writer.writer_id: writer.progress})

    def know_writers(self, writers: Mapping[bytes, WriterProgress]) -> None:
        """These writers have no channel, and may come back."""
        self.known_writers |= writers
        while len(self.known_writers) > MAX_KNOWN_WRITERS:
            forgotten = next(iter(self.known_writers))
            del self.known_writers[forgotten]
            self._ledger.writer_left(forgotten, comes_back=False)

    def exited(self, token: bytes, now_s: float = 0.0) -> Outgoing:
        """The client is gone for certain, or left without a lease: free its rows, forget its pending commits."""
        self._grants.now_s = max(self._grants.now_s, now_s)
        session = self.sessions.pop(token, None)
        if session is None:
            return []
        reached("server.freeing")
        touched = {channel.table.name: channel.table for channel in session.channels.values()}
        for channel in list(session.channels.values()):
            self._drop(channel)
        for slots in self.parameters.values():
            slots.release(token)
        self._ledger.left(session.client)
        reached("server.freed")
        return [message for table in touched.values() for message in self._advance(table)]

    def _drop(self, channel: WriterChannel | SamplerChannel | ReaderChannel) -> None:
        table = channel.table
        del channel.session.channels[channel.channel_id]
        if isinstance(channel, SamplerChannel | ReaderChannel):
            if isinstance(channel, SamplerChannel):
                table.samplers.remove(channel)
            else:
                table.readers.remove(channel)
            if table.leasing is not None:
                rows = np.array(sorted(channel.rows), np.int64)
                table.leasing.give_back(rows)
                self._ledger.given_back(table.name, rows)
            return
        table.pending = deque(pending for pending in table.pending if pending.writer is not channel)
        channel.num_rows_pending = 0
        self._release_uncommitted(channel)
        self._ledger.writer_left(channel.writer_id, comes_back=channel.writer_id in self.known_writers)

    def _release_uncommitted(self, writer: WriterChannel) -> None:
        if writer in writer.table.wanting:
            writer.table.wanting.remove(writer)
        writer.rows, unused = writer.rows[: writer.num_rows_pending], writer.rows[writer.num_rows_pending :]
        writer.table.state.release(unused)
        self._ledger.released(writer.table.name, unused)

    def _close(self, channel: WriterChannel | SamplerChannel | ReaderChannel) -> Outgoing:
        if isinstance(channel, WriterChannel) and channel.has_pending:
            channel.closing = True  # what it committed is published first
            self._release_uncommitted(channel)
        else:
            self._drop(channel)
        return self._advance(channel.table)

    # ---- messages ------------------------------------------------------------------------------------------

    def handle(self, channel_id: bytes, frame: bytes, now_s: float) -> Outgoing:
        """Act on one frame, or refuse it whole; never raises for what a client sent."""
        self.num_messages += 1
        self._grants.now_s = now_s
        if now_s >= self._rates.next_note_s:
            self._rates.note(now_s, counters(self.tables.values(), self.sessions.values()))
        kind = frames.kind_of(frame)
        try:
            session = self.sessions.get(channel_id[: frames.TOKEN_NBYTES])
            if session is None or len(channel_id) != frames.CHANNEL_ID_NBYTES:
                raise InvalidInput("this sender is not attached to this server; connect again")
            session.last_message_s = now_s
            if kind == frames.COMMIT:
                return self._commit(session, channel_id, frame)
            if kind == frames.CREDIT:
                return self._credit(session, channel_id, frame)
            if kind == frames.CONTROL:
                return self._control(session, channel_id, frame, now_s)
            raise InvalidInput(f"unknown message kind {kind}")
        except InvalidInput as error:
            return [(channel_id, frames.encode_refusal(self.epoch, self.refused(error)))]

    def refused(self, error: Exception) -> str:
        """Count something that was refused to somebody; return what to tell him."""
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
        self.stats.check(commit.episodes)
        reached("server.commit_checked")
        writer.sequence_received = commit.sequence
        writer.num_rows_pending += commit.num_rows
        writer.parameter_version = commit.parameter_version
        session.last_action_s = self._grants.now_s
        writer.table.pending.append(PendingCommit(writer, commit, self._grants.now_s))
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
        reached("server.credit_checked")
        if len(credit.rows):
            if isinstance(sampler.table.state, ConsumedTableState):
                num_released = self._finish(sampler, sampler.table.state, credit)
                sampler.table.diagnostics.num_updates += len(credit.rows) - num_released
            else:
                sampler.table.replay.update_priorities(credit.rows, credit.generations, credit.td_errors)
                sampler.table.diagnostics.num_updates += len(credit.rows)
            reached("server.updated")
        sampler.num_credits += credit.num_credits
        session.last_action_s = sampler.waiting_since_s = self._grants.now_s
        sampler.table.num_overtaken += credit.num_overtaken
        return self._advance(sampler.table)

    def _finish(self, sampler: SamplerChannel, state: ConsumedTableState, credit: frames.Credit) -> int:
        """Take back items that were copied, and set the priorities of others; return how many were copied."""
        is_copied = np.isnan(credit.td_errors)
        rows, others = credit.rows[is_copied], ~is_copied
        self._check_held(sampler, state.generations, rows, credit.generations[is_copied])
        if others.any():
            state.update_priorities(credit.rows[others], credit.generations[others], credit.td_errors[others])
        finished = state.finish(rows)
        self._ledger.used(sampler.table.name, finished.returned, state.uses)
        self._ledger.emptied(sampler.table.name, finished.removed, 0)
        self._ledger.sampled(sampler.table.name, state.num_finished_samples)
        sampler.rows.difference_update(rows.tolist())
        return len(rows)

    def _check_held(
        self, reader: SamplerChannel | ReaderChannel, generations: Rows, rows: Rows, expected: Rows
    ) -> None:
        """Refuse a release of what this reader does not hold, or no longer."""
        what = f"{'fragments' if isinstance(reader, ReaderChannel) else 'items'} {rows.tolist()} are"
        if not reader.rows.issuperset(rows.tolist()):
            raise InvalidInput(f"{what} not all held by this reader, which has {reader.rows}")
        if not np.array_equal(generations[rows], expected):
            # A release that comes late or twice must not free what was handed out since.
            raise InvalidInput(f"{what} no longer of generations {expected.tolist()}")
        if len(set(rows.tolist())) != len(rows):
            raise InvalidInput(f"{what} named twice")

    def _read(self, reader: ReaderChannel, credit: frames.Credit) -> Outgoing:
        """Free the fragments that were read, and note how many more are wanted."""
        rows, num_fragments = credit.rows, reader.table.rollouts.config.num_fragments
        if reader.num_credits + credit.num_credits > num_fragments:
            raise InvalidInput(f"{reader.num_credits} + {credit.num_credits} credits exceed {num_fragments} fragments")
        rollouts = reader.table.rollouts
        self._check_held(reader, rollouts.generations, rows, credit.generations)
        rollouts.finish(rows)
        self._ledger.emptied(reader.table.name, rows, rollouts.num_dropped)
        reached("server.released")
        reader.rows.difference_update(rows.tolist())
        reader.num_credits += credit.num_credits
        reader.session.last_action_s = reader.waiting_since_s = self._grants.now_s
        return self._advance(reader.table)

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            raise InvalidInput(f"message of epoch {epoch:016x}, but this server is {self.epoch:016x}; connect again")

    def info(self, now_s: float) -> dict[str, Any]:
        """Tables, clients and parameters in plain values; what `client.info()` returns."""
        waits = describe_waits(self.tables.values(), self.sessions.values(), now_s, self.is_stopped)
        return {
            "epoch": f"{self.epoch:016x}",
            "num_messages": self.num_messages,
            "num_refused": self.num_refused,
            "num_undelivered": self.num_undelivered,
            "last_refusal": self.last_refusal,
            "tables": {
                name: describe_table(table, waits[name], self._rates, now_s) for name, table in self.tables.items()
            },
            "parameters": {name: slots.version for name, slots in self.parameters.items()},
            "checkpoint": None if self.checkpoint is None else self.checkpoint.describe(now_s),
            "clients": [describe_session(session, self._rates, now_s) for session in self.sessions.values()],
        }

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def take_cut(self, parameters: Mapping[str, ParameterMemory]) -> Cut:
        """What is to be in the checkpoint that was asked for; its rows stay as they are until they are `copied`."""
        assert self.checkpoint is not None
        writers = dict(self.known_writers)
        for session in self.sessions.values():
            writers |= {c.writer_id: c.progress for c in session.channels.values() if isinstance(c, WriterChannel)}
        states = {name: table.state for name, table in self.tables.items()}
        progress = {writer_id.hex(): point for writer_id, point in writers.items() if writer_id}
        cut = take_cut(states, parameters, self.stats, progress)
        self.checkpoint.num_items = {name: table.num_items for name, table in cut.contents.tables.items()}
        return cut

    def copied(self, part: str, num_rows: int, now_s: float) -> Outgoing:
        """`num_rows` more rows of a part of the cut are in the file."""
        self._grants.now_s = now_s
        kind, _, name = part.partition(":")
        if kind == "parameters":
            self.parameters[name].copied(num_rows)
        if kind != "rows":
            return []
        self.tables[name].state.copied(num_rows)
        return self._advance(self.tables[name])

    def thaw(self, now_s: float) -> Outgoing:
        """Nothing of the cut, if there is one, will be copied any more."""
        self._grants.now_s = now_s
        for slots in self.parameters.values():
            slots.copied(1)
        for table in self.tables.values():
            table.state.copied(table.state.config.num_rows)
        return [message for table in self.tables.values() for message in self._advance(table)]

    def checkpoint_ended(self, outcome: int | str, now_s: float) -> Outgoing:
        """The file is on the disk, of so many bytes, or the reason why there is none: tell the client."""
        request, outgoing = self.checkpoint, self.thaw(now_s)
        assert request is not None
        self.checkpoint = None
        reply: messages.Reply
        if isinstance(outcome, str):
            reply = messages.Refused(outcome[:MAX_REASON_LENGTH])
        else:
            reply = request.report(outcome, now_s)
        return [self._reply(request.channel_id, request.request_id, reply), *outgoing]

    def _ask_checkpoint(self, session: Session, channel_id: bytes, request_id: int, path: str, now_s: float) -> None:
        if session.is_guest:
            raise InvalidInput("a checkpoint is a file of the server's user; no process of another one can ask for it")
        if self.checkpoint is not None:
            raise InvalidInput(
                f"{self.checkpoint.client} has a checkpoint written to {self.checkpoint.path} already; one at a time"
            )
        if not path.startswith("/") or "\0" in path:
            raise InvalidInput(f"path of a checkpoint must be absolute, got {path[: MAX_REASON_LENGTH // 2]!r}")
        self.checkpoint = CheckpointRequest(channel_id, request_id, session.name, path, now_s)

    def _advance(self, table: ServedTable) -> Outgoing:
        """Let everybody go on who can."""
        outgoing = self._grants.advance(table)
        if self.checkpoint is not None:
            self.checkpoint.look(self.tables.values(), self._grants.now_s)
        return outgoing

    # ---- control requests ----------------------------------------------------------------------------------

    def _control(self, session: Session, channel_id: bytes, frame: bytes, now_s: float) -> Outgoing:
        envelope = messages.decode_control_request(frame)
        outgoing: Outgoing = []
        try:
            self._check_epoch(envelope.epoch)
            if isinstance(envelope.request, messages.Checkpoint):  # answered by `checkpoint_ended`
                self._ask_checkpoint(session, channel_id, envelope.request_id, envelope.request.path, now_s)
                return []
            reply = self._answer(session, envelope, now_s, outgoing)
        except InvalidInput as error:
            reply = messages.Refused(self.refused(error))
        return [self._reply(channel_id, envelope.request_id, reply), *outgoing]

    def _reply(self, channel_id: bytes, request_id: int, reply: messages.Reply) -> tuple[bytes, bytes]:
        return channel_id, messages.encode_control(ReplyEnvelope(request_id, self.epoch, reply))

    def _answer(self, session: Session, envelope: Envelope, now_s: float, outgoing: Outgoing) -> messages.Reply:
        match envelope.request:
            case messages.OpenWriter() as request:
                return self._open_writer(session, request, outgoing)
            case messages.OpenSampler(channel=number, table=name, batch_size=batch_size):
                table, channel_id = self._table(name), self._new_channel(session, number)
                sampler = SamplerChannel(channel_id, session, table, batch_size)
                limit = frames.MAX_ROWS_PER_MESSAGE * 15 // 16  # leaves room for the spares
                if not 1 <= batch_size <= limit:
                    raise InvalidInput(f"batch_size must be in [1, {limit}], got {batch_size}")
                table.replay.config.check_batch_size(batch_size)
                table.replay.limiter.check_sample_possible(batch_size)
                session.channels[channel_id] = sampler
                table.samplers.append(sampler)
                reached("server.opened")
                return messages.Opened()
            case messages.OpenReader(channel=number, table=name):
                table, channel_id = self._table(name), self._new_channel(session, number)
                _ = table.rollouts
                reader = ReaderChannel(channel_id, session, table)
                session.channels[channel_id] = reader
                table.readers.append(reader)
                reached("server.opened")
                return messages.Opened()
            case messages.CloseChannel(channel=number):
                channel = session.channels.get(_channel_id(session, number))
                if channel is not None:
                    outgoing.extend(self._close(channel))
                return messages.Opened()
            case messages.ReserveParameters(name=name):
                slots = self._slots(name)
                slot = messages.Slot(slots.reserve(session.token), slots.version)
                reached("server.slot_reserved")
                return slot
            case messages.PublishParameters(name=name, slot=slot):
                published = messages.Slot(slot, self._slots(name).publish(session.token, slot))
                reached("server.parameters_published")
                return published
            case messages.Clear(table=name):
                table = self._table(name)
                self._ledger.cleared(name)
                table.state.clear()
                outgoing.extend(self._advance(table))
                return messages.Opened()
            case messages.SetRateLimiter(table=name, limiter=limiter):
                table = self._table(name)
                self._set_limiter(table, limiter)
                outgoing.extend(self._advance(table))
                return messages.Opened()
            case messages.GetSize(table=name):
                return messages.Value(len(self._table(name).state))
            case messages.GetInfo():
                return messages.Value(self.info(now_s))
            case messages.GetStats(per_client=per_client):
                by_client = self.stats.by_client() if per_client else {}
                return messages.Value(self.stats.get_statistics() | by_client)
            case messages.Checkpoint():
                raise AssertionError("it is answered later")

    def _set_limiter(self, table: ServedTable, limiter: LimiterConfig) -> None:
        state = table.replay
        state.config.check_limiter(limiter)
        for sampler in table.samplers:
            try:
                check_sample_possible(limiter, sampler.batch_size)
            except InvalidInput as error:
                raise InvalidInput(f"{sampler.session.name} samples table {table.name!r} now: {error}") from error
        # Commits need no look: of a chunk of any size each item passes as soon as it may.
        state.limiter.set(limiter)
        self._ledger.limited(table.name, state.limiter)
        reached("limiter.changed")

    def _open_writer(self, session: Session, request: messages.OpenWriter, outgoing: Outgoing) -> messages.Opened:
        table, channel_id = self._table(request.table), self._new_channel(session, request.channel)
        _check_writer(table, request)
        for other in list(session.channels.values()):
            if isinstance(other, WriterChannel) and other.writer_id == request.writer_id != b"":
                # It asked for that channel too, and gave up before it heard of it or of its rows.
                self._remember(other)
                self._drop(other)
                outgoing.extend(self._advance(other.table))
        sequence, num_published = self.resume_point(request.writer_id, request.acknowledged)
        writer = WriterChannel(channel_id, session, table, request.max_commit_rows, request.writer_id)
        writer.sequence_received = writer.sequence_committed = sequence
        writer.num_published = num_published
        writer.number = self._ledger.writer_opened(request.writer_id, writer.progress)
        self.known_writers.pop(request.writer_id, None)
        session.channels[channel_id] = writer
        reached("server.opened")
        self._grants.want(writer, request.num_wanted)
        self._grants.grant_rows(table, outgoing)
        return messages.Opened(sequence, num_published)

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
        self.require_descriptors(PER_CHANNEL)
        return channel_id

    def require_descriptors(self, num_more: int) -> None:
        """Refuse what the server's process would have to open more descriptors for than it may.

        Raises:
            InvalidInput: so many clients, channels and parameter sets are open.
        """
        num_channels = sum(len(session.channels) for session in self.sessions.values())
        num_used = PER_CLIENT * len(self.sessions) + PER_CHANNEL * num_channels
        num_used += PER_PARAMETER_SET * len(self.parameters)
        if num_used + num_more > self.max_descriptors:
            raise InvalidInput(
                f"{len(self.sessions)} clients with {num_channels} writers, samplers and readers are attached, which "
                "is what the server's limit of open descriptors (RLIMIT_NOFILE) allows; close some, or raise it "
                "(ulimit -n) before the server starts"
            )


def _channel_id(session: Session, number: int) -> bytes:
    if not 0 <= number < 2**32:
        raise InvalidInput(f"channel must be in [0, 2^32), got {number}")
    return session.token + number.to_bytes(4, "little")


def _check_writer(table: ServedTable, request: messages.OpenWriter) -> None:
    """Refuse a writer whose chunks could never be taken, or that does not say properly who it is."""
    max_commit_rows, num_wanted = request.max_commit_rows, request.num_wanted
    if len(request.writer_id) not in (0, WRITER_ID_NBYTES):
        raise InvalidInput(f"writer_id has {len(request.writer_id)} bytes, expected {WRITER_ID_NBYTES} or none")
    if not 0 <= request.acknowledged < 2**62:  # sequence numbers go on from there, in 64 bits
        raise InvalidInput(f"acknowledged must be in [0, 2^62), got {request.acknowledged}")
    if isinstance(table.state, RolloutTableState):
        if (max_commit_rows, num_wanted) != (1, 1):
            raise InvalidInput(f"table {table.name!r} holds rollouts, which are written one by one")
        return
    headroom = table.replay.config.headroom
    assert headroom is not None
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
