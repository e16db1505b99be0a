"""What goes on in the server, in plain values: the parts of `client.info()`."""

from typing import Any

from rl_buffer.rollout_table import RolloutTableState
from rl_buffer.sessions import ReaderChannel, SamplerChannel, ServedTable, Session, WriterChannel
from rl_buffer.wait_facts import TableWaits


def describe_table(table: ServedTable, waits: TableWaits) -> dict[str, Any]:
    """Contents, counters, a sentence for whoever is first in each queue, and why nobody can move if that is so."""
    waiting = {"waits": waits.sentences, "stuck": waits.stuck}
    if isinstance(table.state, RolloutTableState):
        return _describe_rollouts(table.state) | waiting
    state = table.state
    return {
        "size": len(state),
        "capacity": state.config.capacity,
        "inserts": state.limiter.num_inserts,
        "samples": state.limiter.num_samples,
        "deletes": state.limiter.num_deletes,
        "reserved_rows": state.allocator.num_reserved,
        "stale_updates": state.num_stale_updates,
        "overtaken_rows": table.num_overtaken,
        "limiter": state.limiter.describe(),
    } | waiting


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


def describe_session(session: Session, now_s: float) -> dict[str, Any]:
    """One client and the sums over its writers and samplers."""
    writers = [c for c in session.channels.values() if isinstance(c, WriterChannel)]
    samplers = [c for c in session.channels.values() if isinstance(c, SamplerChannel | ReaderChannel)]
    return {
        "name": session.name,
        "pid": session.pid,
        "connected": session.connected,
        "attached_s": now_s - session.attached_at_s,
        "writers": len(writers),
        "samplers": len(samplers),
        "reserved_rows": sum(len(writer.rows) for writer in writers),
        "inserts": sum(writer.num_inserts for writer in writers),
        "samples": sum(sampler.num_samples for sampler in samplers),
        "parameter_version": max((writer.parameter_version for writer in writers), default=0),
    }
