"""The `Ledger` of a directory: mapped arrays, written so that at any instruction they can be gone on from."""

import dataclasses
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from rl_buffer.allocator import Rows
from rl_buffer.consumed_table import ConsumedTableState
from rl_buffer.errors import InvalidInput
from rl_buffer.failpoints import reached
from rl_buffer.ledger import NO_PROGRESS, Ledger
from rl_buffer.peers import Process
from rl_buffer.rate_limiters import LimiterConfig, MinSize, RateLimiter, SampleToInsertRatio
from rl_buffer.rollout_table import RolloutTableState
from rl_buffer.samplers import Prioritized
from rl_buffer.server_stats import MAX_CLIENTS as MAX_CLIENT_NAMES
from rl_buffer.server_stats import MAX_NAME_LENGTH, ClientRecord, ServerStats, client_window
from rl_buffer.sessions import WriterProgress
from rl_buffer.spec import Field
from rl_buffer.stats_tracker import Episode, Moments, StatsTracker
from rl_buffer.table_states import TableState
from rl_buffer.tables import ReplayTable, RolloutTable, StatsConfig

MAX_CLIENTS = 1 << 12
MAX_WRITERS = 1 << 17
_ALIGNMENT_NBYTES = 64  # the sum tree is faster if its leaves start with a cache line

# The journal, in words.
(
    _ARMED,
    _TABLE,
    _NUM_ROWS,
    _PUBLISHED_THEN,
    _CLAIM_THEN,  # rollouts
    _VERSION_THEN,  # rollouts
    _HAS_TD_ERRORS,
    _CLIENT_SLOT,  # whose moments are here, with those of all; -1: none
    _WRITER,  # -1: none that could go on
    _SEQUENCE_THEN,
    _PART_THEN,
    _JOURNAL_LENGTH,
) = range(12)
# Counts of a table.
PUBLISHED, CLEARED, NUM_SAMPLES, NUM_DROPPED, _LIMITER, _NUM_COUNTS = range(6)
# A limiter: kind, minimum size or capacity, whether a pair, ratio and bounds as floats, first insert, first sample.
_LIMITER_KINDS = get_args(LimiterConfig)
_LIMITER_LENGTH = 8
# A client: in use, the process, its token (two words). A writer: in use, its id (two words).
_IN_USE, _PROCESS, _TOKEN, _CLIENT_LENGTH = 0, slice(1, 5), slice(5, 7), 7
_WRITER_ID, _WRITER_LENGTH = slice(1, 3), 3
_PROGRESS_LENGTH = len(WriterProgress._fields)
# Moments: count, mean, m2, minimum, maximum of the rewards; how many episodes the ring has ever taken. A client's end
# with how many episodes all clients had, up to its last.
_NEXT_EPISODE, _NUM_MOMENTS = 5, 6
_NUM_CLIENT_MOMENTS = 7
# A client's name: its bytes in UTF-8, at most four for a character, and before them how many they are.
_NAME_LENGTH = 1 + 4 * MAX_NAME_LENGTH // 8

Words: TypeAlias = Any  # a flat memoryview
Tables = Mapping[str, ReplayTable | RolloutTable]


@dataclass(slots=True)
class TableRecord:
    """One table's part; what a table of its kind has not is of length 0."""

    config: ReplayTable | RolloutTable
    number: int
    counts: Words
    limiters: NDArray[np.int64]
    claims: NDArray[np.int64]
    masses: NDArray[np.float64]
    versions: NDArray[np.int64]
    readers: NDArray[np.int64]
    uses: NDArray[np.int64]


class MappedLedger(Ledger):
    """A ledger in memory that outlives its process. One thread."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]], tables: Tables, stats: StatsConfig) -> None:
        """Take over arrays as `ledger_fields` says: zeros, or as a server of the same configuration left them.

        An operation that was armed is carried out here as far as the ledger goes; see `recovery` for the rest.
        """
        self._stats = stats
        self._header, self._journal = _words(arrays["header"]), _words(arrays["journal"])
        self._journal_rows = arrays["journal_rows"]
        self._journal_td_errors = arrays["journal_td_errors"]
        self._moments, self._journal_moments = _words(arrays["moments"]), _words(arrays["journal_moments"])
        self._client_names, self._client_episodes = arrays["client_names"], arrays["client_episodes"]
        self._client_moments = _words(arrays["client_moments"])
        self._journal_client_moments = _words(arrays["journal_client_moments"])
        self._episodes, self._clients = arrays["episodes"], arrays["clients"]
        self._writers, self._progress = arrays["writers"], _words(arrays["progress"])
        nothing = np.zeros(0, np.int64)
        self.tables = {
            name: TableRecord(
                config,
                number,
                _words(arrays[f"{name}/counts"]),
                *(
                    arrays.get(f"{name}/{part}", nothing)
                    for part in ("limiters", "claims", "masses", "versions", "readers", "uses")
                ),
            )
            for number, (name, config) in enumerate(sorted(tables.items()))
        }
        self._by_number = list(self.tables.values())
        self._free_clients = [client for client in range(MAX_CLIENTS - 1, 0, -1) if not self._clients[client, _IN_USE]]
        in_use = self._writers[:, _IN_USE].tolist()
        self._free_writers = [writer for writer in range(MAX_WRITERS - 1, -1, -1) if not in_use[writer]]
        self._writer_numbers = {self._writers[n, _WRITER_ID].tobytes(): n for n in np.flatnonzero(in_use).tolist()}
        self._open_writers: set[bytes] = set()
        if self._journal[_ARMED]:
            self._carry_out()

    # ---- clients and writers -------------------------------------------------------------------------------

    def attached(self, token: bytes, process: Process) -> int:
        """See `Ledger.attached`."""
        if not self._free_clients:
            raise InvalidInput(f"{MAX_CLIENTS} clients are attached or quarantined, which is the limit")
        client = self._free_clients.pop()
        self._clients[client, _PROCESS] = process
        self._clients[client, _TOKEN] = np.frombuffer(token, np.int64)
        self._clients[client, _IN_USE] = 1
        return client

    def left(self, client: int) -> None:
        """See `Ledger.left`."""
        self._clients[client, _IN_USE] = 0
        self._free_clients.append(client)

    def writer_opened(self, writer_id: bytes, progress: WriterProgress) -> int:
        """See `Ledger.writer_opened`."""
        if not writer_id:  # it will not go on
            return -1
        if writer_id in self._open_writers:
            raise InvalidInput(f"writer {writer_id.hex()} is open in another session")
        writer = self._writer_numbers.get(writer_id)
        if writer is None:
            if not self._free_writers:
                raise InvalidInput(f"{MAX_WRITERS} writers are open or may come back, which is the limit")
            writer = self._free_writers.pop()
            self._writers[writer, _WRITER_ID] = np.frombuffer(writer_id, np.int64)
            self._set_progress(writer, progress)
            self._writers[writer, _IN_USE] = 1
            self._writer_numbers[writer_id] = writer
        self._open_writers.add(writer_id)
        return writer

    def writer_left(self, writer_id: bytes, *, comes_back: bool) -> None:
        """See `Ledger.writer_left`."""
        self._open_writers.discard(writer_id)
        if writer_id and not comes_back:
            writer = self._writer_numbers.pop(writer_id)
            self._writers[writer, _IN_USE] = 0
            self._free_writers.append(writer)

    # ---- rows ----------------------------------------------------------------------------------------------

    def reserved(self, table: str, rows: Rows, client: int) -> None:
        """See `Ledger.reserved`."""
        self.tables[table].claims[rows] = -client

    def released(self, table: str, rows: Rows) -> None:
        """See `Ledger.released`."""
        self.tables[table].claims[rows] = 0

    def begin(
        self,
        table: str,
        rows: Rows,
        *,
        td_errors: NDArray[np.float64] | None = None,
        number: int = 0,
        version: int = 0,
        writer: int = -1,
        progress: WriterProgress = NO_PROGRESS,
        episodes: Sequence[Episode] = (),
        stats: ServerStats | None = None,
        client: ClientRecord | None = None,
    ) -> None:
        """See `Ledger.begin`."""
        record = self.tables[table]
        if td_errors is not None:
            self._journal_td_errors[: len(rows)] = td_errors
        slot = -1
        if client is not None:
            assert stats is not None
            slot = client.slot
            self._write_episodes(episodes, stats.lifetime)
            self._write_client(client, len(episodes))
        published = record.counts[PUBLISHED] + len(rows)
        has_td_errors = td_errors is not None
        self._publish(record, rows, (published, number + 1, version, has_td_errors, slot, writer, *progress))

    def end(self) -> None:
        """See `Ledger.end`."""
        self._journal[_ARMED] = 0

    def cleared(self, table: str) -> None:
        """See `Ledger.cleared`."""
        record = self.tables[table]
        if len(record.readers):
            self._empty(record, np.flatnonzero((record.claims > 0) & (record.readers == 0)))
        else:
            record.counts[CLEARED] = record.counts[PUBLISHED]

    def sampled(self, table: str, num_samples: int) -> None:
        """See `Ledger.sampled`."""
        self.tables[table].counts[NUM_SAMPLES] = num_samples

    def limited(self, table: str, limiter: RateLimiter) -> None:
        """See `Ledger.limited`."""
        record = self.tables[table]
        place = 1 - record.counts[_LIMITER] % 2  # not the one in use
        record.limiters[place] = _limiter_words(limiter)
        reached("server.noted")
        record.counts[_LIMITER] = 2 - place

    def limiter(self, table: str) -> dict[str, Any] | None:
        """The rules that a table works by, as in `RateLimiter.state`; None: those of its configuration."""
        record = self.tables[table]
        if not record.counts[_LIMITER]:
            return None
        return _limiter_of(record.limiters[record.counts[_LIMITER] % 2])

    def leased(self, table: str, rows: Rows, client: int, num_samples: int) -> None:
        """See `Ledger.leased`."""
        self.tables[table].readers[rows] = client
        self.sampled(table, num_samples)

    def used(self, table: str, rows: Rows, uses: Rows) -> None:
        """See `Ledger.used`."""
        record = self.tables[table]
        record.uses[rows] = uses[rows]
        record.readers[rows] = 0

    def given_back(self, table: str, rows: Rows) -> None:
        """See `Ledger.given_back`."""
        self.tables[table].readers[rows] = 0

    def emptied(self, table: str, rows: Rows, num_dropped: int) -> None:
        """See `Ledger.emptied`."""
        record = self.tables[table]
        if len(rows):
            self._empty(record, rows)
        record.counts[NUM_DROPPED] = num_dropped

    def _empty(self, record: TableRecord, fragments: Rows) -> None:
        self._publish(record, fragments, (record.counts[PUBLISHED], 0, 0, False, -1, -1, *NO_PROGRESS))
        self.end()

    def _publish(self, record: TableRecord, rows: Rows, rest: tuple[int, ...]) -> None:
        self._journal_rows[: len(rows)] = rows
        self._journal[_TABLE:] = array("q", (record.number, len(rows), *rest))
        reached("server.noted")
        self._journal[_ARMED] = 1
        reached("server.armed")
        self._carry_out()
        reached("server.carried_out")

    def _carry_out(self) -> None:
        """Store what the journal says; once more does no harm."""
        _, number, num_rows, published, claim, version, _, slot, writer, *progress = self._journal.tolist()
        record, rows = self._by_number[number], self._journal_rows[:num_rows]
        if isinstance(record.config, RolloutTable):
            record.versions[rows] = version
            record.readers[rows] = 0
            record.claims[rows] = claim
        elif not claim:
            record.readers[rows] = 0
            record.claims[rows] = 0
        else:
            if len(record.uses):
                record.uses[rows] = 0
            record.claims[rows] = np.arange(published - num_rows + 1, published + 1)
        reached("server.half_carried_out")
        record.counts[PUBLISHED] = published
        if writer >= 0:
            self._set_progress(writer, progress)
        if slot >= 0:
            self._moments[:] = self._journal_moments
            self._client_moments[_moments_of(slot)] = self._journal_client_moments

    def _set_progress(self, writer: int, progress: Iterable[int]) -> None:
        start = writer * _PROGRESS_LENGTH
        self._progress[start : start + _PROGRESS_LENGTH] = array("q", progress)

    # ---- statistics ----------------------------------------------------------------------------------------

    def _write_episodes(self, episodes: Sequence[Episode], lifetime: Moments) -> None:
        """Write them behind the window, which stays as it is until the moments say where it ends."""
        episodes, end = episodes[-self._stats.window :], int(self._moments[_NEXT_EPISODE])
        for episode in episodes:
            metrics = [episode.metrics.get(key, math.nan) for key in self._stats.extra_metrics_keys]
            reasons = [key in episode.done_reasons for key in self._stats.done_reason_keys]
            self._episodes[end % len(self._episodes)] = [episode.reward, episode.length, *metrics, *reasons]
            end += 1
        moments = (lifetime.count, lifetime.mean, lifetime.m2, lifetime.minimum, lifetime.maximum, end)
        self._journal_moments[:] = array("d", moments)

    def _write_client(self, client: ClientRecord, num_new: int) -> None:
        """Likewise the last `num_new` episodes of a client."""
        lifetime, start = client.lifetime, _moments_of(client.slot).start
        if lifetime.count == num_new:  # a new one, whose slot may have been that of a name which is forgotten
            self._client_moments[start] = 0.0
            name = client.name.encode()
            words = np.frombuffer(name.ljust(-(-len(name) // 8) * 8, b"\0"), np.int64)
            self._client_names[client.slot, : 1 + len(words)] = [len(name), *words.tolist()]
            end = 0
        else:
            end = int(self._client_moments[start + _NEXT_EPISODE])
        ring = self._client_episodes[client.slot]
        for age in range(min(num_new, len(client.rewards)), 0, -1):
            ring[end % len(ring)] = [client.rewards[-age], client.lengths[-age]]
            end += 1
        numbers = (lifetime.count, lifetime.mean, lifetime.m2, lifetime.minimum, lifetime.maximum, end, client.last)
        self._journal_client_moments[:] = array("d", numbers)

    def _clients_statistics(self) -> list[dict[str, Any]]:
        """What `_write_client` wrote, as `ServerStats.state` has it."""
        records = []
        moments = np.reshape(self._client_moments, (-1, _NUM_CLIENT_MOMENTS))
        for slot in np.flatnonzero(moments[:, 0]).tolist():
            count, mean, m2, minimum, maximum, end, last = moments[slot].tolist()
            length, *words = self._client_names[slot].tolist()
            ring = self._client_episodes[slot]
            kept = ring[np.arange(end - min(count, len(ring) // 2), end, dtype=np.int64) % len(ring)]
            records.append(
                {
                    "slot": slot,
                    "name": array("q", words).tobytes()[:length].decode(),
                    "rewards": kept[:, 0].tolist(),
                    "lengths": kept[:, 1].astype(np.int64).tolist(),
                    "lifetime": dataclasses.asdict(Moments(int(count), mean, m2, minimum, maximum)),
                    "last": int(last),
                }
            )
        return records

    def statistics(self) -> dict[str, Any]:
        """The state of a `ServerStats` that recorded all of this."""
        count, mean, m2, minimum, maximum, end = self._moments.tolist()
        if not count:
            return StatsTracker().state()
        keys, reasons = self._stats.extra_metrics_keys, self._stats.done_reason_keys
        episodes = []
        for age in range(int(min(count, self._stats.window)), 0, -1):
            reward, length, *rest = self._episodes[int(end - age) % len(self._episodes)].tolist()
            given = {key: value for key, value in zip(keys, rest, strict=False) if not math.isnan(value)}
            held = frozenset(key for key, value in zip(reasons, rest[len(keys) :], strict=True) if value)
            episodes.append(Episode(int(count) - age, reward, int(length), given, held))
        lifetime = Moments(int(count), mean, m2, minimum, maximum)
        return {
            "episodes": msgspec.to_builtins(episodes),
            "lifetime": dataclasses.asdict(lifetime),
            "clients": self._clients_statistics(),
        }

    # ---- what an earlier server left ------------------------------------------------------------------------

    @property
    def incarnation(self) -> int:
        """How many servers had this ledger before."""
        incarnation: int = self._header[0]
        return incarnation

    def interrupted(self, table: str) -> tuple[Rows, NDArray[np.float64] | None] | None:
        """Rows and initial priorities of the commit to `table` that a kill interrupted, if there was one."""
        is_armed, number, num_rows, _, _, _, has_td_errors, *_ = self._journal.tolist()
        if not is_armed or number != self.tables[table].number:
            return None
        td_errors = np.array(self._journal_td_errors[:num_rows]) if has_td_errors else None
        return np.array(self._journal_rows[:num_rows]), td_errors

    def clients(self) -> dict[int, tuple[bytes, Process]]:
        """Token and process of each client that had not left, by number."""
        entries = {client: self._clients[client] for client in np.flatnonzero(self._clients[:, _IN_USE]).tolist()}
        return {c: (entry[_TOKEN].tobytes(), Process(*entry[_PROCESS].tolist())) for c, entry in entries.items()}

    def disown(self, clients: Sequence[int]) -> None:
        """Clients that had not left are gone: their rows are free, and what they read is finished."""
        for record in self.tables.values():
            record.claims[np.isin(record.claims, np.negative(clients))] = 0
            record.readers[np.isin(record.readers, clients)] = 0
        for client in clients:
            self.left(client)

    def writers(self) -> dict[bytes, WriterProgress]:
        """How much is published of what each writer sent that may go on, by writer_id."""
        progress = np.reshape(self._progress, (-1, _PROGRESS_LENGTH)).tolist()
        return {writer_id: WriterProgress(*progress[number]) for writer_id, number in self._writer_numbers.items()}

    def adopt(
        self,
        states: Mapping[str, TableState],
        stats: ServerStats,
        writers: Mapping[bytes, WriterProgress],
    ) -> None:
        """Write down, in a ledger where nothing is, tables that were filled in another way."""
        for name, state in states.items():
            record = self.tables[name]
            if isinstance(state, RolloutTableState):
                cut = state.freeze()
                state.copied(len(record.claims))  # nobody copies it
                for row, (number, version) in zip(np.concatenate(cut.rows), cut.values["fragments"], strict=True):
                    record.claims[row], record.versions[row] = number + 1, version
                counts = (state.num_commits, 0, state.num_handed_out, state.num_dropped, 0)
            else:
                published = state.limiter.num_inserts
                if isinstance(state, ConsumedTableState):
                    committed = np.concatenate(state.freeze().rows)
                    state.copied(len(committed))
                    record.uses[committed] = state.uses[committed]
                else:
                    committed = state.allocator.committed()
                record.claims[committed] = np.arange(published - len(committed), published) + 1
                counts = (published, published - len(committed), state.limiter.num_samples, 0, 0)
                if state.limiter.state()["limiter"] is not None:
                    self.limited(name, state.limiter)
                    counts = (*counts[:_LIMITER], record.counts[_LIMITER])
            record.counts[:] = array("q", counts)
        episodes = msgspec.convert(stats.state()["episodes"], list[Episode])
        if episodes:
            self._write_episodes(episodes, stats.lifetime)
            self._moments[:] = self._journal_moments
        for client in stats.clients.values():
            self._write_client(client, client.lifetime.count)
            self._client_moments[_moments_of(client.slot)] = self._journal_client_moments
        for writer_id, progress in writers.items():
            self.writer_opened(writer_id, progress)
            self.writer_left(writer_id, comes_back=True)

    def recovered(self) -> None:
        """All is as it was, an interrupted commit included: begin another incarnation."""
        self.end()
        self._header[0] += 1


def ledger_fields(tables: Tables, stats: StatsConfig) -> dict[str, Field]:
    """The arrays that a ledger of these tables needs, each of 8-byte items."""
    num_metrics = len(stats.extra_metrics_keys) + len(stats.done_reason_keys)
    most_rows = max(
        min(table.capacity, table.num_rows - table.capacity)
        if isinstance(table, ReplayTable) and not table.max_times_sampled
        else table.num_rows  # of which any may leave together
        for table in tables.values()
    )
    fields = {
        "header": Field((1,), "int64"),
        "journal": Field((_JOURNAL_LENGTH,), "int64"),
        "journal_rows": Field((most_rows,), "int64"),
        "journal_td_errors": Field((most_rows,), "float64"),
        "journal_moments": Field((_NUM_MOMENTS,), "float64"),
        "moments": Field((_NUM_MOMENTS,), "float64"),
        "episodes": Field((2 * stats.window, 2 + num_metrics), "float64"),
        "journal_client_moments": Field((_NUM_CLIENT_MOMENTS,), "float64"),
        "client_moments": Field((MAX_CLIENT_NAMES, _NUM_CLIENT_MOMENTS), "float64"),
        "client_names": Field((MAX_CLIENT_NAMES, _NAME_LENGTH), "int64"),
        "client_episodes": Field((MAX_CLIENT_NAMES, 2 * client_window(stats.window), 2), "float64"),
        "clients": Field((MAX_CLIENTS, _CLIENT_LENGTH), "int64"),
        "writers": Field((MAX_WRITERS, _WRITER_LENGTH), "int64"),
        "progress": Field((MAX_WRITERS, _PROGRESS_LENGTH), "int64"),
    }
    for name, table in tables.items():
        fields |= {
            f"{name}/counts": Field((_NUM_COUNTS,), "int64"),
            f"{name}/claims": Field((table.num_rows,), "int64"),
        }
        if isinstance(table, RolloutTable):
            fields |= {f"{name}/{part}": Field((table.num_rows,), "int64") for part in ("versions", "readers")}
        else:
            fields[f"{name}/limiters"] = Field((2, _LIMITER_LENGTH), "int64")
            if table.max_times_sampled:
                fields |= {f"{name}/{part}": Field((table.num_rows,), "int64") for part in ("readers", "uses")}
            if isinstance(table.sampler, Prioritized):
                fields[f"{name}/masses"] = Field((table.num_rows,), "float64")
    return fields


def ledger_nbytes(fields: Mapping[str, Field]) -> int:
    """Bytes of a ledger's memory."""
    return sum(_aligned(field.nbytes) for field in fields.values())


def ledger_arrays(fields: Mapping[str, Field], buffer: Any) -> dict[str, NDArray[Any]]:
    """The arrays in a buffer of `ledger_nbytes`, one behind the other."""
    arrays, offset = {}, 0
    for name, field in fields.items():
        arrays[name] = np.ndarray(field.shape, field.dtype, buffer, offset)
        offset += _aligned(field.nbytes)
    return arrays


def _limiter_words(limiter: RateLimiter) -> NDArray[np.int64]:
    """A limiter in words; floats by their bits."""
    config = limiter.config
    number, floats, is_pair = config.min_size_to_sample, (0.0, 0.0, 0.0), False
    if isinstance(config, SampleToInsertRatio):
        is_pair = isinstance(config.error_buffer, tuple)
        pair = config.error_buffer if isinstance(config.error_buffer, tuple) else (config.error_buffer, 0.0)
        floats = (config.samples_per_insert, *pair)
    elif not isinstance(config, MinSize):
        number = config.capacity
    words = np.empty(_LIMITER_LENGTH, np.int64)
    words[:3] = _LIMITER_KINDS.index(type(config)), number, is_pair
    words[3:6] = np.array(floats).view(np.int64)
    words[6:] = limiter.first_insert, limiter.first_sample
    return words


def _limiter_of(words: NDArray[np.int64]) -> dict[str, Any]:
    kind, number, is_pair, *_ = words.tolist()
    ratio, *error_buffer = np.array(words[3:6]).view(np.float64).tolist()
    values = {SampleToInsertRatio: (ratio, number, error_buffer if is_pair else error_buffer[0])}
    config = _LIMITER_KINDS[kind](*values.get(_LIMITER_KINDS[kind], (number,)))
    return {"config": msgspec.to_builtins(config), "first_insert": int(words[6]), "first_sample": int(words[7])}


def _moments_of(slot: int) -> slice:
    """Where the moments of a client are, in words."""
    return slice(slot * _NUM_CLIENT_MOMENTS, (slot + 1) * _NUM_CLIENT_MOMENTS)


def _words(array: NDArray[Any]) -> Words:
    """An array for stores one by one: 0.04 us each, in NumPy 0.1 us, and 1 us for a short slice."""
    words = memoryview(array).cast("B")  # type: ignore[arg-type]
    return words.cast("d") if array.dtype == np.float64 else words.cast("q")


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT_NBYTES) * _ALIGNMENT_NBYTES
