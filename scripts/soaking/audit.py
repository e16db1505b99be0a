"""Is everything there that was acknowledged, and nothing else? Compares a server's tables with the scoreboard.

Rows of one writer are committed in the order of their places and evicted in the order of their commits, so at any
moment a table holds of each writer one range [low, high) of places, with acknowledged <= high <= sent.
"""

import contextlib
import itertools
import os
import signal
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rl_buffer as rb
from scripts.soaking import rows
from scripts.soaking.scoreboard import KINDS, NUM_SLOTS, Scoreboard, Take

Leaves = dict[str, NDArray[Any]]


def check_transitions(board: Scoreboard, leaves: dict[str, NDArray[Any]], n_step: int) -> int:
    """Report the transitions that no writer has written or sent so; return how many there are."""
    intact = rows.intact(leaves, n_step)
    writers, envs, steps = rows.numbers_of(leaves["observations"])
    intact &= (writers >= 0) & (writers < NUM_SLOTS)
    slots = board.slots[np.where(intact, writers, 0)]
    sent = rows.places(leaves, slots["num_envs"]) < slots["sent"]
    for problem, wrong in (("torn", ~intact), ("phantom", intact & ~sent)):
        for row in np.flatnonzero(wrong).tolist():
            board.report(problem, f"writer {writers[row]}, environment {envs[row]}, step {steps[row]}")
    return int(np.count_nonzero(~(intact & sent)))


@contextlib.contextmanager
def standing_still(pid: int) -> Iterator[bool]:
    """Stop a child, the server, so that inside the block nothing is committed or evicted; False if it has ended."""
    try:
        try:
            os.kill(pid, signal.SIGSTOP)
            status = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        except (ProcessLookupError, ChildProcessError):  # and somebody has looked
            status = None
        yield status is not None and status.si_code == os.CLD_STOPPED
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def committed(client: rb.Client, table: str) -> Leaves:
    """Copies of the committed rows of a table by path (their generation is odd), read from shared memory."""
    config = client.tables[table]
    segment, generations = client._connection.segments[table]
    numbers = np.flatnonzero(generations.array("int64") % 2 == 1)
    return {path: view[numbers] for path, view in config.layout.view(segment.buffer, config.num_rows).items()}


class TableAudit:
    """Looks at one replay table, again and again.

    A writer of which nothing is left may have been evicted: that takes `capacity` inserts after its last commit, so the
    audit remembers how many inserts there were when.
    """

    def __init__(self, board: Scoreboard, name: str, capacity: int, n_step: int) -> None:
        self.board, self.name, self.capacity, self.n_step = board, name, capacity, n_step
        self._inserts: list[tuple[int, int]] = []  # (monotonic ns before they were counted, inserts)

    def note_inserts(self, asked_ns: int, num_inserts: int) -> None:
        """So many inserts were counted at `asked_ns` or later."""
        self._inserts.append((asked_ns, num_inserts))

    def server_is_new(self) -> None:
        """It counts from zero."""
        self._inserts.clear()

    def acknowledged(self) -> NDArray[np.void]:
        """A copy of the scoreboard's slots; to be taken before the rows that are compared with it."""
        return np.array(self.board.slots)

    def compare(self, leaves: Leaves, slots: NDArray[np.void], num_inserts: int, *, all_epochs: bool) -> None:
        """Report what is torn, lost or was never committed.

        Args:
            leaves: of the committed rows.
            slots: from `acknowledged`, before.
            num_inserts: of the table, after.
            all_epochs: what earlier servers acknowledged is still there.
        """
        check_transitions(self.board, leaves, self.n_step)
        held = ranges(self.board, self.name, leaves)
        writers = np.flatnonzero((slots["kind"] == KINDS.index(self.name)) & (slots["acknowledged"] > 0))
        for writer in writers.tolist():
            slot = slots[writer]
            if not all_epochs and (slot["epoch"] != self.board.epoch or slot["acknowledged"] <= slot["base"]):
                continue
            if writer in held:
                missing = slot["acknowledged"] - held[writer][1]
                if missing > 0:
                    self._report_lost(writer, f"the newest {missing} of {slot['acknowledged']}")
            elif num_inserts - self._inserts_before(slot["published_ns"]) < self.capacity:
                self._report_lost(writer, f"all of {slot['acknowledged']}")

    def _inserts_before(self, moment_ns: int) -> int:
        """A lower bound of the inserts that there were at a moment."""
        return max((count for asked_ns, count in self._inserts if asked_ns < moment_ns), default=0)

    def _report_lost(self, writer: int, text: str) -> None:
        self.board.report("lost", f"table {self.name}, writer {writer}: {text} acknowledged rows are not there")


def ranges(board: Scoreboard, table: str, leaves: Leaves) -> dict[int, tuple[int, int]]:
    """[low, high) of the places in a table, by writer; gaps and doubles are reported as lost or torn.

    Args:
        board: for what is wrong.
        table: its name, for the text.
        leaves: of the committed rows, intact.
    """
    writers = leaves["observations"][:, 0]
    places = rows.places(leaves, board.slots["num_envs"][np.clip(writers, 0, NUM_SLOTS - 1)])
    held = {}
    for writer in np.unique(writers).tolist():
        own = np.sort(places[writers == writer])
        low, high = int(own[0]), int(own[-1]) + 1
        steps = np.diff(own)
        if (steps == 0).any():
            board.report("torn", f"table {table}, writer {writer}: place {own[:-1][steps == 0][0]} is there twice")
        if (steps > 1).any():
            gap = own[:-1][steps > 1][0] + 1
            board.report("lost", f"table {table}, writer {writer}: {gap} is missing in {low}..{high}")
        held[writer] = (low, high)
    return held


def compare_fragments(board: Scoreboard, takes: list[Take], dead: Mapping[int, Any], *, all_epochs: bool) -> None:
    """After the last fragment was drained: each acknowledged one was released once, and taken twice only from the dead.

    Args:
        board: the scoreboard.
        takes: its log.
        dead: readers that were killed, and so may have held what was handed out again.
        all_epochs: what earlier servers acknowledged was still handed out.
    """
    taken: dict[tuple[int, int], list[Take]] = defaultdict(list)
    released = set()
    for take in takes:
        if take.is_release:
            released.add((take.writer, take.fragment))
        else:
            taken[take.writer, take.fragment].append(take)
    for (writer, fragment), holders in taken.items():
        for first, second in itertools.pairwise(holders):
            if first.reader not in dead and first.epoch == second.epoch:
                board.report("torn", f"fragment {fragment} of writer {writer} was handed out twice: {first}, {second}")
    slots = board.slots
    for writer in np.flatnonzero(slots["kind"] == KINDS.index("rollout_writer")).tolist():
        slot = slots[writer]
        if not all_epochs and slot["epoch"] != board.epoch:
            continue
        first = 0 if all_epochs else int(slot["base"])
        for fragment in range(first, int(slot["acknowledged"])):
            if (writer, fragment) not in released:
                board.report("lost", f"fragment {fragment} of writer {writer} was acknowledged and never handed out")


def compare_counts(
    board: Scoreboard, name: str, table: rb.ReplayTable | rb.RolloutTable, num_inserts: int, *, all_epochs: bool
) -> tuple[int, int]:
    """Report if a table has not between the acknowledged and the sent inserts; return the same bounds of episodes."""
    kind, places_per_insert = name, 1
    if isinstance(table, rb.RolloutTable):
        kind, places_per_insert = "rollout_writer", table.num_steps * table.num_envs
    bounds = np.zeros((2, 2), np.int64)  # (inserts, episodes) x (acknowledged, sent)
    for slot in board.slots[board.slots["kind"] == KINDS.index(kind)]:
        if not all_epochs and slot["epoch"] != board.epoch:
            continue
        inserts = np.array([slot["base"], slot["acknowledged"], slot["sent"]])
        inserts[0] *= not all_epochs
        episodes = [rows.num_episodes(int(count) * places_per_insert, int(slot["num_envs"])) for count in inserts]
        bounds += np.array((inserts[1:] - inserts[0], np.array(episodes[1:]) - episodes[0]))
    if not bounds[0, 0] <= num_inserts <= bounds[0, 1]:
        board.report("lost", f"table {name} counts {num_inserts} inserts, of {bounds[0]} acknowledged and sent")
    return int(bounds[1, 0]), int(bounds[1, 1])
