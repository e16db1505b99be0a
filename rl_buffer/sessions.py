"""Who is attached to the server, what each holds, and who waits where. Plain state; `server_core` changes it."""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from rl_buffer.allocator import Rows
from rl_buffer.consumed_table import ConsumedTableState
from rl_buffer.diagnostics import TableDiagnostics
from rl_buffer.errors import InvalidInput
from rl_buffer.frames import Commit
from rl_buffer.replay_table import ReplayTableState
from rl_buffer.rollout_table import RolloutTableState
from rl_buffer.table_states import TableState

NO_ROWS = np.empty(0, np.int64)


class WriterProgress(NamedTuple):
    """How much of what a writer sent is published."""

    sequence: int  # commits up to this one, whole
    num_published: int  # rows of the next one, as it was first sent


@dataclass(slots=True, eq=False)
class Session:
    """One attached client process."""

    token: bytes
    name: str
    pid: int
    attached_at_s: float
    connected: bool = True
    client: int = 0  # its number in the ledger
    is_guest: bool = False  # runs as another user than the server
    last_message_s: float = field(init=False)  # when it sent the last one, or attached
    num_inserts: int = 0  # of all its writers, closed ones too
    num_samples: int = 0  # likewise
    channels: "dict[bytes, WriterChannel | SamplerChannel | ReaderChannel]" = field(default_factory=dict)
    last_action_s: float = field(init=False)  # its last commit or credit; at first when it attached

    def __post_init__(self) -> None:
        self.last_action_s = self.last_message_s = self.attached_at_s


@dataclass(slots=True, eq=False)
class WriterChannel:
    """A writer: the rows that it holds, oldest first, and the commits that wait among them."""

    channel_id: bytes
    session: Session
    table: "ServedTable"
    max_commit_rows: int
    writer_id: bytes = b""
    rows: Rows = field(default_factory=lambda: NO_ROWS)
    num_rows_pending: int = 0  # of `rows`, the first this many belong to commits that wait for the limiter
    num_wanted: int = 0  # rows that it will get as soon as there are some
    sequence_received: int = 0
    sequence_committed: int = 0
    num_published: int = 0  # rows of the commit after it; also those that an earlier channel of this writer published
    num_grants: int = 0
    parameter_version: int = 0
    closing: bool = False
    number: int = -1  # in the ledger
    waiting_since_s: float = 0.0  # while num_wanted > 0: since it asked, or last got some

    @property
    def has_pending(self) -> bool:
        """Whether one of its commits waits for the limiter."""
        return self.sequence_committed < self.sequence_received

    @property
    def progress(self) -> WriterProgress:
        """Where it would go on with another channel."""
        return WriterProgress(self.sequence_committed, self.num_published)

    @property
    def num_unsent(self) -> int:
        """Rows that it holds and has not committed."""
        return len(self.rows) - self.num_rows_pending

    @property
    def num_lacking(self) -> int:
        """Rows without which it cannot make its next commit, if that is a full one."""
        return max(0, self.max_commit_rows - self.num_unsent)


@dataclass(slots=True, eq=False)
class SamplerChannel:
    """A sampler: leave to send it `num_credits` batches."""

    channel_id: bytes
    session: Session
    table: "ServedTable"
    batch_size: int
    num_credits: int = 0
    rows: set[int] = field(default_factory=set)  # that it reads, where items leave with their last use
    waiting_since_s: float = 0.0  # while num_credits > 0: since its last credit or batch

    @property
    def num_spares(self) -> int:
        """Extra draws per batch, for rows that are overwritten between grant and gather."""
        return 4 + self.batch_size // 16


@dataclass(slots=True, eq=False)
class ReaderChannel:
    """A reader of rollouts: leave to send it `num_credits` more fragments, and those that it holds."""

    channel_id: bytes
    session: Session
    table: "ServedTable"
    num_credits: int = 0
    rows: set[int] = field(default_factory=set)
    waiting_since_s: float = 0.0  # while num_credits > 0: since its last credit or fragment


@dataclass(slots=True, eq=False)
class PendingCommit:
    """A commit that the limiter lets pass only in part, or not yet."""

    writer: WriterChannel
    commit: Commit
    since_s: float = 0.0
    num_published: int = 0


class ServedTable:
    """A table with those who wait for it. All queues are first come, first served."""

    def __init__(self, name: str, state: TableState) -> None:
        self.name = name
        self.state = state
        self.pending: deque[PendingCommit] = deque()  # commits that the limiter holds back
        self.wanting: deque[WriterChannel] = deque()  # writers with num_wanted > 0
        self.samplers: deque[SamplerChannel] = deque()  # the one whose last batch is longest ago comes first
        self.readers: deque[ReaderChannel] = deque()  # likewise
        self.num_overtaken = 0
        self.last_insert_s: float | None = None
        self.last_sample_s: float | None = None
        self.diagnostics = TableDiagnostics(state.config.num_rows)

    def next_grant(self) -> "tuple[WriterChannel, int] | None":
        """Who gets rows now, and how many; None while there are too few.

        First come, first served among those that lack rows for a full commit, and after them among the others. A
        grant is what a writer lacks or, if nobody else waits, all that it wants; so each is enough to go on, and a
        stopped writer keeps nobody waiting while a chunk is free. Who holds a part may overtake one for whom there is
        not enough: or all could hold parts, and wait for each other.
        """
        if not self.wanting:
            return None
        num_free = self.state.num_reservable
        lacking = [writer for writer in self.wanting if writer.num_lacking]
        if not lacking or len(self.wanting) == 1:
            first = self.wanting[0]
            if first.num_wanted <= num_free:
                return first, first.num_wanted
        for writer in (*lacking[:1], *(writer for writer in lacking if writer.num_unsent)):
            num_rows = min(writer.num_lacking, writer.num_wanted)
            if num_rows <= num_free:
                return writer, num_rows
        return None

    @property
    def leasing(self) -> ConsumedTableState | RolloutTableState | None:
        """The state of a table whose items are read under a lease, if this is one."""
        return self.state if isinstance(self.state, ConsumedTableState | RolloutTableState) else None

    @property
    def replay(self) -> ReplayTableState | ConsumedTableState:
        """The state of a replay table.

        Raises:
            InvalidInput: this one holds rollouts.
        """
        if isinstance(self.state, RolloutTableState):
            raise InvalidInput(f"table {self.name!r} holds rollouts; use client.rollout_writer and client.rollouts")
        return self.state

    @property
    def rollouts(self) -> RolloutTableState:
        """The state of a rollout table.

        Raises:
            InvalidInput: this one holds transitions.
        """
        if not isinstance(self.state, RolloutTableState):
            raise InvalidInput(f"table {self.name!r} holds transitions; use client.writer and client.sampler")
        return self.state
