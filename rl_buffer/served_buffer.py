"""A served table behind the interface of the in-process buffers, so that going to many processes is one line."""

from typing import TYPE_CHECKING, Any

from rl_buffer.batches import Batch
from rl_buffer.errors import InvalidInput
from rl_buffer.inputs import as_count
from rl_buffer.sampler import ReplaySampler

if TYPE_CHECKING:
    from rl_buffer.client import Client


class ServedReplayBuffer:
    """A served table with the methods of the in-process buffers. Made by `client.replay_buffer`.

    What differs, because others write and sample too: `len()` counts transitions of all environments; `get` on too few
    waits for the table's rate limiter until `timeout_s`; a batch may be larger than the contents; `update_priorities`
    takes batches only; saving is the server's.
    """

    def __init__(
        self,
        client: "Client",
        table: str,
        num_envs: int,
        *,
        beta: float = 0.4,
        device: Any = "cpu",
        **writer_options: Any,
    ) -> None:
        self.beta = beta
        self._client = client
        self._table = table
        self._device = device
        self._sampler: ReplaySampler | None = None
        self.writer = client.writer(table, num_envs=num_envs, **writer_options)

    def add(self, *args: Any, **kwargs: Any) -> None:
        """As `ReplayWriter.add`."""
        self.writer.add(*args, **kwargs)

    def extend(self, batch: Any, td_errors: Any = None) -> None:
        """As `ReplayWriter.extend`."""
        self.writer.extend(batch, td_errors)

    def on_reset(self, mask: Any = None) -> None:
        """As `ReplayWriter.on_reset`."""
        self.writer.on_reset(mask)

    def get(self, batch_size: int, beta: float | None = None, timeout_s: float | None = None) -> Batch:
        """A batch of what all writers have committed, one's own steps included.

        It may be larger than the table's contents; of an empty table it waits until `timeout_s`.

        Raises:
            InvalidInput: batch_size is not an integer >= 1, or beta is not in [0, 1].
            RequestRefused: a batch that is too large for a message, or that the rate limiter could never give.
            DeadlineExceeded: see `ReplaySampler.sample`.
        """
        batch_size = as_count("batch_size", batch_size)
        self.writer.flush(timeout_s)
        if self._sampler is None or self._sampler.batch_size != batch_size:
            sampler = self._client.sampler(self._table, batch_size, prefetch=0, device=self._device)
            if self._sampler is not None:
                self._sampler.close()
            self._sampler = sampler
        return self._sampler.sample(timeout_s, self.beta if beta is None else beta)

    sample = get

    def update_priorities(self, batch: Batch, td_errors: Any) -> None:
        """As `ReplaySampler.update_priorities`, for batches of any size that `get` returned."""
        if self._sampler is None:
            raise InvalidInput("update_priorities needs a batch of get(), which was not called yet")
        if not hasattr(batch, "generations"):
            raise InvalidInput(f"update_priorities needs a batch of get(), not its indices alone: got {type(batch)}")
        self._sampler.update_priorities(batch, td_errors)

    @property
    def num_transitions(self) -> int:
        """As `len()`."""
        return len(self)

    def flush(self, timeout_s: float | None = None) -> None:
        """As `ReplayWriter.flush`; every method here does it first."""
        self.writer.flush(timeout_s)

    def clear(self) -> None:
        """As `Client.clear`, after one's own complete steps went into the table."""
        self.writer.flush()
        self._client.clear(self._table)

    def __len__(self) -> int:
        """Transitions in the table, one's own complete steps included."""
        self.writer.flush()
        return self._client.size(self._table)

    def __enter__(self) -> "ServedReplayBuffer":
        return self

    def __exit__(self, exception_type: object, *_: object) -> None:
        if exception_type is None:
            self.close()

    def close(self) -> None:
        """Publish the rest and stop."""
        self.writer.close()
        if self._sampler is not None:
            self._sampler.close()
