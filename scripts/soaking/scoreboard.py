"""What each client has done so far, where a SIGKILL cannot take it back: counters in a file that all map.

Each client process has a slot of its own, which no other process had before it; its number is also the writer's number
in the rows. A client writes its own slot; the coordinator writes `command` and `argument` there, and the head.
"""

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NUM_SLOTS = 1 << 14
_FIELDS = (
    "kind",  # index into KINDS
    "num_envs",
    "beat_ns",  # monotonic time of the last thing that went well
    "sent",  # places (or fragments) below this may have been committed; raised before the call that may do it
    "acknowledged",  # places below this are committed; raised after the call that said so
    "published_ns",  # monotonic time: they were not committed before
    "base",  # of them, those that the present server's predecessors counted
    "epoch",  # number of the server that the client is attached to, as the coordinator counts them
    "sampled",  # rows or fragments
    "verified",
    "overtaken",
    "deadlines",  # calls that ended with DeadlineExceeded
    "reconnects",
    "command",  # index into COMMANDS
    "argument",
)
KINDS = ("none", "fresh", "ratio", "rollout_writer", "learner", "rollout_reader", "publisher", "follower", "vandal")
COMMANDS = ("none", "stop", "die_at", "close_and_write", "fork", "stall")


class Take(NamedTuple):
    """A reader got a fragment, or gives it back."""

    reader: int
    writer: int
    fragment: int
    epoch: int
    is_release: int


class Scoreboard:
    """A directory with the counters, the log of fragments, and what was found to be wrong."""

    def __init__(self, directory: str | Path) -> None:
        """Open it, or make it in an empty directory."""
        self.directory = Path(directory)
        path = self.directory / "counters"
        with path.open("ab") as file:
            file.truncate((NUM_SLOTS + 1) * len(_FIELDS) * 8)  # sparse: slots that nobody has cost nothing
        dtype = np.dtype([(name, np.int64) for name in _FIELDS])
        self._records = np.memmap(path, dtype, "r+")
        self._head = self._records[NUM_SLOTS]

    @property
    def slots(self) -> Any:
        """[NUM_SLOTS] records."""
        return self._records[:NUM_SLOTS]

    def slot(self, number: int) -> Any:
        """One record; its fields can be read and set by name."""
        return self._records[number]

    @property
    def epoch(self) -> int:
        """Servers that were started before the present one."""
        return int(self._head["epoch"])

    def next_epoch(self) -> None:
        """The next server is about to start."""
        self._head["epoch"] += 1

    def log_take(self, *takes: Take) -> None:
        """Note fragments; in one call, so that it happens wholly or not at all."""
        self._append("takes", np.array(takes, np.int64).tobytes())

    def takes(self) -> list[Take]:
        """All that were noted, in order."""
        path = self.directory / "takes"
        numbers = np.fromfile(path, np.int64) if path.exists() else np.empty(0, np.int64)
        return [Take(*row) for row in numbers.reshape(-1, len(Take._fields)).tolist()]

    def report(self, problem: str, text: str) -> None:
        """Something is wrong: torn, lost, phantom, hung, leaked or failed."""
        self._append("problems", f"{problem}\t{text}\n".encode())

    def problems(self) -> list[tuple[str, str]]:
        """What was reported: (problem, text), in order."""
        path = self.directory / "problems"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(line.partition("\t")[0], line.partition("\t")[2]) for line in lines]

    def _append(self, name: str, content: bytes) -> None:
        fd = os.open(self.directory / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(fd, content)
        finally:
            os.close(fd)


def beat(slot: Any) -> None:
    """The client is alive and something went well."""
    slot["beat_ns"] = time.monotonic_ns()
