"""The checkpoint that a client waits for, as the server's core sees it: whom to answer, and what it costs the others.

asked --take_cut--> copied, piece by piece --thaw--> answered, when the file is on the disk
    +------------------it cannot be written------------^
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rl_buffer.sessions import ServedTable
from rl_buffer.tables import CheckpointReport


@dataclass(slots=True, eq=False)
class CheckpointRequest:
    """One request. There is one at a time."""

    channel_id: bytes
    request_id: int
    client: str  # its name
    path: str
    asked_s: float
    pause_s: float = 0.0  # of this, the server did nothing else
    num_items: dict[str, int] = field(default_factory=dict)  # of each table
    _waited_s: float = 0.0
    _waiting_since_s: float | None = None

    def look(self, tables: Iterable[ServedTable], now_s: float) -> None:
        """Note whether a writer waits while rows are held; to be called whenever that may have changed."""
        if self._waiting_since_s is not None:
            self._waited_s += now_s - self._waiting_since_s
        waits = any(table.state.num_held and any(writer.num_lacking for writer in table.wanting) for table in tables)
        self._waiting_since_s = now_s if waits else None

    def describe(self, now_s: float) -> dict[str, Any]:
        """What `info` shows of it."""
        return {"client": self.client, "path": self.path, "running_s": now_s - self.asked_s}

    def report(self, nbytes: int, now_s: float) -> CheckpointReport:
        """What it came to."""
        return CheckpointReport(
            self.path, nbytes, self.num_items, now_s - self.asked_s, self.pause_s * 1e3, self._waited_s * 1e3
        )
