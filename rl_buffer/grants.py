"""Who may go on with a table: commits become items, writers get rows, samplers batches and readers fragments.

All queues are first come, first served. What is decided here is written in the ledger before it is done and before
anybody is told.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from rl_buffer.allocator import Rows
from rl_buffer.consumed_table import ConsumedTableState
from rl_buffer.failpoints import reached
from rl_buffer.frames import Batch, Grant
from rl_buffer.ledger import Ledger
from rl_buffer.parameter_slots import ParameterSlots
from rl_buffer.rate_limiters import RateLimiter
from rl_buffer.replay_table import ReplayTableState
from rl_buffer.rollout_table import RolloutTableState
from rl_buffer.server_stats import ServerStats
from rl_buffer.sessions import NO_ROWS, PendingCommit, SamplerChannel, ServedTable, WriterChannel
from rl_buffer.table_states import TableState
from rl_buffer.tables import Sample

MOST_DRAWS = 1 << 12  # in one message of several batches: 100 KB
_POLICY = "policy"  # the parameters whose version replay writers report

Outgoing: TypeAlias = list[tuple[bytes, bytes]]  # (channel id, frame)


class Grants:
    """Of all tables of one server epoch.

    Attributes:
        now_s: seconds of a monotonic clock, set by whoever calls.
    """

    def __init__(
        self,
        epoch: int,
        ledger: Ledger,
        stats: ServerStats,
        parameters: Mapping[str, ParameterSlots],
        drop: Callable[[WriterChannel], None],
    ) -> None:
        """`drop` takes away a writer that was closed while commits of it waited, when they are published."""
        self.now_s = 0.0
        self._epoch = epoch
        self._ledger = ledger
        self._stats = stats
        self._parameters = parameters
        self._drop = drop

    def advance(self, table: ServedTable) -> Outgoing:
        """Let everybody go on who can: commits, then batches, until nothing moves, then reservations."""
        outgoing: Outgoing = []
        grant = self._grant_batch
        if table.leasing is not None:
            grant = self._grant_fragments if isinstance(table.state, RolloutTableState) else self._grant_items
        while self._publish_pending(table, outgoing) or grant(table, outgoing):
            pass
        self.grant_rows(table, outgoing)
        return outgoing

    def _publish_pending(self, table: ServedTable, outgoing: Outgoing) -> bool:
        moved = False
        while table.pending:
            pending = table.pending[0]
            num_left = pending.commit.num_rows - pending.num_published
            num_passing = table.state.num_insertable(num_left)
            if num_passing or not num_left:  # episodes may come without rows
                self._publish(pending, num_passing)
                moved = num_passing > 0 or moved
            if num_passing < num_left:
                break
            table.pending.popleft()
            self._acknowledge(pending, outgoing)
        return moved

    def _publish(self, pending: PendingCommit, num_rows: int) -> None:
        """Publish the next rows of a commit; with the last of them it is committed, and its episodes count."""
        writer, commit = pending.writer, pending.commit
        rows, writer.rows = writer.rows[:num_rows], writer.rows[num_rows:]
        first, pending.num_published = pending.num_published, pending.num_published + num_rows
        td_errors = None if commit.td_errors is None else commit.td_errors[first : pending.num_published]
        writer.num_rows_pending -= num_rows
        writer.num_published += num_rows
        writer.session.num_inserts += num_rows
        episodes, client = [], None
        if pending.num_published == commit.num_rows:
            writer.sequence_committed, writer.num_published = commit.sequence, 0
            # Not before: what is not published whole counts nothing, because its writer may have to send it again.
            if episodes := commit.episodes:
                client = self._stats.record_of(writer.session.name, episodes)
        state, version = writer.table.state, commit.parameter_version
        number = state.number_of(int(rows[0])) if isinstance(state, RolloutTableState) and num_rows else 0
        if isinstance(state, ConsumedTableState):
            self._ledger.emptied(writer.table.name, state.evict_for(num_rows), 0)
        self._ledger.begin(
            writer.table.name,
            rows,
            td_errors=td_errors,
            number=number,
            version=version,
            writer=writer.number,
            progress=writer.progress,
            episodes=episodes,
            stats=self._stats,
            client=client,
        )
        if isinstance(state, RolloutTableState):
            state.commit(rows, version)
        else:
            state.commit(rows, td_errors)
        self._ledger.end()
        writer.table.last_insert_s = self.now_s
        watch = writer.table.diagnostics.watch
        if self.now_s >= watch.next_commit_s:
            watch.committed(rows, state.generations[rows], _num_inserts(state), self.now_s, version)

    def _acknowledge(self, pending: PendingCommit, outgoing: Outgoing) -> None:
        writer, commit = pending.writer, pending.commit
        reached("server.acknowledging")
        if writer.closing:
            if not writer.has_pending:
                self._drop(writer)
            return
        self.want(writer, commit.num_wanted)
        granted = NO_ROWS
        # With rows behind it if it is their turn, so that the common case is one message.
        if (grant := writer.table.next_grant()) and grant[0] is writer:
            granted = self._take_rows(*grant)
        self._grant(writer, granted, outgoing)

    def want(self, writer: WriterChannel, num_rows: int) -> None:
        """A writer asks for more rows; it gets them from `grant_rows`."""
        if num_rows and not writer.num_wanted:
            writer.table.wanting.append(writer)
            writer.waiting_since_s = self.now_s
        writer.num_wanted += num_rows

    def _take_rows(self, writer: WriterChannel, num_rows: int) -> Rows:
        """Let the writer whose turn it is hold rows; if it wants more, it waits behind the others."""
        rows = writer.table.state.reserve(num_rows)
        self._ledger.reserved(writer.table.name, rows, writer.session.client)
        writer.rows = np.concatenate((writer.rows, rows))
        writer.num_wanted -= num_rows
        writer.table.wanting.remove(writer)
        if writer.num_wanted:
            writer.table.wanting.append(writer)
            writer.waiting_since_s = self.now_s
        reached("server.granted")
        return rows

    def grant_rows(self, table: ServedTable, outgoing: Outgoing) -> None:
        """Let those hold rows whose turn it is, as long as there are some."""
        while grant := table.next_grant():
            writer, rows = grant[0], self._take_rows(*grant)
            self._grant(writer, rows, outgoing)

    def _grant(self, writer: WriterChannel, rows: Rows, outgoing: Outgoing) -> None:
        writer.num_grants += 1
        grant = Grant(self._epoch, writer.num_grants, writer.sequence_committed, rows)
        outgoing.append((writer.channel_id, grant.encode()))

    def _grant_batch(self, table: ServedTable, outgoing: Outgoing) -> bool:
        state = table.state
        assert isinstance(state, ReplayTableState)
        # Nobody overtakes it, even with a smaller batch: one who took every sample at once would starve it.
        sampler = next((sampler for sampler in table.samplers if sampler.num_credits), None)
        if sampler is None or not len(state) or not state.limiter.can_sample(sampler.batch_size):
            return False
        num_batches = _num_batches(table, sampler, state.limiter)
        sample = state.draw(sampler.batch_size, sampler.num_spares, num_batches)
        self._ledger.sampled(table.name, state.limiter.num_samples)
        reached("server.drawn")
        self._granted(table, sampler, sample, outgoing, num_batches)
        return True

    def _grant_items(self, table: ServedTable, outgoing: Outgoing) -> bool:
        """As `_grant_batch`, of items that are this sampler's alone until it has copied them."""
        state = table.state
        assert isinstance(state, ConsumedTableState)
        sampler = next((sampler for sampler in table.samplers if sampler.num_credits), None)
        if sampler is None or not state.can_lease(sampler.batch_size):
            return False
        sample = state.lease(sampler.batch_size)
        self._ledger.leased(table.name, sample.rows, sampler.session.client, state.num_finished_samples)
        sampler.rows.update(sample.rows.tolist())
        reached("server.leased")
        self._granted(table, sampler, sample, outgoing)
        return True

    def _granted(
        self, table: ServedTable, sampler: SamplerChannel, sample: Sample, outgoing: Outgoing, num_batches: int = 1
    ) -> None:
        batch_size = sampler.batch_size
        rows, generations = (
            array.reshape(num_batches, -1)[:, :batch_size].ravel() for array in (sample.rows, sample.generations)
        )
        newest_version, num_inserts = self._version(_POLICY), table.replay.limiter.num_inserts
        table.diagnostics.watch.drawn(rows, generations, num_inserts, self.now_s, newest_version)
        sampler.num_credits -= num_batches
        sampler.session.num_samples += num_batches * batch_size
        sampler.waiting_since_s = table.last_sample_s = self.now_s
        table.samplers.remove(sampler)
        table.samplers.append(sampler)
        outgoing.append((sampler.channel_id, Batch(self._epoch, batch_size, sample, num_batches).encode()))

    def _grant_fragments(self, table: ServedTable, outgoing: Outgoing) -> bool:
        reader = next((reader for reader in table.readers if reader.num_credits), None)
        if reader is None:
            return False
        newest_version = self._version(table.rollouts.config.parameters)
        rollouts = table.rollouts
        lease = rollouts.lease(reader.num_credits, newest_version)
        if len(lease.dropped):
            self._ledger.emptied(table.name, lease.dropped, rollouts.num_dropped)
        if not lease.fragments:
            return False
        rows = np.array([fragment.row for fragment in lease.fragments])
        self._ledger.leased(table.name, rows, reader.session.client, rollouts.num_handed_out)
        reader.rows.update(rows.tolist())
        reached("server.leased")
        reader.num_credits -= len(rows)
        reader.session.num_samples += len(rows)
        reader.waiting_since_s = table.last_sample_s = self.now_s
        table.readers.remove(reader)
        table.readers.append(reader)
        sample = Sample(rows, rollouts.generations[rows], np.zeros(len(rows)), 0.0, len(rollouts))
        table.diagnostics.watch.drawn(rows, sample.generations, rollouts.num_commits, self.now_s, newest_version)
        outgoing.append((reader.channel_id, Batch(self._epoch, len(rows), sample).encode()))
        return True

    def _version(self, parameters: str) -> int:
        slots = self._parameters.get(parameters)
        return 0 if slots is None else slots.version


def _num_batches(table: ServedTable, sampler: SamplerChannel, limiter: RateLimiter) -> int:
    """How many batches can be drawn at once: as many as would be drawn one after the other, with nothing between."""
    if table.pending or sum(other.num_credits > 0 for other in table.samplers) > 1:
        return 1
    most = min(sampler.num_credits, MOST_DRAWS // (sampler.batch_size + sampler.num_spares))
    num_batches = 1
    while num_batches < most and limiter.can_sample((num_batches + 1) * sampler.batch_size):
        num_batches += 1
    return num_batches


def _num_inserts(state: TableState) -> int:
    return state.num_commits if isinstance(state, RolloutTableState) else state.limiter.num_inserts
