"""What goes on in the server, in plain values: the parts of `client.info()`."""

from typing import Any

from rl_buffer.rollout_table import RolloutTableState
from rl_buffer.sessions import ReaderChannel, SamplerChannel, ServedTable, Session, WriterChannel


def describe_table(table: ServedTable) -> dict[str, Any]:
    """Contents, counters, and a sentence for whoever is first in each queue."""
    if isinstance(table.state, RolloutTableState):
        return _describe_rollouts(table, table.state)
    state = table.state
    waiting = [sampler for sampler in table.samplers if sampler.num_credits]
    waits = []
    if table.pending:
        pending = table.pending[0]
        num_left = pending.commit.num_rows - pending.num_published
        waits.append(f"{pending.writer.session.name}: {state.limiter.explain_insert(num_left)}")
    lacking = next((writer for writer in table.wanting if writer.num_lacking), None)
    if lacking is not None:
        waits.append(
            f"{lacking.session.name}: waits for rows, {state.allocator.num_reserved} of "
            f"{state.allocator.headroom} are reserved by writers{_held(state.num_held)}"
        )
    if waiting:
        waits.append(f"{waiting[0].session.name}: {state.limiter.explain_sample(waiting[0].batch_size)}")
    return {
        "size": len(state),
        "capacity": state.config.capacity,
        "inserts": state.limiter.num_inserts,
        "samples": state.limiter.num_samples,
        "deletes": state.limiter.num_deletes,
        "reserved_rows": state.allocator.num_reserved,
        "stale_updates": state.num_stale_updates,
        "overtaken_rows": table.num_overtaken,
        "waits": waits,
    }


def _describe_rollouts(table: ServedTable, state: RolloutTableState) -> dict[str, Any]:
    waits = []
    if table.wanting:
        waits.append(
            f"{table.wanting[0].session.name}: waits for a fragment, {state.num_writing} are being written, "
            f"{len(state)} are finished and {state.num_reading} are being read, of {state.config.num_fragments}"
            f"{_held(state.num_held)}"
        )
    waits += [
        f"{reader.session.name}: waits for {reader.num_credits} fragments, {state.num_writing} are being written"
        for reader in table.readers
        if reader.num_credits
    ]
    return {
        "size": len(state),
        "capacity": state.config.num_fragments,
        "inserts": state.num_commits,
        "samples": state.num_handed_out,
        "deletes": state.num_dropped,
        "reserved_rows": state.num_writing,
        "reading": state.num_reading,
        "waits": waits,
    }


def _held(num_held: int) -> str:
    return f", and {num_held} must be copied to a checkpoint first" if num_held else ""


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
