"""What goes on in the server, in plain values: the parts of `client.info()`."""

from collections.abc import Hashable, Iterable
from typing import Any

from rl_buffer.consumed_table import ConsumedTableState
from rl_buffer.diagnostics import Counts, RateWindow
from rl_buffer.replay_table import ReplayTableState
from rl_buffer.rollout_table import RolloutTableState
from rl_buffer.sessions import ReaderChannel, SamplerChannel, ServedTable, Session, WriterChannel
from rl_buffer.wait_facts import TableWaits


def counters(tables: Iterable[ServedTable], sessions: Iterable[Session]) -> dict[Hashable, Counts]:
    """What rates are taken of: of each table by name, and of each session by token."""
    counts: dict[Hashable, Counts] = {table.name: _table_counts(table) for table in tables}
    return counts | {session.token: (session.num_inserts, session.num_samples) for session in sessions}


def _table_counts(table: ServedTable) -> Counts:
    state = table.state
    if isinstance(state, RolloutTableState):
        return state.num_commits, state.num_handed_out, 0, 0, 0
    limiter = state.limiter
    updates = table.diagnostics.num_updates
    return limiter.num_inserts, limiter.num_samples, updates, state.num_stale_updates, table.num_overtaken


def describe_table(table: ServedTable, waits: TableWaits, rates: RateWindow, now_s: float) -> dict[str, Any]:
    """Contents, counters, rates, drawn items and priorities, who waits, and why nobody can move if that is so."""
    counts = _table_counts(table)
    elapsed_s, (inserts, samples, updates, stale, overtaken) = rates.changes(table.name, counts, now_s)
    described = {
        "inserts_per_s": inserts / elapsed_s,
        "samples_per_s": samples / elapsed_s,
        "samples_per_insert": _share(counts[1], counts[0]),
        "samples_per_insert_now": _share(samples, inserts),
        "waits": waits.sentences,
        "stuck": waits.stuck,
    }
    if isinstance(table.state, RolloutTableState):
        items = table.diagnostics.describe([], None, now_s)
        return _describe_rollouts(table.state) | described | items
    described |= {"stale_update_share": _share(stale, updates), "overtaken_share": _share(overtaken, samples)}
    items = table.diagnostics.describe(*table.state.contents(), now_s)
    return _describe_replay(table, table.state) | described | items


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _describe_replay(table: ServedTable, state: ReplayTableState | ConsumedTableState) -> dict[str, Any]:
    described = {
        "size": len(state),
        "capacity": state.config.capacity,
        "inserts": state.limiter.num_inserts,
        "samples": state.limiter.num_samples,
        "deletes": state.limiter.num_deletes,
        "reserved_rows": state.num_reserved,
        "updates": table.diagnostics.num_updates,
        "stale_updates": state.num_stale_updates,
        "overtaken_rows": table.num_overtaken,
        "limiter": state.limiter.describe(),
    }
    if isinstance(state, ConsumedTableState):
        described["reading"] = state.num_reading
    return described


def _describe_rollouts(state: RolloutTableState) -> dict[str, Any]:
    return {
        "size": len(state),
        "capacity": state.config.num_fragments,
        "inserts": state.num_commits,
        "samples": state.num_handed_out,
        "deletes": state.num_dropped,
        "reserved_rows": state.num_writing,
        "reading": state.num_reading,
    }


def describe_session(session: Session, rates: RateWindow, now_s: float) -> dict[str, Any]:
    """One client and the sums over its writers and samplers; counts include those that it has closed."""
    counts = (session.num_inserts, session.num_samples)
    elapsed_s, (inserts, samples) = rates.changes(session.token, counts, now_s, session.attached_at_s)
    writers = [c for c in session.channels.values() if isinstance(c, WriterChannel)]
    readers = [c for c in session.channels.values() if isinstance(c, ReaderChannel)]
    samplers = [c for c in session.channels.values() if isinstance(c, SamplerChannel)]
    return {
        "name": session.name,
        "pid": session.pid,
        "connected": session.connected,
        "attached_s": now_s - session.attached_at_s,
        "last_message_s": now_s - session.last_message_s,
        "writers": len(writers),
        "samplers": len(samplers) + len(readers),
        "reserved_rows": sum(len(writer.rows) for writer in writers),
        "reading": sum(len(reader.rows) for reader in readers),
        "inserts": session.num_inserts,
        "samples": session.num_samples,
        "inserts_per_s": inserts / elapsed_s,
        "samples_per_s": samples / elapsed_s,
        "parameter_version": max((writer.parameter_version for writer in writers), default=0),
    }
