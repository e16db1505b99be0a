"""From what a killed server wrote down to the state of its successor; the rules are in `ledger`.

A new directory is one where nothing was written down, so that there is one way to start. A kill in the midst of a
recovery does not matter: it changes nothing but what the next one would change alike.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rl_buffer.consumed_table import ConsumedTableState
from rl_buffer.errors import RLBufferError
from rl_buffer.failpoints import reached
from rl_buffer.mapped_ledger import CLEARED, NUM_DROPPED, NUM_SAMPLES, PUBLISHED, MappedLedger, TableRecord
from rl_buffer.replay_table import ReplayTableState
from rl_buffer.rollout_table import Fragment, RolloutTableState
from rl_buffer.server_core import ServerCore
from rl_buffer.sessions import ReaderChannel, Session, WriterChannel
from rl_buffer.table_states import TableState
from rl_buffer.tables import ReplayTable, RolloutTable

Rows = NDArray[np.int64]
_LAST_CHANNEL = 2**32 - 1


def resumed_table(ledger: MappedLedger, name: str, generations: Rows) -> TableState:
    """The table as it was, with `generations` ([num_rows], shared with clients) as they were left.

    Raises:
        RLBufferError: what was written down contradicts itself.
    """
    record = ledger.tables[name]
    if isinstance(record.config, RolloutTable):
        return _resumed_rollouts(record, record.config, generations)
    try:
        if record.config.max_times_sampled:
            return _resumed_items(ledger, name, record, record.config, generations)
        return _resumed_replay(ledger, name, record, record.config, generations)
    except ValueError as error:
        raise _damaged(name, str(error)) from error


def _resumed_replay(
    ledger: MappedLedger, name: str, record: TableRecord, config: ReplayTable, generations: Rows
) -> ReplayTableState:
    published, num_samples = record.counts[PUBLISHED], record.counts[NUM_SAMPLES]
    evicted = max(published - config.capacity, record.counts[CLEARED])  # the first so many of all commits are gone
    committed = _in_order(record.claims, evicted, published)
    is_committed = np.zeros(config.num_rows, np.bool_)
    is_committed[committed] = True
    held = _held(record.claims)
    free = np.flatnonzero((record.claims >= 0) & ~is_committed)
    free = free[np.argsort(record.claims[free], kind="stable")]  # the longest free first
    interrupted = ledger.interrupted(name)
    masses = None
    if len(record.masses):
        masses = record.masses
        masses[~is_committed] = 0.0
        if interrupted is not None:
            masses[interrupted[0]] = 1.0  # any: see below
    state = ReplayTableState(config, generations, masses)
    arrays = {
        "free": np.concatenate((held, free)),
        "committed": committed,
        "generations": _with_parity(generations, is_committed),
        "sampler": committed if masses is None else masses.copy(),
    }
    counts = {"num_inserts": published, "num_samples": num_samples, "num_deletes": published - len(committed)}
    seed = (config.seed, ledger.incarnation) if config.seed is not None and ledger.incarnation else config.seed
    rng = np.random.default_rng(seed).bit_generator.state
    limiter = ledger.limiter(name)
    state.restore(arrays, {"counts": counts, "limiter": limiter, "num_stale_updates": 0, "rng": rng})
    if interrupted is not None:
        state.commit_priorities_again(*interrupted)
    state.reserve(len(held))  # the first free ones
    return state


def _resumed_items(
    ledger: MappedLedger, name: str, record: TableRecord, config: ReplayTable, generations: Rows
) -> ConsumedTableState:
    published, items = record.counts[PUBLISHED], np.flatnonzero(record.claims > 0)
    items = items[np.argsort(record.claims[items], kind="stable")]
    if len(items) and (record.claims[items[-1]] > published or not np.diff(record.claims[items]).all()):
        raise ValueError(f"{len(items)} rows claim to be different ones of {published} commits")
    is_item = record.claims > 0
    generations[:] = _with_parity(generations, is_item)
    reading = items[record.readers[items] > 0]
    masses = None
    if len(record.masses):
        masses = record.masses
        masses[~is_item] = 0.0
        masses[reading] = 0.0
        if not np.isfinite(masses).all() or masses.min() < 0:
            raise ValueError("a priority is not a finite number >= 0")
    known = None if masses is None else masses.copy()
    state = ConsumedTableState(config, generations, masses)
    limiter = {"counts": {"num_inserts": published, "num_samples": record.counts[NUM_SAMPLES]}}
    limiter["counts"]["num_deletes"] = published - len(items)
    values = limiter | {"limiter": ledger.limiter(name)}
    state.resume(items, record.uses[items], reading, _held(record.claims), values)
    interrupted = ledger.interrupted(name)
    if known is not None and interrupted is not None:
        known[interrupted[0]] = 0.0
    state.set_masses(known)
    if interrupted is not None and is_item[interrupted[0]].all():
        state.commit_priorities_again(*interrupted)
    return state


def _resumed_rollouts(record: TableRecord, config: RolloutTable, generations: Rows) -> RolloutTableState:
    is_finished = record.claims > 0
    generations[:] = _with_parity(generations, is_finished)
    fragments = {
        row: Fragment(row, int(record.claims[row]) - 1, int(record.versions[row]))
        for row in np.flatnonzero(is_finished).tolist()
    }
    state = RolloutTableState(config, generations)
    state.resume(
        finished=[fragment for row, fragment in fragments.items() if not record.readers[row]],
        reading=[fragment for row, fragment in fragments.items() if record.readers[row]],
        abandoned=_held(record.claims),
        num_commits=record.counts[PUBLISHED],
        num_handed_out=record.counts[NUM_SAMPLES],
        num_dropped=record.counts[NUM_DROPPED],
    )
    return state


def _in_order(claims: Rows, evicted: int, published: int) -> Rows:
    """The rows of the commits `evicted` + 1 .. `published`, in order."""
    rows = np.flatnonzero(claims > evicted)
    if len(rows) != published - evicted or claims.max() > published:
        raise ValueError(f"{len(rows)} rows claim the {published - evicted} last of {published} commits")
    order = np.full(len(rows), -1)
    order[claims[rows] - evicted - 1] = rows
    if (order < 0).any():
        raise ValueError(f"two rows claim one of {published} commits")
    return order


def _held(claims: Rows) -> Rows:
    """Reserved rows."""
    return np.flatnonzero(claims < 0)


def _with_parity(generations: Rows, is_committed: NDArray[np.bool_]) -> Rows:
    """Generations that are odd where `is_committed`, and no smaller than they were."""
    raised: Rows = generations + ((generations % 2 == 1) != is_committed)
    return raised


def _damaged(name: str, contradiction: str) -> RLBufferError:
    return RLBufferError(
        f"what the last server wrote down of table {name!r} contradicts itself: {contradiction}; "
        "was a file of the directory changed? Delete the directory to start empty"
    )


class Survivor(NamedTuple):
    """A client of an earlier server that may still write into the rows that it held, and read fragments."""

    client: int  # its number in the ledger
    token: bytes
    pid: int  # 0: it is in another PID namespace
    pidfd: int | None  # None: it cannot be watched; what it held is free when it attaches again, and not before


def resume(core: ServerCore, ledger: MappedLedger, survivors: Iterable[Survivor], now_s: float) -> None:
    """Give a core, with the tables of this ledger, its statistics and writers, and begin another incarnation.

    Survivors have sessions again, as those have that closed their connections: each keeps what it held until
    `ServerCore.exited` or `attached_again`.
    """
    core.stats.restore(ledger.statistics())
    core.know_writers(ledger.writers())
    records = [ledger.tables[name] for name in core.tables]
    held = [_by_client(np.minimum(record.claims, 0)) for record in records]
    read = [_by_client(np.where(record.claims[: len(record.readers)] > 0, -record.readers, 0)) for record in records]
    for client, token, pid, _ in survivors:
        session = Session(token, f"pid {pid or 'unknown'} of an earlier server", pid, now_s, False, client)
        for index, table in enumerate(core.tables.values()):
            if client in held[index]:
                channel_id, rows = _channel_id(token, 2 * index), held[index][client]
                session.channels[channel_id] = WriterChannel(channel_id, session, table, 0, rows=rows, closing=True)
            if client in read[index]:
                channel_id, rows = _channel_id(token, 2 * index + 1), read[index][client]
                reader = ReaderChannel(channel_id, session, table, rows=set(rows.tolist()))
                session.channels[channel_id] = reader
                table.readers.append(reader)
        if session.channels:
            core.sessions[token] = session
        else:
            ledger.left(client)
    reached("server.recovering")
    ledger.recovered()


def _by_client(claims: Rows) -> dict[int, Rows]:
    """The rows of each client c, where `claims` has -c."""
    rows = np.flatnonzero(claims)
    return {client: rows[claims[rows] == -client] for client in np.unique(-claims[rows]).tolist()}


def _channel_id(token: bytes, number: int) -> bytes:
    # From the end: clients count from the start.
    return token + (_LAST_CHANNEL - number).to_bytes(4, "little")
