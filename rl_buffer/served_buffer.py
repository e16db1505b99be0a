"""A served table behind the interface of the in-process buffers, so that going to many processes is one line."""

from typing import TYPE_CHECKING, Any

from rl_buffer.batches import ReplayBatch
from rl_buffer.errors import InvalidInput
from rl_buffer.sampler import ReplaySampler

if TYPE_CHECKING:
    from rl_buffer.client import Client


class ServedReplayBuffer:
    """`add`, `get`, `update_priorities` and `len` of one table. Made by `client.replay_buffer`."""

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

    def get(self, batch_size: int, beta: float | None = None, timeout_s: float | None = None) -> ReplayBatch:
        """A batch of what all writers have committed, one's own steps included."""
        self.writer.flush(timeout_s)
        if self._sampler is None or self._sampler.batch_size != batch_size:
            if self._sampler is not None:
                self._sampler.close()
            self._sampler = self._client.sampler(self._table, batch_size, prefetch=0, device=self._device)
        return self._sampler.sample(timeout_s, self.beta if beta is None else beta)

    sample = get

    def update_priorities(self, batch: ReplayBatch, td_errors: Any) -> None:
        """As `ReplaySampler.update_priorities`."""
        if self._sampler is None:
            raise InvalidInput("update_priorities needs a batch of get(), which was not called yet")
        self._sampler.update_priorities(batch, td_errors)

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
