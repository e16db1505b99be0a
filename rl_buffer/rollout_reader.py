"""`RolloutReader`: finished fragments of a served table, for one learner.

    credits -> SERVER leases fragments -> copied side by side: one rollout [T, F * E] -> epochs -> release

A learner that dies before `release` gives its fragments back: they are handed out again, to whoever asks next. When the
server is lost, so are fragments that were not taken yet; those that were are copies.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rl_buffer import frames, messages
from rl_buffer.connection import Channel, ChannelUser
from rl_buffer.errors import Closed, DeadlineExceeded, InvalidInput
from rl_buffer.failpoints import reached
from rl_buffer.frames import Credit
from rl_buffer.gae import explained_variance
from rl_buffer.inputs import as_count
from rl_buffer.rollout_batches import RolloutBatch, RolloutRows, is_handed_out
from rl_buffer.tables import RolloutTable


class Rollouts:
    """Fragments of F writers side by side, ordered by writer: one rollout [T, F * E], as if one process had made it.

    Attributes:
        writers: [F] int64, who made each fragment.
        versions: [T, F] int64, the parameter version that each step was made with; 0 before any.
        version_lag: [T, F] int64, the newest version when they were taken, less `versions`.
        mask: [T, F * E] bool, where a step happened; the others mean nothing.
        rewards: [T, F * E] float32.
        ended: [T, F * E] bool, where an episode terminated or was truncated.
    """

    def __init__(
        self,
        fragments: dict[str, NDArray[np.generic]],
        num_envs: int,
        newest_version: int,
        device: torch.device,
        generator: np.random.Generator,
        release: Callable[[], None],
    ) -> None:
        """Copy the fragments, whose leaves are [F, T, E, *shape], in the order of their writers."""
        order = np.argsort(fragments["writer"], kind="stable")
        self.writers = fragments["writer"][order].astype(np.int64)
        self.versions = fragments["versions"][order].T.astype(np.int64)
        self.version_lag = newest_version - self.versions
        self.num_fragments = len(order)

        def side_by_side(path: str) -> NDArray[Any]:
            # [F, T, E, ...] -> [T, F * E, ...]: a copy, which a GPU needs anyway.
            reached("rollout_reader.half_copied")
            return np.concatenate(list(fragments[path][order]), axis=1)

        self.rewards = side_by_side("rewards")
        self.ended = side_by_side("terminateds") | side_by_side("truncateds")
        self._arrays = {path: side_by_side(path) for path in fragments if is_handed_out(path)}
        self.mask = self._arrays["mask"]
        self.num_steps, self.num_envs = len(self.mask), self.num_fragments * num_envs
        self._generator = generator
        leaves = {path: torch.from_numpy(array).flatten(0, 1).to(device) for path, array in self._arrays.items()}
        self._rows = RolloutRows(leaves, np.flatnonzero(self.mask), device)
        self._release = release
        reached("rollout_reader.copied")

    @property
    def num_transitions(self) -> int:
        """Steps that happened, of all environments together."""
        return int(np.count_nonzero(self.mask))

    @property
    def explained_variance(self) -> float:
        """1 - Var(returns - values) / Var(returns); NaN where the returns do not vary."""
        arrays = self._arrays
        return explained_variance(arrays["values"], arrays["returns"], self.mask)

    def get(
        self, batch_size: int | None = None, shuffle: bool = True, normalize_advantages: bool = False
    ) -> Iterator[RolloutBatch]:
        """Hand out every step that happened exactly once, as `RolloutBuffer.get`."""
        return self._rows.epoch(batch_size, self._generator if shuffle else None, normalize_advantages)

    def release(self) -> None:
        """Let the fragments be written again; publish parameters first, so that writers begin with them. Twice is fine.

        The rollout itself is a copy and stays. Nothing is left to do if the server was lost since.

        Raises:
            ServerLost: the server ended and was not replaced yet.
        """
        self._release()

    def __enter__(self) -> "Rollouts":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class RolloutReader(ChannelUser):
    """Takes finished fragments from one table. Made by `client.rollouts`. Not for several threads."""

    def __init__(
        self,
        channel: Channel,
        call: Callable[[Channel, messages.Request], messages.Reply],
        name: str,
        table: RolloutTable,
        *,
        device: str | torch.device,
        seed: int | None,
        timeout_s: float,
        explain: Callable[[], str],
        newest_version: Callable[[], int],
    ) -> None:
        """Open the channel; nothing is asked for yet."""
        self.table = table
        self.timeout_s = timeout_s
        self._name = name
        self._call = call
        self._explain = explain
        self._newest_version = newest_version
        self._device = torch.device(device)
        self._generator = np.random.default_rng(seed)
        self._num_opened = 0
        self._open(channel)

    def _open(self, channel: Channel) -> None:
        self._call(channel, messages.OpenReader(channel.number, self._name))
        reached("rollout_reader.opened")
        rows, _ = channel.connection.segments[self._name]
        self._views = self.table.layout.view(rows.buffer, self.table.num_rows)
        self._channel = channel
        self._num_opened += 1
        self._received: list[tuple[int, int]] = []  # row and generation: leased, and not taken yet
        self._newest: dict[int, int] = {}  # by row: generation of the last lease
        self._outstanding = 0  # fragments that the server has leave to send

    def _rescue(self) -> None:
        """Nothing here is written."""

    def take(self, num_fragments: int | None = None, timeout_s: float | None = None) -> Rollouts:
        """Wait for finished fragments and take them.

        Args:
            num_fragments: exactly so many; None is the table's `fragments_per_update`.
            timeout_s: deadline in seconds, by default the reader's.

        Raises:
            DeadlineExceeded: fewer were finished in time; those stay this reader's, for the next call.
            InvalidInput: more than the table has.
        """
        wanted = as_count("num_fragments", self.table.fragments_per_update if num_fragments is None else num_fragments)
        if wanted > self.table.num_fragments:
            raise InvalidInput(f"num_fragments is {wanted}, but table {self._name!r} has {self.table.num_fragments}")
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        if not self._receive(wanted, time.monotonic() + timeout_s):
            raise DeadlineExceeded(
                f"take from table {self._name!r} waited {timeout_s} s and has {len(self._received)} of {wanted} "
                f"fragments: {self._explain()}"
            )
        return self._hand_out(wanted)

    def take_all(self, within_s: float) -> Rollouts:
        """Take all fragments that are finished within so many seconds; one at least.

        Raises:
            DeadlineExceeded: none was.
        """
        deadline_s = time.monotonic() + within_s
        self._receive(self.table.num_fragments, deadline_s)
        if not self._received:
            raise DeadlineExceeded(
                f"no fragment of table {self._name!r} was finished in {within_s} s: {self._explain()}"
            )
        return self._hand_out(len(self._received))

    def _receive(self, wanted: int, deadline_s: float) -> bool:
        """Whether `wanted` fragments are here by the deadline."""
        if self._closed:
            raise Closed("this reader was closed")
        self._channel.check_server()
        missing = wanted - len(self._received) - self._outstanding
        if missing > 0:
            self._send(missing, np.empty((0, 2), np.int64))
            self._outstanding += missing
            reached("rollout_reader.asked")
        while len(self._received) < wanted:
            frame = self._channel.receive(max(0.0, deadline_s - time.monotonic()))
            if frame is None:
                return False
            sample = frames.decode_batch(frame).sample
            leased = dict(zip(sample.rows.tolist(), sample.generations.tolist(), strict=True))
            if any(generation <= self._newest.get(row, -1) for row, generation in leased.items()):
                continue  # a message that came before
            self._newest |= leased
            self._received += leased.items()
            self._outstanding -= len(sample.rows)
            reached("rollout_reader.received")
        return True

    def _hand_out(self, num_fragments: int) -> Rollouts:
        taken, self._received = np.array(self._received[:num_fragments]), self._received[num_fragments:]
        leased_on = self._num_opened  # not the channel: it would keep a lost server's memory mapped
        released = False

        def release() -> None:
            nonlocal released
            if not (released or self._closed) and leased_on == self._num_opened:
                self._send(0, taken)
                released = True
                reached("rollout_reader.released")

        return Rollouts(
            {path: view[taken[:, 0]] for path, view in self._views.items()},
            self.table.num_envs,
            self._newest_version(),
            self._device,
            self._generator,
            release,
        )

    def _send(self, num_credits: int, released: NDArray[np.int64]) -> None:
        """Ask for more, and release [N, 2] rows and generations."""
        (rows, generations), epoch = np.ascontiguousarray(released.T), self._channel.connection.epoch
        self._channel.send(Credit(epoch, num_credits, 0, rows, generations, np.zeros(len(rows))).encode())
