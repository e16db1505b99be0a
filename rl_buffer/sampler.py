"""`ReplaySampler`: batches for one learner.

    credits ->  SERVER draws row numbers  -> Batch -> gather rows -> look at generations again -> weights
       ^                                                                                            |
       +--- new priorities go with the next credits <----------------------------- learner's update +

The server keeps up to `prefetch` index sets in flight, so that `sample` seldom waits for a round trip; the rows are
gathered when the batch is handed out. A gather of 256 rows of 192 B takes 20 us and needs no thread of its own,
which would take the interpreter lock from the learner; on a GPU the copy overlaps with the step that is queued.

A message costs its sender, two threads of zmq and the server as much as the gather, so one message asks for half of the
prefetched batches, and the priorities of as many go with it. They wait no longer than the learner works on those.

Of a table whose items leave with their last use, a batch is this sampler's alone until it is gathered. That is said at
once, with leave to send the next one. A learner that dies before gives its items back.

When the server is lost, so are the batches that were on their way; those that were handed out are copies. Priorities
for them then go to the next server, which drops and counts those of rows that it does not have.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from rl_buffer import frames, messages
from rl_buffer.batches import Batch, as_td_errors, drawn_rows
from rl_buffer.connection import Channel, ChannelUser
from rl_buffer.errors import Closed, DeadlineExceeded, InvalidInput, RequestRefused
from rl_buffer.failpoints import reached
from rl_buffer.frames import Credit
from rl_buffer.gather import Gatherer
from rl_buffer.importance import require_beta
from rl_buffer.overtaken_rows import NOTHING_LEFT, describe_kept, keep_intact, substitute
from rl_buffer.samplers import Prioritized
from rl_buffer.tables import ReplayTable, Sample

_MOST_ROWS_KEPT = 4096  # of which new priorities wait to be sent

# Rows, their generations when they were drawn, and TD errors; [N] each.
_Update = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]


def _joined(updates: list[_Update]) -> _Update:
    if len(updates) == 1:
        return updates[0]
    if not updates:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    rows, generations, errors = zip(*updates, strict=True)
    return np.concatenate(rows), np.concatenate(generations), np.concatenate(errors)


class ReplaySampler(ChannelUser):
    """Draws batches from one table. Made by `client.sampler`. Not for several threads."""

    def __init__(
        self,
        channel: Channel,
        call: Callable[[Channel, messages.Request], messages.Reply],
        name: str,
        table: ReplayTable,
        *,
        batch_size: int,
        beta: float,
        prefetch: int,
        device: str | torch.device,
        contiguous: bool,
        timeout_s: float,
        explain: Callable[[], str],
    ) -> None:
        """Open the channel and ask for the first batches."""
        require_beta(beta)
        if not 0 <= prefetch <= 64:
            raise InvalidInput(f"prefetch must be in [0, 64] batches, got {prefetch}")
        self.batch_size = batch_size
        self.beta = beta
        self.timeout_s = timeout_s
        self.num_overtaken = 0  # rows that were overwritten between draw and gather, and replaced
        self._name = name
        self._table = table
        self._call = call
        self._prioritized = isinstance(table.sampler, Prioritized)
        self._explain = explain
        self._prefetch = prefetch
        self._device = torch.device(device)
        self._contiguous = contiguous
        self._updates: list[_Update] = []  # that were not sent yet
        self._num_updated = 0  # rows of these
        # First: if the device is not there, the server has not heard of this sampler.
        torch.empty(0, device=device)
        self._open(channel)
        # Of the batch at hand: which draw is at each place, and those places whose draw was replaced.
        self._kept, self._places = np.empty(batch_size, np.int64), np.empty(batch_size, np.int64)

    def _open(self, channel: Channel) -> None:
        self._call(channel, messages.OpenSampler(channel.number, self._name, self.batch_size))
        reached("sampler.opened")
        rows, generations = channel.connection.segments[self._name]
        block = torch.frombuffer(rows.buffer, dtype=torch.int64).view(self._table.num_rows, -1)
        self._gatherer = Gatherer(self._table, block, self._device, contiguous=self._contiguous)
        self._generations = generations.array("int64")
        self._channel = channel
        self._outstanding = 0  # batches that the server has leave to send, or has sent
        self._ready: deque[Sample] = deque()  # of these, that are here
        self._overtaken_unreported = 0
        self._ask(self._prefetch)

    def _rescue(self) -> None:
        """Nothing here is written."""

    def sample(self, timeout_s: float | None = None, beta: float | None = None) -> Batch:
        """The next batch.

        Args:
            timeout_s: deadline in seconds, by default the sampler's.
            beta: exponent of the importance weights in [0, 1], by default the sampler's.

        Raises:
            DeadlineExceeded: no batch came in time; the message says what the table waits for.
            ServerLost: the server ended.
        """
        if self._closed:
            raise Closed("this sampler was closed")
        self._channel.check_server()
        beta = self.beta if beta is None else require_beta(beta)
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + timeout_s
        self._ask_in_time()
        while True:
            if not self._ready:
                self._receive(deadline_s, timeout_s)
            sample = self._ready.popleft()
            self._outstanding -= 1
            if self._gather(sample):
                reached("sampler.gathered")
                if self._table.max_times_sampled:
                    self._release(sample)
                return self._hand_out(sample, beta)
            # Every single row was overwritten meanwhile: the batch is worth nothing, the next one is newer.
            self._ask(1)

    def _receive(self, deadline_s: float, timeout_s: float) -> None:
        """Wait for at least one batch."""
        try:
            frame = self._channel.receive(0.0)
            if frame is None:  # nothing that the server could work on is kept back while we wait
                self._ask(max(1, self._prefetch) - self._outstanding)
                frame = self._channel.receive(max(0.0, deadline_s - time.monotonic()))
        except RequestRefused:
            self._outstanding = 0  # the credits that went with what was refused are lost, and who knows how many
            raise
        if frame is None:
            raise DeadlineExceeded(f"sample from table {self._name!r} waited {timeout_s} s: {self._explain()}")
        self._ready.extend(frames.decode_batch(frame).samples())
        reached("sampler.received")

    def __iter__(self) -> Iterator[Batch]:
        """Batches without end."""
        while True:
            yield self.sample()

    def update_priorities(self, batch: Batch, td_errors: "torch.Tensor | NDArray[np.floating]") -> None:
        """Set priorities from TD errors, signed or not; of rows overwritten meanwhile they are dropped and counted.

        They are sent when the next batches are asked for: at the latest when half of the prefetched ones are used up,
        `sample` has to wait, or the sampler is closed. With prefetch=0, and for batches of thousands, at once.

        Args:
            batch: from this sampler.
            td_errors: (B,) or (B, 1), of sequences also (B, T); on any device; may require grad.

        Raises:
            InvalidInput: wrong shape, NaN or infinity, or a table without priorities. Nothing will be sent.
            ServerLost: the server ended. What was not sent goes to the next one.
        """
        if self._closed:
            raise Closed("this sampler was closed")
        self._channel.connection.check()
        drawn = drawn_rows(batch)
        if drawn is None:
            raise InvalidInput(f"table {self._name!r} is sampled uniformly and has no priorities to update")
        # Checked here and not by a refusal, with which it would not be known how many credits were lost.
        errors = as_td_errors(self._table, batch, len(drawn[0]), td_errors)
        self._updates.append((*drawn, errors))
        self._num_updated += len(errors)
        if self._prefetch == 0 or self._num_updated >= _MOST_ROWS_KEPT:
            self._send_credit(self._num_lacking)
        else:
            self._ask_in_time()
        reached("sampler.updated")

    def flush(self) -> None:
        """Send the priorities that wait for the next message; a learner that pauses may want it.

        Raises:
            ServerLost: the server ended.
        """
        if self._updates and not self._closed:
            self._send_credit(self._num_lacking)

    def close(self) -> None:
        """See `ChannelUser.close`; priorities that were not sent yet are sent first."""
        try:
            self.flush()
        finally:
            super().close()

    @property
    def _num_lacking(self) -> int:
        """Batches that could be asked for, so that `prefetch` are on their way."""
        return max(0, self._prefetch - self._outstanding)

    def _ask_in_time(self) -> None:
        """Ask for batches, unless half of those that are prefetched are still to come: then a later message does it."""
        wanted = max(1, self._prefetch) - self._outstanding
        if wanted >= max(1, self._prefetch // 2):
            self._ask(wanted)

    def _ask(self, num_credits: int) -> None:
        if num_credits > 0 or self._updates:
            self._send_credit(max(0, num_credits))

    def _send_credit(self, num_credits: int) -> None:
        """With all new priorities."""
        rows, generations, errors = _joined(self._updates)
        self._send(num_credits, rows, generations, errors)
        self._updates, self._num_updated = [], 0

    def _send(
        self,
        num_credits: int,
        rows: NDArray[np.int64],
        generations: NDArray[np.int64],
        errors: NDArray[np.float64],
    ) -> None:
        credit = Credit(
            self._channel.connection.epoch, num_credits, self._overtaken_unreported, rows, generations, errors
        )
        self._channel.send(credit.encode())
        self._overtaken_unreported = 0
        self._outstanding += num_credits
        reached("sampler.asked")

    def _release(self, sample: Sample) -> None:
        """Say that these rows are copied, and ask for another batch."""
        self._send(self._num_lacking, sample.rows, sample.generations, np.full(len(sample.rows), np.nan))
        reached("consumer.released")

    def _gather(self, sample: Sample) -> bool:
        """Copy the batch's rows, and note in `_kept` which draws they are of; False if no draw survived."""
        drawn = sample.rows, sample.generations
        self._gatherer.gather(sample.rows[: self.batch_size], self._generations)
        reached("sampler.half_gathered")
        num_changed, candidate = keep_intact(self._generations, *drawn, self._kept, self._places)
        if num_changed:
            num_overtaken = self.batch_size if num_changed == NOTHING_LEFT else num_changed
            self.num_overtaken += num_overtaken
            self._overtaken_unreported += num_overtaken
        while num_changed > 0:
            places = self._places[:num_changed]
            # Only these: what was found intact is a good copy whatever happens to its row. A whole batch of 512 image
            # transitions is 29 MB, and while it is copied again the next row is overtaken, and so on.
            self._gatherer.replace(places, sample.rows[self._kept[places]])
            num_changed, candidate = substitute(self._generations, *drawn, self._kept, places, candidate)
        return num_changed != NOTHING_LEFT

    def _hand_out(self, sample: Sample, beta: float) -> Batch:
        if not self._prioritized:
            return self._gatherer.hand_out({})
        rows, generations = np.empty(self.batch_size, np.int64), np.empty(self.batch_size, np.int64)
        weights = np.empty(self.batch_size, np.float32)
        describe_kept(sample.rows, sample.generations, sample.masses, self._kept, beta, rows, generations, weights)
        return self._gatherer.hand_out({"weights": weights, "indices": rows, "generations": generations})
