"""Who waits in the server, collected from its queues for `waits` to put into words. Read only."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from rl_buffer import waits
from rl_buffer.consumed_table import ConsumedTableState
from rl_buffer.replay_table import ReplayTableState
from rl_buffer.rollout_table import RolloutTableState
from rl_buffer.sessions import ReaderChannel, SamplerChannel, ServedTable, Session, WriterChannel
from rl_buffer.waits import FOR_INSERTS, FOR_ROWS, FOR_SAMPLES, THE_SERVER, Client, Wait

Channel: TypeAlias = WriterChannel | SamplerChannel | ReaderChannel


class TableWaits(NamedTuple):
    """What `info` says of one table's queues."""

    sentences: list[str]  # for whoever is first in each
    stuck: str  # why nobody there can go on; "" if somebody can


def describe_waits(
    tables: Collection[ServedTable],
    sessions: Collection[Session],
    now_s: float,
    is_stopped: Callable[[int], bool],
) -> dict[str, TableWaits]:
    """Of every table, by name.

    Args:
        tables: all of them.
        sessions: all clients.
        now_s: monotonic.
        is_stopped: whether the process with this id is stopped by a signal.
    """
    numbers = {session.token: number for number, session in enumerate(sessions)}
    channels = [channel for session in sessions for channel in session.channels.values()]
    queues = {table.name: _Queues(table, channels, now_s, numbers) for table in tables}
    found = [wait for table in queues.values() for wait in table.waits()]
    stuck = {}
    if found:
        clients = {
            number: Client(session.name, session.connected, is_stopped(session.pid), now_s - session.last_action_s)
            for number, session in enumerate(sessions)
        }
        stuck = waits.stuck(found, clients)
    return {name: TableWaits(table.sentences(), stuck.get(name, "")) for name, table in queues.items()}


class _Queues:
    """One table's writers and takers (samplers or readers), and which of them wait."""

    def __init__(
        self, table: ServedTable, channels: Iterable[Channel], now_s: float, numbers: Mapping[bytes, int]
    ) -> None:
        self._table = table
        self._now_s = now_s
        self._numbers = numbers
        self._channels = [channel for channel in channels if channel.table is table]
        connected = [channel for channel in self._channels if channel.session.connected]
        self._writers = [c.session for c in connected if isinstance(c, WriterChannel) and not c.closing]
        self._takers = [c.session for c in connected if not isinstance(c, WriterChannel)]
        takers: list[SamplerChannel | ReaderChannel] = [*table.samplers, *table.readers]
        self._asking = [taker for taker in takers if taker.num_credits]
        self._lacking = [writer for writer in table.wanting if writer.num_lacking]

    def waits(self) -> list[Wait]:
        """All of them."""
        takers, writers = self._clients(self._takers), self._clients(self._writers)
        found = [self._wait(pending.writer, FOR_SAMPLES, pending.since_s, takers) for pending in self._table.pending]
        if self._lacking:
            holders = self._holders()
            found += [self._wait(writer, FOR_ROWS, writer.waiting_since_s, holders) for writer in self._lacking]
        return found + [self._wait(taker, FOR_INSERTS, taker.waiting_since_s, writers) for taker in self._asking]

    def _wait(self, channel: Channel, what: str, since_s: float, helpers: frozenset[int]) -> Wait:
        number = self._numbers[channel.session.token]
        return Wait(number, self._table.name, what, self._now_s - since_s, helpers)

    def _clients(self, sessions: Iterable[Session]) -> frozenset[int]:
        return frozenset(self._numbers[session.token] for session in sessions)

    def _holders(self) -> frozenset[int]:
        """Clients whose next step may free rows."""
        if self._table.state.num_held:  # the checkpoint goes on
            return frozenset((THE_SERVER,))
        holders = [channel.session for channel in self._channels if len(channel.rows)]
        is_rollouts = isinstance(self._table.state, RolloutTableState)
        return self._clients((*holders, *self._takers)) if is_rollouts else self._clients(holders)

    # ---- in words

    def sentences(self) -> list[str]:
        """For whoever is first in each queue."""
        state = self._table.state
        return self._rollout_sentences(state) if isinstance(state, RolloutTableState) else self._replay_sentences(state)

    def _replay_sentences(self, state: ReplayTableState | ConsumedTableState) -> list[str]:
        table, found = self._table, []
        if table.pending:
            pending = table.pending[0]
            reason = state.limiter.explain_insert(pending.commit.num_rows - pending.num_published)
            others = self._others("sampler", self._takers, "sample", table.last_sample_s)
            found.append(self._sentence(pending.writer, reason, pending.since_s, others, len(table.pending)))
        if self._lacking:
            writer = self._lacking[0]
            reason = (
                f"waits for rows, {state.num_reserved} of {state.config.headroom} are reserved by "
                f"writers{_read(state)}{_held(state.num_held)}"
            )
            found.append(self._sentence(writer, reason, writer.waiting_since_s, (), len(self._lacking)))
        if self._asking:
            sampler = self._asking[0]
            assert isinstance(sampler, SamplerChannel)
            reason = state.explain_sample(sampler.batch_size)
            others = self._others("writer", self._writers, "insert", table.last_insert_s)
            found.append(self._sentence(sampler, reason, sampler.waiting_since_s, others, len(self._asking)))
        return found

    def _rollout_sentences(self, state: RolloutTableState) -> list[str]:
        found, wanting = [], self._table.wanting
        if wanting:
            reason = (
                f"waits for a fragment, {state.num_writing} are being written, {len(state)} are finished and "
                f"{state.num_reading} are being read, of {state.config.num_fragments}{_held(state.num_held)}"
            )
            found.append(self._sentence(wanting[0], reason, wanting[0].waiting_since_s, (), len(wanting)))
        if self._asking:
            reader = self._asking[0]
            reason = f"waits for {reader.num_credits} fragments, {state.num_writing} are being written"
            others = self._others("writer", self._writers, "fragment", self._table.last_insert_s)
            found.append(self._sentence(reader, reason, reader.waiting_since_s, others, len(self._asking)))
        return found

    def _sentence(
        self, channel: Channel, reason: str, since_s: float, others: tuple[str, ...], num_waiting: int
    ) -> str:
        return waits.sentence(channel.session.name, reason, self._now_s - since_s, others, num_waiting - 1)

    def _others(self, noun: str, sessions: Sequence[Session], event: str, last_s: float | None) -> tuple[str, str]:
        age_s = None if last_s is None else self._now_s - last_s
        return f"{waits.count(len(sessions), noun)} connected", waits.last(event, age_s)


def _read(state: ReplayTableState | ConsumedTableState) -> str:
    return f", {state.num_reading} are being read" if isinstance(state, ConsumedTableState) else ""


def _held(num_held: int) -> str:
    return f", and {num_held} must be copied to a checkpoint first" if num_held else ""
