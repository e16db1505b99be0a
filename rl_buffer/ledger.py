"""What a server writes down as it goes, so that its successor goes on where a kill left it.

Only the server's thread writes (`mapped_ledger`), into mapped files of a directory (`directory`) or, in tests, into
ordinary arrays.
Whatever kills a process, at any instruction, its stores are in the page cache in the order of the program, and the
page cache outlives it. That is all that is relied on: nothing is synchronised, a power loss may cost everything.

    of each table               rows and generations, which clients map too, and
      claims [num_rows]         whose each row is:
                                  -c  reserved for client c (rollouts: being written by it)
                                   0  free
                                  +n  replay: its n-th commit; there while n > max(published - capacity, cleared), else
                                      free. rollouts: finished, with the number n - 1. Where items leave with their
                                      last use (below: items): the n-th commit, there
      masses [num_rows]         prioritized: the very leaves of the sum tree
      versions, readers [.]     rollouts: of each finished fragment, the parameter version and the client that reads it
      readers, uses [.]         items: the client that reads it, and how often it was read
      counts                    published, cleared, samples, drops, and which of two
      limiters                    describes the limiter, if it is another than the table's configuration has
    of the server
      clients                   who c is: process and token
      writers, progress         writer_id, and how much of what it sent is published
      moments, episodes         the statistics: lifetime moments, and a ring of twice the window
      client_names, _moments,   the same of each client's, by its slot, which is free where the count is 0
      _episodes
      journal                   the operation under way

Order and eviction need no records: committed are the rows with the `capacity` largest numbers, so it is the publishing
of a commit that evicts. A clear is one store as well, of `cleared`. Of items both are operations of their own, before
the commit.

1. What is one word is stored in place, before a message tells of it: reservations and releases (a word a row), the
   number of samples, priorities (a word a row: an update that a kill cuts short has reached some rows). Another limiter
   is written where the one in use is not, and then one word says that it is in use.
2. What must change together goes through the journal. A commit is rows, the writer's progress and episodes: all of that
   is written there, then armed by one store. At that moment the commit happens. Only then it is carried out in place,
   and the journal disarmed. If a kill comes between, the next server carries it out again by the same code; every store
   is of a fixed value, so it does not matter how often. What is in a journal that is not armed means nothing.
   That fragments or items are free is one such operation too. Of items the count of samples follows it, and may be one
   release behind after a kill.
3. All else follows and is made anew (`recovery`): queues, sums over the masses, sets. Committed rows have an odd
   generation, all others an even one, and none ever falls; rows of an armed commit get their initial priorities again.
4. A client that had not left keeps its reservations while its process may live: it may still write. Not written down,
   and so lost, are published parameters, the random state (draws begin anew, with the seed and the incarnation), and
   how many updates were stale and rows overtaken.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rl_buffer.allocator import Rows
from rl_buffer.peers import Process
from rl_buffer.rate_limiters import RateLimiter
from rl_buffer.server_stats import ClientRecord, ServerStats
from rl_buffer.sessions import WriterProgress
from rl_buffer.stats_tracker import Episode

NO_PROGRESS = WriterProgress(0, 0)


class Ledger:
    """Keeps nothing: the ledger of a server whose tables end with it."""

    def attached(self, token: bytes, process: Process) -> int:
        """A client may be granted rows from now on; return its number.

        Raises:
            InvalidInput: there are too many.
        """
        return 0

    def left(self, client: int) -> None:
        """A client holds nothing any more and never will."""

    def writer_opened(self, writer_id: bytes, progress: WriterProgress) -> int:
        """A writer begins or goes on; return its number.

        Raises:
            InvalidInput: there are too many, or it has a channel already.
        """
        return -1

    def writer_left(self, writer_id: bytes, *, comes_back: bool) -> None:
        """A writer has no channel now, and may open another or will never."""

    def reserved(self, table: str, rows: Rows, client: int) -> None:
        """Rows are the client's to write, who does not know it yet."""

    def released(self, table: str, rows: Rows) -> None:
        """Rows that were reserved are free."""

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
        """Publish: after this call it has happened. To be called before the table's `commit`, and then `end`.

        Args:
            table: its name.
            rows: [N] int64, reserved.
            td_errors: [N] float64, initial priorities.
            number: of the fragment in a rollout table.
            version: of its parameters.
            writer: its number, whose progress is `progress` then.
            progress: of the writer.
            episodes: that were just recorded in `stats`.
            stats: the statistics with them.
            client: the record of the client whose they are, with them; if they are all that it has, it is new.
        """

    def end(self) -> None:
        """What `begin` published is done."""

    def cleared(self, table: str) -> None:
        """All that is committed or finished is forgotten. To be called before the table's `clear`."""

    def limited(self, table: str, limiter: RateLimiter) -> None:
        """The table works by these rules from now on, not those of its configuration."""

    def sampled(self, table: str, num_samples: int) -> None:
        """So many samples were granted in all, the last ones not sent yet."""

    def leased(self, table: str, rows: Rows, client: int, num_samples: int) -> None:
        """Finished fragments, or items, are the client's to read, who does not know it yet.

        So many were handed out in all; of items only those count that their readers have finished, so that what is
        given back needs no other count.
        """

    def used(self, table: str, rows: Rows, uses: Rows) -> None:
        """Items were read, `uses[row]` times in all, and wait again."""

    def given_back(self, table: str, rows: Rows) -> None:
        """Fragments are finished again, items wait again, and are not being read."""

    def emptied(self, table: str, rows: Rows, num_dropped: int) -> None:
        """Fragments or items are free: read, dropped or evicted; so many fragments were dropped in all."""
