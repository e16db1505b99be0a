"""`ReplaySampler`: batches for one learner.

    credits ->  SERVER draws row numbers  -> Batch -> gather rows -> look at generations again -> weights
       ^                                                                                            |
       +--- new priorities go with the next credit <------------------------------ learner's update +

The server keeps up to `prefetch` index sets in flight, so that `sample` seldom waits for a round trip; the rows are
gathered when the batch is handed out. A gather of 256 rows of 192 B takes 20 us and needs no thread of its own,
which would take the interpreter lock from the learner; on a GPU the copy overlaps with the step that is queued.

Of a table whose items leave with their last use, a batch is this sampler's alone until it is gathered. That is said at
once, with leave to send the next one. A learner that dies before gives its items back.

When the server is lost, so are the batches that were on their way; those that were handed out are copies. Priorities
for them then go to the next server, which drops and counts those of rows that it does not have.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rl_buffer import frames, messages
from rl_buffer.batches import Batch, as_td_errors
from rl_buffer.connection import Channel, ChannelUser
from rl_buffer.errors import Closed, DeadlineExceeded, InvalidInput, RequestRefused
from rl_buffer.failpoints import reached
from rl_buffer.frames import Credit
from rl_buffer.gather import Gatherer
from rl_buffer.importance import importance_weights, require_beta
from rl_buffer.samplers import Prioritized, require_masses
from rl_buffer.tables import ReplayTable, Sample

_NO_ROWS = np.empty(0, np.int64)
_NO_ERRORS = np.empty(0, np.float64)


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
        # First: if the device is not there, the server has not heard of this sampler.
        torch.empty(0, device=device)
        self._open(channel)

    def _open(self, channel: Channel) -> None:
        self._call(channel, messages.OpenSampler(channel.number, self._name, self.batch_size))
        reached("sampler.opened")
        rows, generations = channel.connection.segments[self._name]
        block = torch.frombuffer(rows.buffer, dtype=torch.int64).view(self._table.num_rows, -1)
        self._gatherer = Gatherer(self._table, block, self._device, contiguous=self._contiguous)
        self._generations = generations.array("int64")
        self._channel = channel
        self._outstanding = 0  # batches that the server has leave to send
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
        self._channel.connection.check_server()
        beta = self.beta if beta is None else require_beta(beta)
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + timeout_s
        self._ask(max(1, self._prefetch) - self._outstanding)
        while True:
            try:
                frame = self._channel.receive(max(0.0, deadline_s - time.monotonic()))
            except RequestRefused:
                self._outstanding -= 1  # a credit went with what was refused
                raise
            if frame is None:
                raise DeadlineExceeded(f"sample from table {self._name!r} waited {timeout_s} s: {self._explain()}")
            self._outstanding -= 1
            sample = frames.decode_batch(frame).sample
            reached("sampler.received")
            kept = self._gather(sample)
            if kept is not None:
                reached("sampler.gathered")
                if self._table.max_times_sampled:
                    self._release(sample)
                return self._hand_out(sample, kept, beta)
            # Every single row was overwritten meanwhile: the batch is worth nothing, the next one is newer.
            self._ask(1)

    def __iter__(self) -> Iterator[Batch]:
        """Batches without end."""
        while True:
            yield self.sample()

    def update_priorities(self, batch: Batch, td_errors: "torch.Tensor | NDArray[np.floating]") -> None:
        """Set priorities from TD errors, signed or not; of rows overwritten meanwhile they are dropped and counted.

        Args:
            batch: from this sampler.
            td_errors: (B,) or (B, 1), of sequences also (B, T); on any device; may require grad.

        Raises:
            InvalidInput: wrong shape, NaN or infinity, or a table without priorities. Nothing was sent.
            ServerLost: the server ended. Nothing was sent.
        """
        if self._closed:
            raise Closed("this sampler was closed")
        if batch.indices is None or batch.generations is None:
            raise InvalidInput(f"table {self._name!r} is sampled uniformly and has no priorities to update")
        errors = as_td_errors(self._table, batch, len(batch.indices), td_errors)
        # Here and not by a refusal, with which it would not be known whether a credit was lost.
        require_masses(self._table.sampler, errors)
        wanted = max(0, self._prefetch - self._outstanding)
        self._send_credit(wanted, batch.indices.numpy(), batch.generations.numpy(), errors)
        reached("sampler.updated")

    def _ask(self, num_credits: int) -> None:
        if num_credits > 0:
            self._send_credit(num_credits, _NO_ROWS, _NO_ROWS, _NO_ERRORS)

    def _send_credit(
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
        wanted = max(0, self._prefetch - self._outstanding)
        self._send_credit(wanted, sample.rows, sample.generations, np.full(len(sample.rows), np.nan))
        reached("consumer.released")

    def _gather(self, sample: Sample) -> NDArray[np.int64] | None:
        """Copy the batch's rows; return which draws it was made of, or None if no draw survived."""
        batch_size = self.batch_size
        self._gatherer.gather(sample.rows[:batch_size])
        reached("sampler.half_gathered")
        # A look in a call of its own, after the copy: x86-64 keeps loads in order, and the server bumps a row's
        # generation before it lets a writer at it. Equal generations therefore mean an untouched copy.
        intact = self._generations[sample.rows] == sample.generations
        if intact[:batch_size].all():
            return np.arange(batch_size)
        overtaken = np.flatnonzero(~intact[:batch_size])
        self.num_overtaken += len(overtaken)
        self._overtaken_unreported += len(overtaken)
        kept = np.arange(batch_size)
        substitutes = np.concatenate(
            (np.flatnonzero(intact[batch_size:]) + batch_size, np.flatnonzero(intact[:batch_size]))
        )
        while len(substitutes):
            # Spares first; where they run out, draws of this batch serve twice: both follow the same distribution.
            chosen = np.resize(substitutes, len(overtaken))
            kept[overtaken] = chosen
            rows = sample.rows[chosen]
            # Only these: what was found intact is a good copy whatever happens to its row. A whole batch of 512 image
            # transitions is 29 MB, and while it is copied again the next row is overtaken, and so on.
            self._gatherer.replace(overtaken, rows)
            is_overtaken = self._generations[rows] != sample.generations[chosen]
            if not is_overtaken.any():
                return kept
            overtaken = overtaken[is_overtaken]
            substitutes = substitutes[~np.isin(substitutes, chosen[is_overtaken])]
        return None

    def _hand_out(self, sample: Sample, kept: NDArray[np.int64], beta: float) -> Batch:
        if not self._prioritized:
            return self._gatherer.hand_out({})
        weights = importance_weights(sample.masses[kept], beta)
        drawn: dict[str, NDArray[Any]] = {
            "weights": weights,
            "indices": sample.rows[kept],
            "generations": sample.generations[kept],
        }
        return self._gatherer.hand_out(drawn)
