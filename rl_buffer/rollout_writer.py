"""`RolloutWriter`: one actor's rollouts, written step by step into fragments of a served table.

    begin (waits for a fragment) -> add, add, ... -> commit: GAE, then published -> begin ...

A fragment costs two messages. Nothing is staged: a step is written where the learner will read it. When the server is
lost, the fragment in work is copied and goes on in one of the next server; of one that was sent without being
acknowledged see `outbox`. No torch; the GAE kernel is Numba's. One thread at a time.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rl_buffer import messages
from rl_buffer.connection import Channel, ChannelUser
from rl_buffer.episode_ends import Autoreset
from rl_buffer.errors import Closed, DeadlineExceeded, InvalidInput
from rl_buffer.failpoints import reached
from rl_buffer.outbox import Outbox, Words
from rl_buffer.rollout_fragment import RolloutFragment
from rl_buffer.stats_tracker import Episode, StatsTracker
from rl_buffer.tables import RolloutTable, StatsConfig


class RolloutWriter(ChannelUser):
    """Writes rollouts of the table's `num_envs` environments. Made by `client.rollout_writer`.

    Not for several threads; make one writer per thread.
    """

    def __init__(
        self,
        channel: Channel,
        call: Callable[[Channel, messages.Request], messages.Reply],
        name: str,
        table: RolloutTable,
        stats: StatsConfig,
        *,
        number: int,
        autoreset: Autoreset | None,
        timeout_s: float,
        explain: Callable[[], str],
        parameter_version: Callable[[], int],
    ) -> None:
        """Open the channel and ask for the first fragment."""
        self.table = table
        self.number = number
        self.timeout_s = timeout_s
        self.stats_tracker = StatsTracker(
            table.num_envs, stats.window, stats.category, stats.extra_metrics_keys, stats.done_reason_keys
        )
        self._name = name
        self._call = call
        self._explain = explain
        self._parameter_version = parameter_version
        self._fragment = RolloutFragment(
            table.num_steps, table.num_envs, gamma=table.gamma, gae_lambda=table.gae_lambda, autoreset=autoreset
        )
        self._row: int | None = None  # of the fragment that is being written
        self._rescued: Words | None = None  # [1, stride / 8], a fragment in work of which the server is lost
        self._unsent_episodes: list[Episode] = []
        self._outbox = Outbox(call, name, 1, 1)
        self._open(channel)
        reached("rollout_writer.opened")

    def _open(self, channel: Channel) -> None:
        if self._outbox.open(channel):
            for words in (*self._outbox.rescued, *(() if self._rescued is None else (self._rescued,))):
                self.table.layout.view(words, len(words))["versions"][...] = 0
        rows, _ = channel.connection.segments[self._name]
        self._rows = self.table.layout.view(rows.buffer, self.table.num_rows)
        self._channel = channel

    def _rescue(self) -> None:
        if self._row is not None:
            self._rescued, self._row = self._outbox.block[[self._row]], None
        self._outbox.rescue()
        num_filled = self._fragment.num_filled
        self._fragment.begin({})  # it holds no memory of the lost server any more
        self._fragment.num_filled = num_filled

    @property
    def is_full(self) -> bool:
        """Whether the fragment has all of its steps and waits for `commit`."""
        return self._is_writing and self._fragment.is_full

    @property
    def num_acknowledged(self) -> int:
        """Fragments that a server has for certain, of all that were committed; the oldest ones."""
        return self._outbox.num_acknowledged

    @property
    def _is_writing(self) -> bool:
        return self._row is not None or self._rescued is not None

    def begin(self, timeout_s: float | None = None) -> None:
        """Wait for a fragment, if none is being written. Then is the time to look for newer parameters.

        Raises:
            DeadlineExceeded: there was none in time; the message says who has them. It may be called again.
            ServerLost: the server ended. After `Client.reconnect` it goes on with the fragment in work.
        """
        self._check()
        if self._row is not None:
            return
        self._channel.check_server()
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + timeout_s
        if not (self._outbox.send_again(deadline_s) and self._outbox.reserve(1, deadline_s)):
            raise DeadlineExceeded(f"begin on table {self._name!r} waited {timeout_s} s: {self._explain()}")
        row, num_filled = int(self._outbox.reserved[0]), self._fragment.num_filled
        self._fragment.begin({path: view[row] for path, view in self._rows.items() if np.ndim(view[row])})
        if self._rescued is not None:
            self._outbox.block[[row]] = self._rescued
            self._fragment.num_filled = num_filled
        self._row, self._rescued = row, None
        reached("rollout_writer.began")

    def add(
        self,
        obs: Any,
        action: Any,
        reward: ArrayLike,
        done: ArrayLike,
        value: ArrayLike,
        log_prob: ArrayLike,
        truncated: ArrayLike | None = None,
        terminated: ArrayLike | None = None,
        final_values: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        metrics: Mapping[str, ArrayLike] | None = None,
        done_reasons: Mapping[str, ArrayLike] | None = None,
    ) -> None:
        """Take one step of all environments, as `RolloutBuffer.add`; begins a fragment if none is being written.

        Raises:
            InvalidInput: the fragment is full and must be committed, or a wrong argument, by name. Nothing was added.
            DeadlineExceeded, ServerLost: as `begin`. Nothing was added.
        """
        self.begin()
        if self._fragment.is_full:
            raise InvalidInput(f"the fragment has all of its {self.table.num_steps} steps: commit(last_values) it")
        staged = self._fragment.stage(
            obs, action, reward, done, value, log_prob, truncated, terminated, final_values, mask
        )
        self.stats_tracker.update(
            staged.rewards, staged.ended, metrics=metrics, done_reasons=done_reasons, mask=staged.mask
        )
        self._rows["versions"][self._row, self._fragment.num_filled] = self._parameter_version()
        self._fragment.accept(staged)
        reached("rollout_writer.half_written")

    def commit(self, last_values: ArrayLike, last_dones: ArrayLike | None = None) -> None:
        """Compute advantages and returns, and publish the fragment; it may have fewer steps than its table says.

        Args:
            last_values: (E,) or (E, 1), V(obs after the last step), as for `RolloutBuffer`.
            last_dones: the `done` of the last step once more, and may be left out.

        Raises:
            InvalidInput: nothing was added, or as `RolloutBuffer.compute_returns_and_advantages`. Nothing was sent.
            ServerLost: the server ended. Nothing was sent: it is for after `Client.reconnect`.
            DeadlineExceeded: after `Client.reconnect`, as `begin`.
        """
        self._check()
        if not self._is_writing:
            raise InvalidInput("there is no step to commit; add() some first")
        self.begin()
        self._fragment.finish(last_values, last_dones)
        num_filled = self._fragment.num_filled
        versions = self._rows["versions"][self._row]
        versions[num_filled:] = versions[num_filled - 1]
        self._rows["writer"][self._row] = self.number
        reached("rollout_writer.written")
        self._unsent_episodes += self.stats_tracker.drain()
        self._outbox.send(1, int(versions.min()), None, self._unsent_episodes)
        reached("rollout_writer.committed")
        self._row = None
        self._unsent_episodes = []

    def close(self) -> None:
        """Wait until the server has what was committed, and give back the fragment in work. Twice is fine.

        Raises:
            DeadlineExceeded: the server did not take it within `timeout_s`; the writer stays open.
            ServerLost: the server ended; the writer stays open if anything is not acknowledged.
        """
        if not self._closed:
            deadline_s = time.monotonic() + self.timeout_s
            if not (self._outbox.send_again(deadline_s) and self._outbox.settle(deadline_s)):
                raise DeadlineExceeded(
                    f"close on table {self._name!r} waited {self.timeout_s} s for the server to take a fragment: "
                    f"{self._explain()}"
                )
        super().close()

    def _check(self) -> None:
        if self._closed:
            raise Closed("this writer was closed")
        self._channel.connection.check()
